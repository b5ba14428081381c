"""``graphopt bisect`` as a user drives it: a command as the judge, the built-in judge, cut off, resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from math import ceil, log2
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

# A model that is wrong once the GELU is fused: the judge looks at the graph, as a stand-in for an accuracy.
JUDGE = """
import os, sys, pathlib
import graphopt, zoo
model, args = zoo.block()
with open("asked", "a") as log:
    log.write(os.environ["GRAPHOPT_BISECT_LIMIT"] + "\\n")
report = graphopt.optimize(model, args, effort="fast", executors=("eager",)).report
sys.exit("graphopt.bias_gelu" in report.ops_after)
"""


UNSURE = "case $GRAPHOPT_BISECT_LIMIT in 0) exit 0;; 1) exit 125;; *) exit 1;; esac"


@pytest.fixture
def judge(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (workspace / "judge.py").write_text(JUDGE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(workspace), os.environ.get("PYTHONPATH", "")]))
    return f"{sys.executable} judge.py"


def test_a_command_convicts_in_log2_runs_and_the_reproducer_runs_alone(
    workspace: Path, run: Run, judge: str
) -> None:
    done = run("bisect", "zoo:block", "--judge", judge, "-o", "found", "--json")
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    assert found["guilty"]["pass"] == "fuse_bias_gelu"
    assert found["bad"] - found["good"] == 1
    asked = (workspace / "asked").read_text().split()
    assert len(asked) == len(set(asked)) <= 2 + ceil(log2(found["rewrites"]))
    script = Path(found["reproducer"]).absolute()
    assert "zoo" not in script.read_text().replace(str(workspace / "zoo.py"), "")
    alone = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=script.parent, timeout=120, check=False
    )
    assert alone.returncode == 0, alone.stderr  # the rewrite is exact: it is the judge who does not like it
    assert "as exact as the original" in alone.stdout

    again = run("bisect", "zoo:block", "--judge", judge, "-o", "found")
    assert again.exit_code == 1
    assert "guilty: fuse_bias_gelu" in again.stdout
    assert (workspace / "asked").read_text().split() == asked  # it is all known
    assert run("bisect", "zoo:block", "--judge", judge, "-o", "found", "--restart").exit_code == 1
    assert len((workspace / "asked").read_text().split()) == 2 * len(asked)


def test_a_run_that_was_cut_off_goes_on(workspace: Path, run: Run, judge: str) -> None:
    run("bisect", "zoo:block", "--judge", judge, "-o", "found")
    (state,) = (workspace / "found").glob("bisect-*.json")
    known = json.loads(state.read_text())
    kept = dict(list(known["answers"].items())[:2])
    state.write_text(json.dumps({**known, "answers": kept}))
    (workspace / "asked").unlink()
    assert run("bisect", "zoo:block", "--judge", judge, "-o", "found").exit_code == 1
    assert len((workspace / "asked").read_text().split()) == len(known["answers"]) - 2


def test_without_a_judge_the_model_is_compared(workspace: Path, run: Run) -> None:
    done = run("bisect", "zoo:block", "-o", "found")
    assert done.exit_code == 0, done.output
    assert "rewrites are good" in done.stdout


@pytest.mark.parametrize(
    ("judge", "code", "words"),
    [
        ("exit 0", 0, "rewrites are good"),
        ("exit 1", 3, "bad without any rewrite"),
        ("exit 125", 3, "could not tell"),
        ("no-such-command-at-all", 2, "the judge cannot be run: exit code 127"),
        (UNSURE, 3, "turns bad between 0 and 2"),
    ],
)
def test_the_other_ends(workspace: Path, run: Run, judge: str, code: int, words: str) -> None:
    done = run("bisect", "zoo:block", "--judge", judge, "-o", "found")
    assert done.exit_code == code, done.output
    assert words in done.output


def test_a_judge_that_takes_too_long_is_bad(workspace: Path, run: Run) -> None:
    done = run("bisect", "zoo:block", "--judge", "sleep 30", "--timeout", "0.2", "-o", "found")
    assert done.exit_code == 3
    assert "bad without any rewrite" in done.output


def test_a_damaged_state_is_named(workspace: Path, run: Run) -> None:
    run("bisect", "zoo:block", "--judge", "exit 0", "-o", "found")
    (state,) = (workspace / "found").glob("bisect-*.json")
    state.write_text("{")
    done = run("bisect", "zoo:block", "--judge", "exit 0", "-o", "found")
    assert done.exit_code == 2
    assert "--restart" in done.output
