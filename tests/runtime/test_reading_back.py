"""Calls whose reference reads values on the host: a CUDA graph holds another implementation, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import graphopt
from bench.product_cases import products
from graphopt.capture.export import capture_any
from graphopt.errors import LoweringError
from graphopt.ir.graph import Graph, op_name
from graphopt.kernels import _triton
from graphopt.kernels._triton import Gpu, standing_in_for
from graphopt.runtime import choosing
from graphopt.runtime.choosing import Choosing
from graphopt.runtime.executors.cuda import uncapturable
from graphopt.runtime.executors.inductor import Inductor
from graphopt.runtime.implementations import Implementation, implementations, reads_back, untraceable
from graphopt.runtime.target import Target
from tests._models import randn

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
H100, A100 = Gpu((9, 0), 132, 227 * 1024), Gpu((8, 0), 108, 163 * 1024)
WHY = "cuts out every expert's rows on the host, by the values of ends"
needs_interpreter = pytest.mark.skipif(not _triton.INTERPRETED, reason="in Triton's interpreter")


class Experts(torch.nn.Module):
    """Three experts between two activations."""

    def __init__(self, dtype: torch.dtype = torch.float32, grouped: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(randn(3, 16, 32).to(dtype) / 4)
        self.register_buffer("ends", torch.tensor([2, 5, 7], dtype=torch.int32) if grouped else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        op = torch.ops.graphopt.grouped_gated_mlp
        return torch.tanh(op(torch.sigmoid(x), self.weight, self.ends, "silu", False))


def graph_of(dtype: torch.dtype = torch.float32, grouped: bool = True) -> tuple[Graph, fx.Node]:
    x = randn(7, 16) if grouped else randn(3, 7, 16)
    graph, _ = capture_any(Experts(dtype, grouped).eval(), (x.to(dtype),))
    return graph, next(node for node in graph.calls if op_name(node) == "graphopt.grouped_gated_mlp")


@pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("dtype", "gpu", "reference", "all_ways"),
    [
        (torch.float16, H100, True, False),  # there is a kernel
        (torch.bfloat16, H100, False, False),  # PyTorch has one as well
        (torch.bfloat16, A100, True, False),  # which is for newer GPUs
        (torch.float32, H100, True, True),
    ],
)
def test_who_reads_back_on_a_gpu(
    dtype: torch.dtype, gpu: Gpu, reference: bool, all_ways: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    _, node = graph_of(dtype)
    with standing_in_for(gpu):
        found = untraceable(node, GPU), reads_back(node, GPU)
    assert [reason is not None for reason in found] == [reference, all_ways]
    assert all(reason is None or WHY in reason for reason in found)


def test_rows_of_each_expert_are_read_by_nobody() -> None:
    _, node = graph_of(grouped=False)
    assert uncapturable(node, CPU) is None
    assert Inductor().supports(node, Target(CPU)) is None


@pytest.mark.parametrize(("gpu", "outside"), [(H100, False), (A100, True)])
def test_a_product_of_rows_in_groups(gpu: Gpu, outside: bool) -> None:
    """PyTorch's, behind the gated half of a mixture of experts."""

    class Down(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.grouped_mm(x, weight, offs=ends)

    ends = torch.tensor([2, 5, 7], dtype=torch.int32)
    graph, _ = capture_any(Down().eval(), (randn(7, 16).bfloat16(), randn(3, 16, 32).bfloat16(), ends))
    with standing_in_for(gpu):
        reason = reads_back(graph.calls[0], GPU)
    assert (reason is not None) is outside
    assert reason is None or "reads their ends on the host" in reason


def test_transformers_product_of_rows_in_groups() -> None:
    """What takes its place wherever a compiler looks on, but for bfloat16."""
    config = MixtralConfig(hidden_size=16, intermediate_size=32, num_local_experts=3, num_experts_per_tok=2)
    config._experts_implementation = "grouped_mm"
    graph, _ = capture_any(MixtralSparseMoeBlock(config).eval(), (randn(2, 5, 16),))
    found = [n for n in graph.calls if op_name(n) == "transformers.grouped_mm_fallback"]
    assert len(found) == 2
    assert all("reads their ends on the host" in str(uncapturable(node, CPU)) for node in found)


@needs_interpreter
def test_a_graph_holds_the_call_where_a_kernel_takes_it() -> None:
    assert uncapturable(graph_of()[1], CPU) is None
    reason = uncapturable(graph_of(torch.float64)[1], CPU)
    assert reason is not None
    assert reason.startswith("graphopt.grouped_gated_mlp waits for the GPU: in torch.float64")


@needs_interpreter
@pytest.mark.parametrize("timed", [True, False])
def test_what_no_graph_holds_is_neither_timed_nor_chosen(
    timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would fail in the capture that times it; the reason is told."""
    asked: list[int] = []

    def timer(thunks: Sequence[Callable[[], Any]]) -> list[float]:
        asked.append(len(thunks))
        return [1.0] * len(thunks)

    monkeypatch.setattr(choosing, "tune", lambda *args, **kwargs: [])
    graph, node = graph_of()
    args = randn(7, 16), *map(graph.constant, node.args[1:3]), *node.args[3:]
    found = Choosing(graph, timed=timed, timer=timer).decide(node, args, {})
    assert found.chosen.name == "triton"
    assert asked == []
    assert not timed or WHY in found.refused["aten"]


def test_the_reference_is_left_where_nothing_else_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a graph, and with the reason of the kernel that failed."""

    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("out of registers")

    def ways(target: Any, args: Any, kwargs: Any) -> Any:
        found, _ = implementations(target, args, kwargs)
        return [Implementation("triton", broken), found[-1]], {}

    monkeypatch.setattr(choosing, "implementations", ways)
    graph, node = graph_of()
    args = randn(7, 16), *map(graph.constant, node.args[1:3]), *node.args[3:]
    found = Choosing(graph, timed=False).decide(node, args, {})
    assert found.chosen.name == "aten"
    assert found.refused == {"triton": "RuntimeError: out of registers"}


def test_a_later_shape_tries_it_last() -> None:
    """Also where ATen's was the fastest for other arguments of the op."""
    graph, _ = graph_of()
    choose = Choosing(graph, timed=False)
    kernel, reference = Implementation("triton", torch.tanh), Implementation("aten", torch.tanh, "reads back")
    choose._decisions["before"] = choosing.Decision("op", "7", reference, {"aten": 1.0}, {}, reference, (7,))
    assert choose._likeliest_first("op", (7,), [kernel, reference]) == [kernel, reference]


def test_inductor_leaves_the_call_to_others() -> None:
    with pytest.raises(LoweringError, match=r"Inductor cannot trace graphopt.grouped_gated_mlp: in torch"):
        graphopt.optimize(Experts().eval(), (randn(7, 16),), executors=("inductor",), effort="fast")


def test_what_reads_back_is_no_peer_of_the_kernels_that_are_measured() -> None:
    with FakeTensorMode():
        found = {
            case.shape: case.reads_back(case.make(CPU, torch.float16)) is not None
            for case in products()
            if "gated_mlp" in case.kernel
        }
    assert {shape for shape, reads in found.items() if reads} == {
        "256x4096 to 14336, 8 experts",
        "8192x4096 to 14336, 8 experts",
    }
    assert len(found) == 6
