"""Exports that are ended in the middle, and one of more than protobuf holds, in processes as users have."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from graphopt.runtime import onnx_file

CHILD = """
import sys
import time
from pathlib import Path

from graphopt.runtime import onnx_file
from tests.runtime.test_onnx_interrupted import lookup

chunks = onnx_file._chunks


def slow(tensor):
    for chunk in chunks(tensor):
        yield chunk
        print("writing", flush=True)
        time.sleep(60)


onnx_file._chunks = slow
onnx_file.save(lookup(sys.argv[1], 2.0), Path(sys.argv[1]), external_above=int(sys.argv[2]))
"""
ROWS, WIDTH = 64, 32
IDS = np.array([0, ROWS - 1])


def lookup(path: str, value: float, rows: int = ROWS) -> ir.Model:
    """A model that looks rows up in a table whose last row holds one value, the others zeros."""
    table = np.lib.format.open_memmap(
        f"{path}.table", mode="w+", dtype=np.float32, shape=(rows, WIDTH)
    )  # a hole in a file: what is never written takes no room
    table[-1] = value
    weight = ir.Value(name="table", const_value=ir.tensor(table, name="table"))
    weight.shape, weight.dtype = ir.Shape(table.shape), ir.DataType.FLOAT
    ids = ir.val("ids", ir.DataType.INT64, [None])
    node = ir.node("Gather", [weight, ids])
    node.outputs[0].name, node.outputs[0].dtype = "out", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape([None, WIDTH])
    graph = ir.Graph(
        [ids], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 23}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def answer(path: Path, ids: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"ids": ids})
    return np.asarray(found)


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize("external_above", [0, onnx_file.LARGEST], ids=["weights beside", "one file"])
@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_a_process_that_is_ended_while_exporting_leaves_the_old_model(
    how: str, external_above: int, tmp_path: Path
) -> None:
    """Interrupted, it takes its draft away; killed, it cannot, but what has the model's name is whole."""
    path = tmp_path / "model.onnx"
    onnx_file.save(lookup(str(path), 1.0), path, external_above)
    before = {file.name for file in tmp_path.iterdir()}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), str(external_above)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n", child.communicate()[1]
        child.send_signal(getattr(signal, how))
        assert child.wait(60) != 0
    finally:
        child.kill()
        child.communicate()
    left = {file.name for file in tmp_path.iterdir()} - before
    assert not left if how == "SIGINT" else all(name.startswith(".") for name in left)
    onnx.checker.check_model(path)
    np.testing.assert_array_equal(answer(path, IDS)[1], np.ones(WIDTH))


@pytest.mark.slow
def test_a_model_above_2_gb_is_written_and_runs(tmp_path: Path) -> None:
    """Nobody has to ask for a file beside it: protobuf cannot hold it, and that is seen beforehand."""
    rows, path = 2**31 // (4 * WIDTH) + 100, tmp_path / "model.onnx"
    onnx_file.save(lookup(str(path), 3.0, rows), path)
    (weights,) = tmp_path.glob("model.onnx.*.data")
    assert weights.stat().st_size >= 2**31
    assert path.stat().st_size < 2**12
    onnx.checker.check_model(path)
    found = answer(path, np.array([0, rows - 1]))
    np.testing.assert_array_equal(found, np.stack([np.zeros(WIDTH), np.full(WIDTH, 3.0)]))
