"""The process of a case, as its parent sees it: one that hangs, and who is to blame."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from graphopt.bench.setting import Case, Setting
from graphopt.cli import _cases

CASE, SETTING = Case("zoo:model"), Setting(("sleepy", "eager"), limit=600.0)

# Speaks as graphopt.cli._case does, and imports nothing slow: says what it does, and hangs where it is told.
CHILD = """
import json, sys, time
job = json.load(sys.stdin)
crashed = job["crashed"]
def say(**message):
    print(json.dumps(message), flush=True)
for doing in STAGES:
    key = doing.split(" ", 1)[1] if doing.startswith(("build ", "run ")) else ""
    if key in crashed:
        continue
    say(doing=doing, done=0.5)
    if doing == HANGS:
        time.sleep(3600)
say(row={"case": "zoo:model", "crashed": crashed})
"""


class ImpatientTimer:
    """Takes the place of a timer: its time is over at once where a word says so, and never otherwise."""

    words: ClassVar[list[str]] = []
    hangs = ""

    def __init__(self, seconds: float, function: Any) -> None:
        self.seconds, self.function = seconds, function

    def start(self) -> None:
        if self.words and self.words[-1] == self.hangs:
            self.words.append("its time is over")
            self.function()

    def cancel(self) -> None: ...


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts the script in the process's place; what it says last before it hangs ends the patience with it."""

    def put(hangs: str, stages: tuple[str, ...]) -> None:
        script = tmp_path / "child.py"
        script.write_text(f"STAGES, HANGS = {stages!r}, {hangs!r}\n{CHILD}")
        monkeypatch.setattr(_cases, "_COMMAND", [sys.executable, "-S", str(script)])
        monkeypatch.setattr(_cases.threading, "Timer", ImpatientTimer)
        monkeypatch.setattr(ImpatientTimer, "words", [])
        monkeypatch.setattr(ImpatientTimer, "hangs", hangs)

    return put


def measured() -> tuple[dict[str, Any], list[str]]:
    told = ImpatientTimer.words
    row = _cases.measure(CASE, SETTING, lambda doing, done: told.append(doing))
    return row, told


@pytest.mark.parametrize("stage", ["build", "run"])
def test_a_peer_that_hangs_is_marked_and_the_case_is_measured_without_it(child: Any, stage: str) -> None:
    hangs = f"{stage} sleepy (deep)"
    child(hangs, ("load", "build sleepy (deep)", "build eager", "run sleepy (deep)", "run eager", "measure"))
    row, told = measured()
    assert row == {"case": "zoo:model", "crashed": {"sleepy (deep)": "timed out after 600 s"}}
    assert told.count(hangs) == 1
    assert told[-1] == "measure"


@pytest.mark.parametrize("hangs", ["optimize, cold", "build graphopt (ort)", "measure"])
def test_where_no_peer_is_to_blame_the_case_fails_and_says_at_what(child: Any, hangs: str) -> None:
    child(hangs, ("load", "optimize, cold", "build graphopt (ort)", "build eager", "measure"))
    row, _ = measured()
    assert row["failed"] == {
        "message": f"timed out after 600 s at: {hangs}",
        "hint": "--limit SECONDS gives a side more time, 0 all of it",
        "code": 2,
    }


def test_without_a_limit_nothing_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cases.threading, "Timer", None)  # to make one would fail
    watch = _cases._Watch(None, None)  # type: ignore[arg-type]
    watch.fed()
    watch.stop()
    assert not watch.bit
