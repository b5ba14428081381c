"""``graphopt bench`` as a user drives it: cases, rows, reports, crashes, Ctrl-C, and what does not fit."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from graphopt.bench.case import failed_row
from graphopt.bench.setting import Case, Setting
from graphopt.cli import _cases
from graphopt.cli.bench import run_cases
from tests.cli.conftest import COMMAND

Run = Callable[..., Any]

BENCH_ZOO = """
import os

import torch


class MLP(torch.nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x):
        return self.down(torch.nn.functional.gelu(self.up(x)))


class Counted(MLP):
    def forward(self, x):
        if not torch.compiler.is_compiling():
            with open("calls", "a") as calls:
                calls.write(".")
        return super().forward(x)


def mlp(batch=2, width=8):
    return MLP(width).eval(), (torch.randn(batch, width),)


def small(batch=2):
    if batch > 4:
        raise RuntimeError(f"a batch of {batch} does not fit")
    return mlp(batch)


def counted():
    return Counted().eval(), (torch.randn(2, 8),)


class Deadly(MLP):
    def forward(self, x):
        if torch.onnx.is_in_onnx_export():
            os.abort()
        return super().forward(x)


def deadly():
    return Deadly().eval(), (torch.randn(2, 8),)
"""
FAST = ("--rounds", "3", "--threads", "1", "--against", "eager")


@pytest.fixture
def place(workspace: Path) -> Path:
    (workspace / "bench_zoo.py").write_text(BENCH_ZOO)
    return workspace


def rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_a_case_is_a_spec_with_sizes_and_a_dtype(place: Path, run: Run) -> None:
    args = ("bench", "bench_zoo:mlp", "--batch", "2,4", "--set", "width=16", *FAST)
    done = run(*args, "-o", "rows.jsonl", "--report", "--benchmark-json", "saved.json")
    assert done.exit_code == 0, done.output
    found = rows(place / "rows.jsonl")
    assert [row["inputs"] for row in found] == [["float32 [2, 16]"], ["float32 [4, 16]"]]
    assert [row["sizes"] for row in found] == [{"batch": 2, "width": 16}, {"batch": 4, "width": 16}]
    for row in found:
        assert row["format"] == "graphopt-bench"
        assert row["optimize"]["artifact_bytes"] > 1000
        assert ("load_s" in row["optimize"]) != ("load_left_out" in row["optimize"])
        assert row["commands"]["eager"].startswith("graphopt bench bench_zoo:mlp --against eager --batch ")
        assert f"{row['case']}: " in done.stderr
        assert row["case"] in done.stdout
    assert "geometric mean" in done.stdout
    assert "Latency against batch" in (place / "rows.html").read_text()
    assert len(json.loads((place / "saved.json").read_text())["benchmarks"]) == 4
    again = run("bench", "--report", "rows.jsonl", "-o", "page.html", "--json")
    assert again.exit_code == 0, again.output
    assert [json.loads(line) for line in again.stdout.splitlines()] == found
    assert (place / "page.html").is_file()


def test_the_command_in_a_row_measures_the_same_case(place: Path, run: Run) -> None:
    first = run("bench", "bench_zoo:mlp", "--batch", "3", "--dtype", "bf16", *FAST, "--json")
    row = json.loads(first.stdout)
    assert row["dtype"] == "bfloat16"
    again = run(*row["commands"]["eager"].split()[1:], "--json")
    assert again.exit_code == 0, again.output
    same = ("case", "spec", "sizes", "dtype", "inputs", "seed")
    assert {key: json.loads(again.stdout)[key] for key in same} == {key: row[key] for key in same}


def test_a_hugging_face_directory_with_ragged_batches(place: Path, run: Run) -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=30, **sizes)).save_pretrained(place / "bert")
    done = run("bench", "bert", "--batch", "4", "--seq", "32", "--lengths", "real", *FAST, "--json")
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    assert row["inputs"] == ["int64 [4, 32]"] * 2
    assert max(row["lengths"]["values"]) == 32
    assert 0 < row["lengths"]["fill"] < 1


def test_a_case_that_fails_does_not_take_the_others_with_it(place: Path, run: Run) -> None:
    done = run("bench", "bench_zoo:small", "--batch", "2,8", *FAST, "-o", "rows.jsonl")
    assert done.exit_code == 1, done.output
    right, wrong = rows(place / "rows.jsonl")
    assert "failed" not in right
    assert "a batch of 8 does not fit" in wrong["failed"]["message"]
    assert wrong["failed"]["where"].endswith("bench_zoo.py:30")
    assert "not measured: bench_zoo:small raises: RuntimeError: a batch of 8 does not fit" in done.stdout
    report = run("bench", "--report", "rows.jsonl")
    assert report.exit_code == 0
    assert "does not fit" in (place / "bench.html").read_text()


def test_a_peer_that_dies_is_marked_and_the_case_goes_on(place: Path, run: Run) -> None:
    done = run("bench", "bench_zoo:deadly", *FAST[:-1], "onnxruntime,eager", "--json")
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    sides = {side["peer"]: side for side in row["sides"]}
    assert sides["onnxruntime"]["failed"] == "the process died by SIGABRT"
    assert set(row["ratio"]) == {"eager"}


def test_peers_that_are_not_there_are_listed_with_the_install_line(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("bench", "bench_zoo:mlp", *FAST[:-1], "eager,tensorrt")
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert "tensorrt: needs a CUDA GPU; pip install torch-tensorrt" in said


def interrupted(process: subprocess.Popen[str], wait: Callable[[], bool]) -> tuple[str, str]:
    deadline = time.monotonic() + 240
    while not wait():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=120)


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [*found, *(deeper for child in found for deeper in descendants(child))]


def test_ctrl_c_keeps_the_cases_that_were_measured(
    place: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    output = place / "rows.jsonl"
    process = start("bench", "bench_zoo:mlp", "--batch", "1,2,3,4,5", *FAST, "-o", "rows.jsonl", "--report")
    _, said = interrupted(process, lambda: output.exists() and len(output.read_text().splitlines()) >= 1)
    assert process.returncode == 130, said
    found = rows(output)
    assert 1 <= len(found) < 5
    assert all("ratio" in row for row in found)
    assert f"interrupted: {len(found)} of 5 cases measured; the rows are in rows.jsonl" in said
    assert "Traceback" not in said
    assert (place / "rows.html").is_file()


def test_ctrl_c_while_a_case_ends_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process was done by then, and has a whole row."""
    cases = [Case("bench_zoo:mlp", {"batch": batch}) for batch in (1, 2)]
    row = failed_row(cases[0], Setting(()), {"message": "whatever", "code": 4})

    def measure(*_: object, **__: object) -> None:
        raise _cases.Interrupted(row)

    monkeypatch.setattr(_cases, "measure", measure)
    ran = run_cases(cases, Setting(()), None, quiet=True)
    assert (ran.rows, ran.interrupted, ran.exit_code) == ([row], True, 130)


def test_ctrl_c_in_the_rounds_keeps_the_complete_ones(
    place: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    output = place / "rows.jsonl"
    arguments = ("--rounds", "100000", "--seconds", "100000", "--threads", "1", "--against", "eager")
    process = start("bench", "bench_zoo:counted", *arguments, "-o", "rows.jsonl")
    calls, children = place / "calls", list[int]()

    def measuring() -> bool:
        children[:] = descendants(process.pid) or children
        return calls.exists() and calls.stat().st_size > 50_000  # of eager; a round makes 10,000 at most

    _, said = interrupted(process, measuring)
    assert process.returncode == 130, said
    (row,) = rows(output)
    assert row["interrupted"]
    assert 3 <= row["rounds_done"] < 100000
    assert len(row["sides"][0]["times_ms"]) == 2 * row["rounds_done"]
    assert children
    assert not [child for child in children if os.path.exists(f"/proc/{child}")]  # noqa: PTH110


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "no SPEC was given"),
        (("--report",), "no file of rows was given"),
        (("--report", "missing.jsonl"), "missing.jsonl cannot be read"),
        (("--report", "foreign.jsonl"), "no row of graphopt bench"),
        (("foreign.jsonl",), "foreign.jsonl is no SPEC"),
        (("--report", "rows.jsonl", "bench_zoo:mlp"), "mixed"),
        (("bench_zoo:mlp", "--against", ","), "names no peer"),
        (("bench_zoo:mlp", "--against", "eager,inducter"), "did you mean inductor"),
        (("bench_zoo:mlp", "--batch", "1,x"), "'1,x' is no list of sizes"),
        (("bench_zoo:mlp", "--batch", "0"), "numbers above 0"),
        (("bench_zoo:mlp", "--batch", "2", "--set", "batch=3"), "batch is given twice"),
        (("bench_zoo:mlp", "--set", "width"), "NAME=N,N"),
        (("bench_zoo:mlp", "--dtype", "int3"), "unknown dtype 'int3'"),
        (("bench_zoo:mlp", "--device", "tpu"), "unknown target 'tpu'"),
        (("bench_zoo:mlp", "--device", "cuda:9"), "needs CUDA device 9"),
        (("bench_zoo:mlp", "-o", "nowhere/rows.jsonl"), "nowhere does not exist"),
        (("bench_zoo:mlp", "-o", "foreign.jsonl"), "no row of graphopt bench"),
        (("bench_zoo:mlp", "--benchmark-json", "nowhere/x.json"), "nowhere does not exist"),
    ],
)
def test_wrong_use_is_told_before_anything_is_measured(
    place: Path, run: Run, args: tuple[str, ...], words: str
) -> None:
    if "cuda:9" in args and torch.cuda.device_count() > 9:
        pytest.skip("there is such a device")
    (place / "foreign.jsonl").write_text("{}\n")
    before = sorted(path.name for path in place.iterdir())
    done = run("bench", *args)
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in place.iterdir()) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("bench_zoo:mpl",), "did you mean bench_zoo:mlp"),
        (("bench_zoo:deadly", "--batch", "2"), "bench_zoo:deadly takes no batch"),
        (("bench_zoo:mlp", "--lengths", "real"), "--lengths real needs an input attention_mask"),
    ],
)
def test_when_no_case_can_be_measured(place: Path, run: Run, args: tuple[str, ...], words: str) -> None:
    done = run("bench", *args, *FAST, "-o", "rows.jsonl")
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    (row,) = rows(place / "rows.jsonl")
    assert words in row["failed"]["message"] + row["failed"].get("hint", "")


def test_a_disk_that_is_full(place: Path, run: Run) -> None:
    done = run("bench", "bench_zoo:mlp", *FAST, "-o", "/dev/full")
    assert done.exit_code == 2, done.output
    assert "cannot write full" in done.stderr


def test_a_terminal_shows_how_far_it_is_and_what_is_left(place: Path) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "bench", "bench_zoo:mlp", *FAST],
        stdout=subprocess.PIPE,
        stderr=follower,
        text=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "160"},
    )
    os.close(follower)
    said = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(leader, 4096):
            said += part
    os.close(leader)
    tables, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", said.decode())
    assert re.search(r"1/1 bench_zoo:mlp: \w+", text)  # a stage may pass before it is drawn
    assert re.search(r"0:00:\d\d left (0:00:\d\d|-:--:--)", text)
    assert "geometric mean" in tables
