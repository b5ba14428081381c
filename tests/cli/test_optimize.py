from __future__ import annotations

import hashlib
import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import graphopt
from graphopt.compiler.compare import compare
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS

Run = Callable[..., Any]
Start = Callable[..., subprocess.Popen[str]]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_user_gets_a_whole_folder_and_json_alone_on_stdout(workspace: Path, start: Start) -> None:
    before = names(workspace)
    process = start("optimize", "zoo:block", "-o", "out", "--effort", "fast", "--executors", "ort", "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert names(workspace) - before == {"out"}
    report = json.loads(out)
    assert report["model"] == "Block"
    assert [row["executor"] for row in report["candidates"] if row["chosen"]] == ["ort"]
    assert "the factory speaks" in err
    assert "region0.onnx" in err
    folder = workspace / "out"
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert "region0" in (folder / "plan.txt").read_text()
    check_manifest(folder)
    check_onnx(folder)


def check_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["schema"]) == ("graphopt-folder", 1)
    assert manifest["spec"] == {"given": "zoo:block", "kind": "factory", "notes": []}
    assert manifest["versions"]["torch"] == version("torch")
    files = manifest["files"]
    assert set(files) == names(folder) - {"manifest.json"}
    assert {"report.html", "report.json", "plan.txt", "region0.onnx", "region0.data"} == set(files)
    for name, known in files.items():
        content = (folder / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == known["sha256"], name
        assert len(content) == known["bytes"], name


def check_onnx(folder: Path) -> None:
    """Plain ONNX Runtime gives the original's answer, by the names that the manifest tells."""
    (region,) = json.loads((folder / "manifest.json").read_text())["regions"]
    path = folder / region["onnx"]
    onnx.checker.check_model(path)
    sys.path.insert(0, str(folder.parent))
    zoo = importlib.import_module("zoo")
    model, (x,) = zoo.block()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == region["onnx_inputs"] == region["reads"] == ["x"]
    (after,) = session.run(region["onnx_outputs"], {region["reads"][0]: x.numpy()})
    with torch.no_grad():
        before, reference = model(x), model.double()(x.double())
    verdict = compare([before], [torch.from_numpy(after)], [reference], MODEL_FLOOR_ULPS)
    assert verdict.ok, verdict.reason
    assert not np.array_equal(after, np.zeros_like(after))


def test_an_interrupt_ends_with_130_and_leaves_nothing(workspace: Path, start: Start) -> None:
    before = names(workspace)
    process = start("optimize", "zoo:sleeps", "-o", "out")
    assert process.stderr is not None
    assert process.stderr.readline() == "sleeping\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == ("", "error: interrupted: nothing was written\n")
    assert names(workspace) == before


def test_an_interrupt_while_writing_leaves_nothing(
    workspace: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(workspace)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(graphopt.Report, "to_json", interrupted)
    result = run("optimize", "zoo:block", "-o", "out", "--effort", "fast")
    assert result.exit_code == 130
    assert names(workspace) == before


def test_without_a_folder_the_tables_are_printed(workspace: Path, run: Run) -> None:
    before = names(workspace)
    result = run(
        "optimize", "zoo:keywords", "--effort", "fast", "--dynamic", "x:0=batch", "--executors", "eager"
    )
    assert result.exit_code == 0, result.stderr
    assert "Block runs on eager" in result.stdout
    assert "graphopt.linear_activation" in result.stdout
    assert result.stderr == ""
    assert names(workspace) == before


def test_calibration_inputs_come_from_a_function(workspace: Path, run: Run) -> None:
    args = ("optimize", "zoo:block", "--effort", "fast", "--precision", "int8-static", "--calibration")
    result = run(*args, "zoo:nothing")
    assert result.exit_code == 2
    assert "zoo has no 'nothing'" in result.stderr
    result = run(*args, "zoo:block")  # a model and its inputs are no calls
    assert result.exit_code == 2
    assert "calibration input 0" in result.stderr


def test_quiet_prints_nothing_and_pytorch_regions_are_said(workspace: Path, run: Run) -> None:
    args = ("optimize", "zoo:block", "-o", "out", "--effort", "fast", "--executors", "eager")
    result = run(*args, "--disable", "fuse_linear_activation", "-q")
    assert (result.exit_code, result.stdout) == (0, "")
    report = json.loads((workspace / "out" / "report.json").read_text())
    assert "graphopt.linear_activation" not in report["ops"]["after"]
    assert report["ops"]["before"] != report["ops"]["after"]
    manifest = json.loads((workspace / "out" / "manifest.json").read_text())
    assert [row["onnx"] for row in manifest["regions"]] == [None]
    again = run(*args, "--force", "--level", "0")
    assert again.exit_code == 0, again.stderr
    assert "stays in PyTorch (eager)" in again.stdout
    report = json.loads((workspace / "out" / "report.json").read_text())
    assert report["ops"]["before"] == report["ops"]["after"]
    assert names(workspace) == {"zoo.py", "unsound.py", "garbled.py", "out"}


@pytest.mark.parametrize(
    ("manifest", "refusal"),
    [
        (None, "it has no manifest.json of graphopt's"),
        ("{", "it has no manifest.json of graphopt's"),
        ('{"files": {}}', "it has no manifest.json of graphopt's"),
        ('{"format": "graphopt-folder", "files": {}}', "it holds thesis.txt, which graphopt did not write"),
    ],
)
def test_force_replaces_only_what_graphopt_wrote(
    workspace: Path, run: Run, manifest: str | None, refusal: str
) -> None:
    out = workspace / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    if manifest is not None:
        (out / "manifest.json").write_text(manifest)
    (workspace / "link").symlink_to(out)
    for place, why in (("out", refusal), ("link", "it is no folder")):
        result = run("optimize", "zoo:block", "-o", place, "--force")
        assert result.exit_code == 2
        assert why in result.stderr
    assert (out / "thesis.txt").read_text() == "years of work"


def test_insisting_on_an_executor_that_cannot_is_a_no(workspace: Path, run: Run) -> None:
    result = run("optimize", "zoo:airy", "--executors", "ort", "-o", "out")
    assert result.exit_code == 1, result.stderr
    assert "airy" in result.stderr
    assert not (workspace / "out").exists()


def test_a_fault_of_graphopt_is_one_line_and_a_way_out(
    workspace: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def boom(*_: object, **__: object) -> None:
        raise RuntimeError("a register is on fire\nsecond line")

    monkeypatch.setattr(importlib.import_module("graphopt.optimize"), "optimize", boom)
    result = run("optimize", "zoo:block", "-o", "out")
    assert result.exit_code == 4
    assert result.stderr == (
        "the factory speaks\n"
        "error: graphopt failed: RuntimeError: a register is on fire\n"
        "  try: run again with --debug, and report the traceback\n"
    )
    assert not (workspace / "out").exists()
    result = run("optimize", "zoo:block", "--debug")
    assert result.exit_code == 4
    assert "Traceback" in result.stderr
    assert "in boom" in result.stderr


def test_a_full_disk_is_an_error_of_the_output(
    workspace: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(workspace)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_ir.save", full)
    result = run("optimize", "zoo:block", "-o", "out", "--effort", "fast", "--executors", "ort")
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert names(workspace) == before


def test_help_says_what_matters(run: Run) -> None:
    top = " ".join(run("--help").stdout.split())
    for said in (
        "optimize",
        "package.module:factory",
        "Hugging Face",
        ".pt2",
        "0 good",
        "4 a fault of graphopt",
    ):
        assert said in top
    command = " ".join(run("optimize", "--help").stdout.split())
    options = (
        "--output --target --executors --dynamic --level --enable --disable --effort --json --quiet --debug"
    )
    for said in (
        *options.split(),
        "report.html",
        "manifest.json",
        "name only what you trust",
        "130 interrupted",
    ):
        assert said in command
    assert run("--version").stdout.startswith("graphopt 0.")
    assert run().exit_code == 2


def test_the_whole_model_is_written_as_onnx(workspace: Path, run: Run) -> None:
    fast = ("--executors", "eager", "--effort", "fast")
    done = run("optimize", "zoo:block", "--export-onnx", "block.onnx", "--portable", *fast)
    assert done.exit_code == 0, done.output
    assert "wrote block.onnx" in done.output
    onnx.checker.check_model(workspace / "block.onnx", full_check=True)
    model = onnx.load(workspace / "block.onnx")
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["x", "output"]
    assert {node.domain for node in model.graph.node} == {""}


def test_a_place_for_the_model_is_looked_at_first(workspace: Path, run: Run) -> None:
    before = names(workspace)
    for arguments, message in (
        (("--portable",), "none is written"),
        (("--export-onnx", "."), "is a folder"),
        (("--export-onnx", "missing/block.onnx"), "does not exist"),
    ):
        done = run("optimize", "zoo:raises", *arguments)
        assert done.exit_code == 2
        assert message in done.output
    assert names(workspace) == before
