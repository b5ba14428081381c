"""A user's pass: the same three functions, registered by decorator or entry point, treated like any other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.compiler.pass_ import Pass, custom_pass, forget
from graphopt.compiler.rewriter import Rewriter
from graphopt.errors import PassError
from graphopt.ir.pattern import Call, Match, Var
from graphopt.passes.default import pipeline
from tests._models import randn

aten = torch.ops.aten


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x) * 2.0, torch.tanh(x + 1.0) * 3.0)  # type: ignore[return-value]


@pytest.fixture
def fuse_double() -> Iterator[Pass]:
    @custom_pass("fuse", after="fuse_linear")
    class FuseDouble:
        pattern = Call(aten.mul.Tensor, Call(aten.tanh.default, Var("x")), Var("factor"))

        def check(match: Match) -> str | None:  # noqa: N805
            return None if match["factor"] == 2.0 else f"the factor is {match['factor']}, not 2"

        def rewrite(rewriter: Rewriter, match: Match) -> None:  # noqa: N805
            tanh = rewriter.call(aten.tanh.default, match["x"])
            rewriter.replace(match.root, rewriter.call(aten.add.Tensor, tanh, tanh))

    yield FuseDouble
    forget("fuse_double")


def test_it_runs_verified_with_remarks_and_under_the_bisection_limit(
    fuse_double: Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = randn(4, 8)
    optimized = graphopt.optimize(Doubled().eval(), (x,), effort="fast", executors=("eager",))
    assert optimized.report.rewrites_by_pass()["fuse_double"] == 1
    reasons = [row.reason for row in optimized.report.remarks if row.pass_name == "fuse_double"]
    assert "the factor is 3.0, not 2" in reasons
    assert torch.equal(optimized(x)[0], torch.tanh(x) * 2)
    monkeypatch.setenv("GRAPHOPT_BISECT_LIMIT", "0")
    limited = graphopt.optimize(Doubled().eval(), (x,), effort="fast", executors=("eager",))
    assert limited.report.rewrites_by_pass() == {}


def test_its_place_and_switching_it_off(fuse_double: Pass) -> None:
    names = [rule.name for rule in pipeline()]
    assert names[names.index("fuse_double") - 1] == "fuse_linear"
    assert "fuse_double" not in [rule.name for rule in pipeline(disable=["fuse_double"])]
    assert "fuse_double" not in [rule.name for rule in pipeline(level=0)]


def test_a_wrong_one_is_reverted() -> None:
    @custom_pass("fold")
    class SwapTanh:
        pattern = Call(aten.tanh.default, Var("x"))

        def rewrite(rewriter: Rewriter, match: Match) -> None:  # noqa: N805
            rewriter.replace(match.root, rewriter.call(aten.sin.default, match["x"]))

    try:
        assert [rule.name for rule in pipeline()][-2] == "swap_tanh"
        x = randn(4, 8)
        optimized = graphopt.optimize(Doubled().eval(), (x,), effort="fast", executors=("eager",))
        tried = [row for row in optimized.report.rewrites if row.pass_name == "swap_tanh"]
        assert len(tried) == 2
        assert not any(row.kept for row in tried)
        assert torch.equal(optimized(x)[0], torch.tanh(x) * 2)
    finally:
        forget("swap_tanh")


def test_what_cannot_be_registered() -> None:
    with pytest.raises(PassError, match="pass 'no_pattern' has no pattern"):

        @custom_pass("fuse")
        class NoPattern:
            def rewrite(rewriter: Rewriter, match: Match) -> None:  # noqa: N805
                """Never called."""

    with pytest.raises(PassError, match="registered already"):

        @custom_pass("fuse", name="fuse_linear")
        class Taken:
            pattern = Var("x")

            def rewrite(rewriter: Rewriter, match: Match) -> None:  # noqa: N805
                """Never called."""

    with pytest.raises(PassError, match="graphopt's own"):
        forget("fuse_linear")


def test_one_behind_a_pass_that_does_not_exist() -> None:
    @custom_pass("fuse", after="fuse_linaer")
    class Lost:
        pattern = Call(aten.tanh.default, Var("x"))

        def rewrite(rewriter: Rewriter, match: Match) -> None:  # noqa: N805
            """Never called."""

    try:
        with pytest.raises(PassError, match="no pass 'fuse_linaer'"):
            pipeline()
    finally:
        forget("lost")


ENTRY_POINT_PASS = """
import torch
from graphopt.compiler.pass_ import custom_pass
from graphopt.ir.pattern import Call, Var

@custom_pass("fuse")
class FuseFromAfar:
    pattern = Call(torch.ops.aten.cos.default, Var("x"))
    def rewrite(rewriter, match):
        pass
"""


def _installed(folder: Path, code: str) -> None:
    (folder / "afar_passes.py").write_text(code)
    info = folder / "afar-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: afar\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[graphopt.passes]\nafar = afar_passes\n")


def test_an_installed_package_offers_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(tmp_path, ENTRY_POINT_PASS)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert "fuse_from_afar" in [rule.name for rule in pipeline()]
    finally:
        forget("fuse_from_afar")
        sys.modules.pop("afar_passes", None)


def test_a_package_whose_passes_do_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(tmp_path, "raise RuntimeError('broken')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PassError, match="passes of 'afar_passes' cannot be loaded: RuntimeError: broken"):
        pipeline()
