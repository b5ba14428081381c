"""Sessions: whose memory they read, what they leave behind, and what becomes of one that fails."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

import graphopt
from graphopt.capture.export import capture_any
from graphopt.errors import ExecutionError, LoweringError
from graphopt.runtime.executors.ort import OrtProgram, weights
from graphopt.runtime.executors.ort.providers import CPU, Provider
from graphopt.runtime.lower_onnx import to_onnx
from graphopt.runtime.region import Region, extract
from tests._models import MLP, randn, randomised

X = randn(4, 32)


class Wide(nn.Module):
    """A product whose weight is large enough to be kept out of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


class Lookup(nn.Module):
    """A table, and what is looked up in it."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table)
        self.eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 2 * self.table(ids)


def region_of(model: nn.Module, *args: torch.Tensor) -> Region:
    graph, _ = capture_any(model, args, None)
    return extract(graph, graph.calls, "region0")


def program_of(model: nn.Module, *args: torch.Tensor) -> OrtProgram:
    region = region_of(model, *args)
    return OrtProgram(region, to_onnx(region.graph), Provider(CPU))


def held(program: OrtProgram) -> dict[str, weights.Held]:
    return program._session._weights.shared


# Weights


def test_a_session_reads_the_models_own_memory() -> None:
    model = randomised(Wide())
    program = program_of(model, X)
    (weight,) = held(program).values()
    assert weight.value.data_ptr() == model.linear.weight.data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(program.run([X])[0], model(X), rtol=1e-5, atol=1e-6)


def test_sessions_share_what_had_to_be_written_out() -> None:
    """A weight with strides of its own is copied once, for all sessions, and gone with the last."""
    model = randomised(Wide())
    model.linear.weight = nn.Parameter(randn(128, 64)[:, ::2])
    region = region_of(model, X)
    lowered = to_onnx(region.graph)
    one, other = (OrtProgram(region, lowered, Provider(CPU)) for _ in range(2))
    (first,), (second,) = held(one).values(), held(other).values()
    assert first is second
    assert first.value.data_ptr() != model.linear.weight.data_ptr()
    for program in (one, other):
        torch.testing.assert_close(program.run([X])[0], model(X).detach(), rtol=1e-5, atol=1e-6)
    memory = weakref.ref(first)
    del one, other, program, first, second
    gc.collect()
    assert memory() is None


def test_weights_outlive_the_model_that_they_came_from() -> None:
    model = randomised(Wide())
    with torch.no_grad():
        wanted = model(X)
    opt = graphopt.optimize(model, (X,), executors=("ort",), effort="fast")
    del model
    gc.collect()
    torch.testing.assert_close(opt(X), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a file system with holes")
def test_a_table_above_2_gb_needs_neither_protobuf_nor_a_copy(tmp_path: Path) -> None:
    """The table is a hole in a file: only the rows that are looked up exist."""
    rows, width = 9_000_000, 64
    assert 4 * rows * width > 2**31
    with (tmp_path / "table").open("wb") as hole:
        hole.truncate(4 * rows * width)
    table = torch.from_file(str(tmp_path / "table"), shared=True, size=rows * width).view(rows, width)
    table[rows - 1] = randn(width)
    ids = torch.tensor([0, rows - 1])
    program = program_of(Lookup(table), ids)
    (weight,) = held(program).values()
    assert weight.value.data_ptr() == table.data_ptr()
    torch.testing.assert_close(program.run([ids])[0], 2 * table[ids])


def test_a_graph_that_is_itself_above_the_limit_is_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    region = region_of(randomised(Wide()), X)
    lowered = to_onnx(region.graph)
    before = {name: value.const_value for name, value in lowered.graph.initializers.items()}
    monkeypatch.setattr(weights, "_MAX_FILE_BYTES", 100)
    with pytest.raises(LoweringError, match=r"above protobuf's 2 GB"):
        OrtProgram(region, lowered, Provider(CPU))
    assert {name: value.const_value for name, value in lowered.graph.initializers.items()} == before


def test_only_what_nothing_but_a_kernel_reads_is_shared() -> None:
    class Both(Wide):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + (self.linear.weight * x[0]).sum()

    region = region_of(randomised(Both()), X)
    lowered = to_onnx(region.graph)
    large = {name for name, _, _ in weights.large(lowered)}
    assert len(large) == 1
    assert weights.shareable(lowered) == set()
    assert weights.shareable(to_onnx(region_of(randomised(Wide()), X).graph)) == large


# What is left behind


def temporary() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("graphopt-*"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, which is this test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_no_file_is_left_once_the_first_runs_are_recorded(folder: Path) -> None:
    program = program_of(randomised(MLP()), randn(4, 8))
    assert len(temporary()) == 1
    program.profile([randn(4, 8)])
    assert not list(folder.iterdir())
    program.run([randn(4, 8)])


def test_a_program_that_is_dropped_leaves_no_file(folder: Path) -> None:
    program = program_of(randomised(MLP()), randn(4, 8))
    assert len(temporary()) == 1
    del program
    gc.collect()
    assert not list(folder.iterdir())


def test_a_model_that_is_refused_leaves_no_file(folder: Path) -> None:
    region = region_of(randomised(MLP()), randn(4, 8))
    lowered = to_onnx(region.graph)
    next(iter(lowered.graph)).op_type = "NoSuchOp"
    with pytest.raises(LoweringError, match=r"ONNX Runtime refuses the region: .*NoSuchOp"):
        OrtProgram(region, lowered, Provider(CPU))
    gc.collect()
    assert not list(folder.iterdir())


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs a list of the process's threads")
def test_threads_go_with_the_session() -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))  # noqa: PTH208

    options = graphopt.OrtOptions(intra_op_threads=4)
    region = region_of(randomised(MLP()), randn(4, 8))
    lowered = to_onnx(region.graph)
    OrtProgram(region, lowered, Provider(CPU), options).run([randn(4, 8)])
    gc.collect()
    before = threads()
    programs = [OrtProgram(region, lowered, Provider(CPU), options) for _ in range(3)]
    assert threads() >= before + 9
    programs.clear()
    gc.collect()
    assert threads() <= before


# Failures


def test_a_node_that_fails_in_the_middle_is_a_named_error_and_the_next_call_is_right() -> None:
    table = randn(50, 16)
    ids = torch.tensor([[0, 7]])
    opt = graphopt.optimize(Lookup(table), (ids,), executors=("ort",), effort="fast")
    with pytest.raises(
        ExecutionError, match=r"failed in the middle of a run on CPUExecutionProvider.*Gather"
    ):
        opt(torch.tensor([[0, 50]]))
    torch.testing.assert_close(opt(ids), 2 * table[ids])


def test_a_tensor_that_cannot_be_bound_is_a_named_error() -> None:
    program = program_of(randomised(MLP()), randn(4, 8))
    with pytest.raises(ExecutionError, match="cannot bind a tensor"):
        program.run([torch.randn(4, 8, dtype=torch.complex64)])
    with pytest.raises(ExecutionError, match="failed in the middle of a run"):
        program.run([torch.zeros(4, 8, dtype=torch.int64)])


# Tensors in and out


class Mixed(nn.Module):
    """Values of three types, two of them of dynamic size."""

    def forward(
        self, x: torch.Tensor, i: torch.Tensor, m: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return 2 * x + i, m & (x > 0), i + 1


def mixed(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return randn(6, batch).t(), torch.arange(6), torch.ones(batch, 6, dtype=torch.bool)


@pytest.fixture(scope="module")
def optimized() -> Any:
    dims = {"x": {0: "batch"}, "m": {0: "batch"}}
    return graphopt.optimize(Mixed().eval(), mixed(4), dynamic=dims, executors=("ort",), effort="fast")


@pytest.mark.parametrize("batch", [0, 1, 4, 9])
def test_strides_types_and_sizes_go_in_and_out(optimized: Any, batch: int) -> None:
    inputs = mixed(batch)
    for got, wanted in zip(optimized(*inputs), Mixed()(*inputs), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_tensor_that_is_read_negated_goes_in_as_what_it_means() -> None:
    x = torch.view_as_complex(randn(4, 8, 2)).conj().imag
    assert x.is_neg()
    program = program_of(randomised(MLP()), randn(4, 8))
    torch.testing.assert_close(program.run([x])[0], randomised(MLP())(x).detach())


def test_on_the_cpu_the_host_reads_what_is_bound() -> None:
    assert program_of(randomised(MLP()), randn(4, 8))._session.reads_on_host


def test_outputs_of_dynamic_size_are_taken_over_and_outlive_their_session() -> None:
    dims = {"x": {0: "batch"}, "m": {0: "batch"}}
    opt = graphopt.optimize(Mixed().eval(), mixed(4), dynamic=dims, executors=("ort",), effort="fast")
    inputs = mixed(300)
    first, again = opt(*inputs), opt(*mixed(300))
    assert len({value.data_ptr() for value in (*first, *again)}) == 6
    first[0].add_(1)  # writable, and nobody else's
    wanted = Mixed()(*inputs)
    del opt, again
    gc.collect()
    torch.testing.assert_close(first[0], wanted[0] + 1)
    torch.testing.assert_close(first[1:], wanted[1:])


def test_a_region_in_onnx_refers_to_tensors_of_any_kind() -> None:
    """What is not a tensor of PyTorch's is handed over as an array."""
    array = ir.tensor(randn(32, 16).numpy(), name="w")
    made = weights._held(array)
    assert made.value.shape() == [32, 16]
