"""The cuda executor's program without a GPU: Triton's interpreter, and a stand-in for the graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from graphopt.capture.export import capture_any
from graphopt.compiler.device import GPUS
from graphopt.compiler.manager import PassManager
from graphopt.compiler.reference import output_reference
from graphopt.compiler.remarks import Remarks
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.errors import LoweringError
from graphopt.ir.graph import Graph, op_name
from graphopt.kernels import _triton
from graphopt.passes.default import pipeline
from graphopt.runtime.candidates import choose
from graphopt.runtime.executors.cuda import Cuda, CudaProgram, uncapturable
from graphopt.runtime.region import extract
from graphopt.runtime.target import Target
from graphopt.runtime.ways import plan_candidates
from tests._models import Example, bert, cnn, padding, randn, tokens
from tests.runtime._graphs import StandIn, stand_in

__all__ = ["stand_in"]
CPU = torch.device("cpu")


class Prepared:
    """A model after the passes, as one region of the cuda executor."""

    def __init__(self, example: Example, dynamic: bool = False) -> None:
        names = example.dynamic if dynamic else None
        self.graph, self.inputs = capture_any(example.model, example.args, example.kwargs, dynamic=names)
        PassManager(pipeline(2, (), ()), Remarks(), GPUS["h100"]).run(self.graph, self.inputs)
        self.region = extract(self.graph, self.graph.calls, "region0")
        self.program = CudaProgram(self.region, CPU, timed=False)

    def agrees(self, inputs: list[torch.Tensor]) -> None:
        """A run is as exact as the graph itself."""
        by_name = {node.name: value for node, value in zip(self.graph.placeholders, inputs, strict=True)}
        got = self.program.run([by_name[name] for name in self.region.reads])
        made = dict(zip(self.region.writes, got, strict=True))
        ends = [node.name for node in self.graph.output.args[0]]  # type: ignore[union-attr]
        verdict = output_reference(self.graph, inputs, MODEL_FLOOR_ULPS).compare([made[n] for n in ends])
        assert verdict.ok, verdict.reason


@pytest.mark.usefixtures("stand_in")
def test_the_kernels_of_an_encoder_together_are_as_exact_as_the_model() -> None:
    prepared = Prepared(bert())
    prepared.agrees(prepared.inputs)
    prepared.agrees(prepared.inputs)
    row = prepared.program.describe()
    assert row["graphed_nodes"] == len(prepared.region.graph.calls)
    assert row["cuda_graphs"] == 1
    chosen = {kernel["op"]: kernel["chosen"] for kernel in row["kernels"]}
    assert chosen["aten.reshape"] == "aten"
    assert "graphopt.linear_add_layer_norm" in chosen
    if _triton.INTERPRETED:
        assert chosen["graphopt.linear_add_layer_norm"] == "triton"


@pytest.mark.skipif(not _triton.INTERPRETED, reason="in Triton's interpreter")
@pytest.mark.usefixtures("stand_in")
def test_every_norm_of_an_encoder_may_read_its_weights_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the capture: the executor vouches for the very memory that its kernels are given."""
    vouched: list[bool] = []

    def seen(device: torch.device, early: tuple[torch.Tensor, ...]) -> int:
        constants = _triton._constants.get()
        if constants is not None and early:
            vouched.append(all(_triton._memory(x) in constants for x in early))
        return 0

    monkeypatch.setattr(_triton, "dependence", seen)
    prepared = Prepared(bert())
    prepared.agrees(prepared.inputs)
    assert len(vouched) > 2
    assert all(vouched)


@pytest.mark.usefixtures("stand_in")
def test_other_sizes_run_on_kernels_that_take_them() -> None:
    prepared = Prepared(bert(), dynamic=True)
    by_name = {"input_ids": tokens, "token_type_ids": lambda *size: torch.zeros(size, dtype=torch.long)}
    for batch, length in ((2, 7), (1, 5), (3, 4), (1, 5)):
        given = [
            by_name[node.name](batch, length) if node.name in by_name else padding((length,) * batch, length)
            for node in prepared.graph.placeholders
        ]
        prepared.agrees(given)
    assert len(StandIn.last.made) == 2  # the first shape, and the one that came again


@pytest.mark.usefixtures("stand_in")
def test_a_convolutional_network() -> None:
    prepared = Prepared(cnn())
    prepared.agrees(prepared.inputs)


@pytest.mark.usefixtures("stand_in")
def test_a_convolutional_network_that_is_channels_last() -> None:
    """No call of it gives up the layout, which is what the kernels for images take."""
    example = cnn()
    example.model.to(memory_format=torch.channels_last)
    images = (value.contiguous(memory_format=torch.channels_last) for value in example.args)
    prepared = Prepared(replace(example, args=tuple(images)))
    prepared.agrees(prepared.inputs)
    rows = prepared.program.describe()["kernels"]
    assert {row["op"] for row in rows} >= {"graphopt.conv_activation", "aten.conv2d", "aten.max_pool2d"}
    if _triton.INTERPRETED:
        chosen = {row["chosen"] for row in rows if "conv" in row["op"] or "pool" in row["op"]}
        assert chosen == {"triton"}


@pytest.mark.usefixtures("stand_in")
def test_a_capture_that_fails_is_a_remark_on_the_region() -> None:
    prepared = Prepared(cnn())
    StandIn.last.failing = RuntimeError("CUDA error: operation not permitted when stream is capturing")
    prepared.agrees(prepared.inputs)
    prepared.agrees(prepared.inputs)
    assert prepared.program.describe()["graphed_nodes"] == 0
    (note,) = (note for note in prepared.program.notes() if note.kind == "missed")
    assert note.reason.startswith("region0 runs without a CUDA graph: RuntimeError: CUDA error")


@pytest.mark.usefixtures("stand_in")
def test_what_is_outside_the_graphs_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Inverse(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(torch.linalg.inv(torch.tanh(x) + 3 * torch.eye(4)))

    monkeypatch.setattr(Cuda, "supports", lambda self, node, target: uncapturable(node, CPU))
    graph, inputs = capture_any(Inverse().eval(), (randn(4, 4),))
    remarks, target = Remarks(), Target(CPU)
    found = plan_candidates(graph, graph, ("cuda", "eager"), target, remarks, "fast")
    reference = output_reference(graph, inputs, MODEL_FLOOR_ULPS)
    with pytest.raises(
        LoweringError,
        match=r"outside CUDA graphs are aten.linalg_inv \(linalg_inv: cuda: .* waits for the GPU to see",
    ):
        choose(found, inputs, reference, target, remarks, require_cuda_graph=True)


def graph_of(forward: torch.nn.Module) -> Graph:
    return capture_any(forward.eval(), (randn(4, 4),))[0]


@pytest.mark.parametrize(
    ("function", "op", "reason"),
    [
        (torch.nonzero, "aten.nonzero", "the size of what aten.nonzero gives depends on values"),
        (lambda x: x[x > 0], "aten.index", "depends on values"),
        (torch.linalg.inv, "aten.linalg_inv", "waits for the GPU to see whether it failed"),
        (torch.inverse, "aten.inverse", "waits for the GPU"),
        (torch.rand_like, "aten.rand_like", "draws random numbers"),
        (torch.linalg.vector_norm, "aten.linalg_vector_norm", None),
        (torch.tanh, "aten.tanh", None),
    ],
)
def test_what_cannot_be_captured_is_refused_with_the_reason(function, op, reason) -> None:  # type: ignore[no-untyped-def]
    class Calls(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    node = next(node for node in graph_of(Calls()).calls if op_name(node) == op)
    found = uncapturable(node, CPU)
    assert found is None if reason is None else reason in str(found)


def test_a_tensor_of_another_device_is_refused() -> None:
    node = graph_of(torch.nn.Tanh()).calls[0]
    assert "gives a tensor on cpu" in str(uncapturable(node, torch.device("cuda")))


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.runtime.executors.cuda.capability", lambda device: (7, 5))
    node = graph_of(torch.nn.Tanh()).calls[0]
    reason = Cuda().supports(node, Target(torch.device("cuda:0")))
    assert reason == "the cuda executor needs a GPU of compute capability 8.0 or later"
