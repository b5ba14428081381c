"""What the command says before it has any work to do: at once, so that nothing heavy is imported."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer

import graphopt
from graphopt.bench.peers import PEERS
from graphopt.cli import COMMANDS, app, bench

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "numpy", "graphopt.optimize")
SCRIPT = """
import sys
from graphopt.cli import main
code = None
try:
    main()
except SystemExit as ended:
    code = ended.code
heavy = [name for name in {heavy} if name in sys.modules]
print("ended", code, *heavy, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--help",), 0, "optimize"),
        ((), 2, "optimize"),
        (("--version",), 0, "graphopt 0."),
        (("optimise",), 2, "optimise"),
        (("--fast",), 2, "--fast"),
        *(((name, "--help"), 0, name) for name in COMMANDS),
        *(((name, "--no-such-option"), 2, "--no-such-option") for name in COMMANDS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_nothing_heavy_is_imported_to_say_how_it_is_used(args: tuple[str, ...], code: int, says: str) -> None:
    command = [sys.executable, "-c", SCRIPT.format(heavy=HEAVY), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == f"ended {code}", done.stderr
    assert says in done.stdout + done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_listed_by_what_it_says_itself(name: str, run: Callable[..., Any]) -> None:
    function = getattr(importlib.import_module(f"graphopt.cli.{name}"), name)
    group: Any = typer.main.get_command(app)
    listed = group.commands[name]
    first = function.__doc__.strip().splitlines()[0]
    assert (listed.help or "").startswith(first)
    done = run(name, "--help")
    assert done.exit_code == 0
    assert first[:40] in " ".join(done.stdout.split())


def test_the_help_of_bench_names_every_peer() -> None:
    assert ", ".join(PEERS) == bench._PEERS


def test_the_face_is_whole_and_a_function_stays_a_function() -> None:
    assert set(graphopt.__all__) <= set(dir(graphopt))
    for name in graphopt.__all__:
        assert getattr(graphopt, name) is not None
    importlib.import_module("graphopt.optimize")
    importlib.import_module("graphopt.explain")
    assert callable(graphopt.optimize) and callable(graphopt.explain)
    assert not hasattr(graphopt, "optimise")
