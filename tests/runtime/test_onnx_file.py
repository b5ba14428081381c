"""Writing ONNX models: whole or not at all, and without copying the weights."""

from __future__ import annotations

import itertools
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import graphopt
from graphopt.errors import OutputError
from graphopt.runtime import onnx_file
from graphopt.runtime.onnx_file import save
from tests._models import randn, randomised

X = randn(3, 40)


def optimized(seed: int = 0) -> graphopt.OptimizedModel:
    model = randomised(nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 30)), seed)
    return graphopt.optimize(model, (X,), executors=("eager",), effort="fast")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def answers(path: Path, opt: graphopt.OptimizedModel) -> bool:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    return np.allclose(result, opt(X).numpy(), rtol=1e-5, atol=1e-6)


def a_model() -> tuple[ir.Model, dict[str, np.ndarray[Any, Any]]]:
    """Every kind of weight: narrow types, parts of bytes, no elements, another order, small ones."""
    draw = np.random.default_rng(0)
    arrays = {
        "float": draw.standard_normal((40, 50)).astype(np.float32),
        "transposed": draw.standard_normal((40, 50)).astype(np.float32).T,
        "brain": draw.standard_normal(2000).astype(ml_dtypes.bfloat16),
        "nibbles": draw.integers(-8, 8, 4001).astype(ml_dtypes.int4),
        "ids": draw.integers(0, 9, (300,)),
        "flags": draw.integers(0, 2, (5, 1000)).astype(np.bool_),
        "empty": np.zeros((0, 5000), np.float32),
        "scalar": np.float32(0.5),
    }
    values = [
        ir.Value(name=name, const_value=ir.tensor(np.asarray(x), name=name)) for name, x in arrays.items()
    ]
    for value in values:
        assert value.const_value is not None
        value.shape, value.dtype = ir.Shape(value.const_value.shape.numpy()), value.const_value.dtype
    node = ir.node("Identity", values[:1])
    node.outputs[0].name = "out"
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape((40, 50))
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10), arrays


@pytest.mark.parametrize("external_above", [onnx_file.LARGEST, 0], ids=["one file", "weights beside"])
def test_every_kind_of_weight_comes_back(external_above: int, tmp_path: Path) -> None:
    model, arrays = a_model()
    save(model, tmp_path / "m.onnx", external_above)
    assert len(list(tmp_path.iterdir())) == (2 if external_above == 0 else 1)
    onnx.checker.check_model(tmp_path / "m.onnx")
    read = onnx.load(tmp_path / "m.onnx")
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in read.graph.initializer}
    assert found.keys() == arrays.keys() == model.graph.initializers.keys()
    for name, expected in arrays.items():
        assert found[name].dtype == np.asarray(expected).dtype, name
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_what_is_streamed_is_what_protobuf_writes(tmp_path: Path) -> None:
    model, _ = a_model()
    save(model, tmp_path / "m.onnx")
    whole = ir.to_proto(model)
    read = onnx.load(tmp_path / "m.onnx")
    assert {t.name: t for t in read.graph.initializer} == {t.name: t for t in whole.graph.initializer}
    for message in (read, whole):
        del message.graph.initializer[:], message.graph.value_info[:]  # repeats what the weights say
    assert read == whole


def test_weights_go_beside_a_model_that_is_larger_than_allowed(tmp_path: Path) -> None:
    opt, path = optimized(), tmp_path / "model.onnx"
    opt.export_onnx(path)
    size = path.stat().st_size
    opt.export_onnx(path, external_above=size)
    assert content(tmp_path).keys() == {"model.onnx"}
    opt.export_onnx(path, external_above=size - 1)
    beside, name = sorted(content(tmp_path), key=len, reverse=True)
    assert name == "model.onnx"
    assert re.fullmatch(r"model\.onnx\.[0-9a-f]{16}\.data", beside)
    onnx.checker.check_model(path)
    assert answers(path, opt)


def test_a_new_export_takes_the_old_weights_away_and_nobody_elses(tmp_path: Path) -> None:
    path, other = tmp_path / "model.onnx", optimized(2)
    strange = tmp_path / "model.onnx.0123456789abcdef.data"
    strange.write_text("of some other model")
    optimized(1).export_onnx(path, external_above=0)
    (first,) = content(tmp_path).keys() - {path.name, strange.name}
    other.export_onnx(path, external_above=0)
    (second,) = content(tmp_path).keys() - {path.name, strange.name}
    assert first != second
    assert answers(path, other)
    other.export_onnx(path, external_above=0)
    assert content(tmp_path).keys() == {path.name, strange.name, second}
    other.export_onnx(path)
    assert content(tmp_path).keys() == {path.name, strange.name}
    assert answers(path, other)


class Broken:
    """Lets some chunks of weights through, then fails."""

    def __init__(self, error: BaseException, after: int) -> None:
        self.error, self.left, self.real = error, after, onnx_file._chunks

    def __call__(self, tensor: Any) -> Iterator[memoryview]:
        for chunk in self.real(tensor):
            self.left -= 1
            if self.left < 0:
                raise self.error
            yield chunk


FAILURES = [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()]


@pytest.mark.parametrize(
    "former", [None, 0, onnx_file.LARGEST], ids=["first", "replacing two", "replacing one"]
)
@pytest.mark.parametrize("external_above", [0, onnx_file.LARGEST], ids=["weights beside", "one file"])
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failure_leaves_what_was_there(
    error: BaseException,
    external_above: int,
    former: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new, path = optimized(1), optimized(2), tmp_path / "model.onnx"
    if former is not None:
        old.export_onnx(path, external_above=former)
    before = content(tmp_path)
    expected = OutputError if isinstance(error, OSError) else type(error)
    for after in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(onnx_file, "_chunks", Broken(error, after))
            with pytest.raises(expected):
                new.export_onnx(path, external_above=external_above)
        assert content(tmp_path) == before


@pytest.mark.parametrize("external_above", [0, onnx_file.LARGEST], ids=["weights beside", "one file"])
def test_the_last_act_may_fail(external_above: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "model.onnx", Path.replace
    optimized(1).export_onnx(path, external_above=0)
    before = content(tmp_path)

    def replace(self: Path, target: Path) -> Path:
        if target == path:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        optimized(2).export_onnx(path, external_above=external_above)
    assert content(tmp_path) == before


@pytest.mark.parametrize("external_above", [2**31 - 1, 4096])
def test_a_file_is_on_the_disk_before_it_gets_its_name(
    external_above: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[int, int] = {}
    renamed: list[tuple[int, int]] = []
    real_sync, real_replace = os.fsync, Path.replace

    def fsync(file: Any) -> None:
        found = os.fstat(file.fileno())
        synced[found.st_ino] = found.st_size
        real_sync(file)

    def replace(self: Path, target: Path) -> Path:
        found = self.stat()
        renamed.append((found.st_ino, found.st_size))
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    optimized().export_onnx(tmp_path / "model.onnx", external_above=external_above)
    assert len(renamed) == len(content(tmp_path))
    assert all(synced[inode] == size for inode, size in renamed)


def test_the_system_refuses_the_size(tmp_path: Path) -> None:
    opt, path = optimized(), tmp_path / "model.onnx"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(OutputError, match="File too large"):
            opt.export_onnx(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not content(tmp_path)


def test_places_that_cannot_be_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = optimized()
    with pytest.raises(OutputError, match="is a folder"):
        opt.export_onnx(tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        opt.export_onnx(tmp_path / "missing" / "model.onnx")
    with pytest.raises(OutputError, match="is not a file"):
        opt.export_onnx("/dev/null")
    real = Path.open

    def denied(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "wb":
            raise PermissionError(13, "Permission denied")
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)  # the superuser is never refused
    with pytest.raises(OutputError, match="Permission denied"):
        opt.export_onnx(tmp_path / "model.onnx")
    assert not content(tmp_path)


MEMORY = """
import re, sys
import torch
import graphopt

torch.set_num_threads(1)
model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048) for _ in range(9))).eval()
weights = sum(p.nbytes for p in model.parameters())
x = torch.randn(1, 2048)
opt = graphopt.optimize(model, (x,), executors=("eager",), effort="fast", level=0)
opt.export_onnx("warm.onnx", external_above=0)  # what the first export imports is not the weights'


def kib(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])


for above in (2**31 - 1, 0):
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark falls to what is in use
    before = kib("VmRSS")
    opt.export_onnx("model.onnx", external_above=above)
    print((kib("VmHWM") - before) * 1024 / weights)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_not_copied_on_the_way(tmp_path: Path) -> None:
    """Of 151 MB in 9 weights, two at once at most; a serialised model would be all of them, twice."""
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    one_file, beside = map(float, ran.stdout.split())
    assert one_file <= 0.22
    assert beside <= 0.22


def test_lengths_are_written_as_protobuf_does() -> None:
    for size in itertools.chain(range(300), (2**14 - 1, 2**14, 2**21, 2**31 - 1)):
        written = onnx_file._length(onnx_file._RAW_DATA, size)
        assert written[0] == 0x4A
        assert sum((byte & 127) << 7 * place for place, byte in enumerate(written[1:])) == size
        assert all(byte & 128 for byte in written[1:-1])
        assert not written[-1] & 128
    assert onnx.TensorProto(raw_data=b"x" * 200).SerializeToString()[:3] == onnx_file._length(0x4A, 200)


def test_torch_is_not_needed_to_have_its_weights_on_the_cpu(tmp_path: Path) -> None:
    """A tensor that lies elsewhere, or in another order, is fetched when its turn comes."""
    strided = torch.arange(4000.0).reshape(40, 100)[:, ::2]
    value = ir.Value(name="w", const_value=ir.tensor(strided, name="w"))
    value.shape, value.dtype = ir.Shape((40, 50)), ir.DataType.FLOAT
    node = ir.node("Identity", [value])
    node.outputs[0].name, node.outputs[0].dtype = "out", ir.DataType.FLOAT
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 23}, name="g")
    save(ir.Model(graph, ir_version=10), tmp_path / "m.onnx")
    (tensor,) = onnx.load(tmp_path / "m.onnx").graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), strided.numpy())
