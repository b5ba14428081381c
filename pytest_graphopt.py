"""The gate as a pytest test: the fixture ``graphopt``, and the marker that says which models it checks.

    @pytest.mark.graphopt("my_models.bert:tiny", max_slowdown=0.1)
    def test_the_gate(graphopt):
        graphopt.check()

A module beside the package and not in it: pytest imports every plugin that is installed, and a run that never
asks for the fixture must not pay for importing PyTorch.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


class Gate:
    """What the fixture gives.

    Args:
        specs: models of the lock, or patterns; none is all.
        budgets: of the marker.
    """

    def __init__(self, specs: Sequence[str], budgets: dict[str, Any]) -> None:
        self._specs, self._budgets = tuple(specs), dict(budgets)

    def check(
        self, *specs: str, lock: str | Path = "graphopt.lock", time: bool = True, **budgets: Any
    ) -> list[Any]:
        """Hold models to the lock, as ``graphopt check`` does.

        Args:
            specs: models of the lock, or patterns; those of the marker by default.
            lock: the file.
            time: whether to time the models.
            budgets: as ``graphopt.gate.budgets.Budgets`` has them; None switches one off.

        Returns:
            The results, a row a model.

        Fails the test on a regression, and skips it when the machine was too noisy to tell, unless the budget
        ``on_inconclusive`` says ``"pass"`` or ``"fail"``.

        Raises:
            InputError: the lock cannot be read, no model matches, or nothing was compared.
        """
        from rich.console import Console

        from graphopt.cli import _gate
        from graphopt.gate import render

        given, setting = {**self._budgets, **budgets}, _gate.Setting(timed=time)
        checked = _gate.check_lock(Path(lock), specs or self._specs, given, setting, lambda name, done: None)
        console = Console(file=io.StringIO(), width=160, soft_wrap=True)
        with console.capture() as captured:
            render.table(checked.results, console)
        if 1 in checked.codes:
            pytest.fail(captured.get(), pytrace=False)
        if 3 in checked.codes:
            pytest.skip(f"inconclusive: {captured.get()}")
        return checked.results


@pytest.fixture
def graphopt(request: pytest.FixtureRequest) -> Gate:
    """Checks models against ``graphopt.lock``; the marker ``graphopt`` names models and budgets."""
    marker = request.node.get_closest_marker("graphopt")
    return Gate(marker.args if marker else (), marker.kwargs if marker else {})


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known, for runs with ``--strict-markers``."""
    config.addinivalue_line(
        "markers",
        "graphopt(*specs, **budgets): the models of graphopt.lock that the fixture checks, and their budgets",
    )
