"""Where ONNX Runtime put each node, as rows and remarks, and what a provider says of those it has not."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from graphopt.capture.export import capture_any
from graphopt.runtime.executors.ort import placement, program
from graphopt.runtime.executors.ort.placement import Placed, Placement
from graphopt.runtime.executors.ort.providers import CPU, CUDA, OPENVINO, Provider
from graphopt.runtime.lower_onnx import to_onnx
from graphopt.runtime.region import extract
from tests._models import MLP, randn, randomised

GPU = Provider(CUDA, {"device_id": "0", "enable_cuda_graph": "1"})

NO_FALLBACK = (
    "This session contains graph nodes that are assigned to the default CPU EP, but fallback to CPU EP has"
    " been explicitly disabled by the user."
)


class Partitioned:
    """A session that says which provider has which nodes."""

    def __init__(self, *parts: tuple[str, Sequence[Any]]) -> None:
        self.parts = parts

    def get_providers(self) -> list[str]:
        return list(dict.fromkeys([*(name for name, _ in self.parts), CPU]))

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda nodes=nodes: nodes) for name, nodes in self.parts
        ]


@pytest.fixture(scope="module")
def lowered() -> Any:
    graph, _ = capture_any(randomised(MLP()), (randn(4, 8),), None)
    return to_onnx(graph)


@pytest.fixture(scope="module")
def region() -> Any:
    graph, _ = capture_any(randomised(MLP()), (randn(4, 8),), None)
    return extract(graph, graph.calls, "region0")


def nodes_of(model: Any) -> list[Any]:
    return [SimpleNamespace(name=node.name, op_type=node.op_type) for node in model.graph]


def asked(monkeypatch: pytest.MonkeyPatch, error: str | None) -> list[Any]:
    """Sessions that are opened to ask for one node: what they were opened with."""
    seen: list[Any] = []

    def session(model: bytes, options: Any, providers: Any, enable_fallback: int) -> None:
        assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        seen.append((onnx.load_from_string(model), providers))
        if error is not None:
            raise RuntimeError(error)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return seen


def test_a_session_on_the_cpu_has_nothing_to_tell(lowered: Any) -> None:
    found = placement.placement_of(Partitioned((CPU, nodes_of(lowered))), lowered)
    assert found == Placement()
    assert found.fallbacks(lowered, Provider(CPU)) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NO_FALLBACK, f"{CUDA} has no kernel for it"),
        ("CUDA failure 35\nmore", f"{CUDA} refuses it: CUDA failure 35"),
        (None, f"{CUDA} takes it alone, but ONNX Runtime expects the CPU to be faster in this place"),
    ],
)
def test_each_fall_back_has_the_reason_that_the_provider_gives(
    lowered: Any, region: Any, monkeypatch: pytest.MonkeyPatch, error: str | None, reason: str
) -> None:
    seen = asked(monkeypatch, error)
    first, *rest = nodes_of(lowered)
    extra = SimpleNamespace(name="MemcpyToHost", op_type="MemcpyToHost")
    found = placement.placement_of(Partitioned((CUDA, rest), (CPU, [first, extra])), lowered)
    assert found.counts() == {CUDA: len(rest), CPU: 2}
    fallbacks = found.fallbacks(lowered, GPU)
    node = next(iter(lowered.graph)).metadata_props["graphopt.node"]
    assert [(row.node, row.reason) for row in fallbacks] == [
        (node, reason),
        ("", "ONNX Runtime made it for the CPU"),
    ]
    ((model, providers),) = seen
    assert [n.op_type for n in model.graph.node] == [first.op_type]
    assert providers == [(CUDA, {"device_id": "0", "enable_cuda_graph": "0"})]  # the CPU is not among them
    first_note, other = program.fallback_notes(region, fallbacks)
    assert (first_note.kind, first_note.node.name) == ("missed", node)
    assert first_note.reason == f"{first.op_type} runs on the CPU: {reason}"
    assert other.node is region.graph.calls[0]


def test_a_kind_of_node_is_asked_for_once(lowered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = asked(monkeypatch, None)
    nodes = nodes_of(lowered)
    found = Placement((tuple(Placed(node.name, node.op_type, CPU) for node in nodes),))
    fallbacks = found.fallbacks(lowered, GPU)
    assert len(fallbacks) == len(nodes) > len(seen) == len({node.op_type for node in nodes})
    for row in placement.told(fallbacks):
        assert row["count"] == sum(node.op_type == row["op"] for node in nodes)
        assert row["nodes"] == sorted(set(row["nodes"]))


def test_every_node_can_be_asked_for_alone(lowered: Any) -> None:
    """The models of one node are ones that the CPU takes."""
    for node in lowered.graph:
        model = placement._model_of(node)
        onnx.checker.check_model(onnx.load_from_string(model))
        onnxruntime.InferenceSession(model, providers=[CPU])


def test_weights_that_another_device_reads_are_not_shared(lowered: Any) -> None:
    names = {value.name for value in lowered.graph.initializers.values()}
    everywhere = Placement((tuple(Placed(n.name, n.op_type, CUDA) for n in lowered.graph),))
    assert everywhere.reads_elsewhere(lowered, CUDA) == set()
    reader, _ = next(iter(next(iter(lowered.graph.initializers.values())).uses()))
    there = tuple(Placed(n.name, n.op_type, CUDA) for n in lowered.graph if n is not reader)
    read = {value.name for value in reader.inputs if value is not None and value.name in names}
    assert read
    for found in (Placement((there,)), Placement((there, (Placed(reader.name, reader.op_type, CPU),)))):
        assert found.reads_elsewhere(lowered, CUDA) == read
    assert Placement().reads_elsewhere(lowered, CPU) == set()


def test_a_plugins_parts_have_the_names_of_their_nodes(lowered: Any) -> None:
    nodes = [Placed(node.name, node.op_type, OPENVINO) for node in lowered.graph]
    parts = [tuple(nodes[:2]), tuple(nodes[2:])]
    name = f"{OPENVINO}_17942486582260722693_1"
    events = [
        {"cat": "Node", "name": f"{name}_1_kernel_time", "dur": dur, "args": {"op_name": name}}
        for dur in (9000, 1000, 3000)  # microseconds, the first run left out
    ]
    (row,) = program._kernel_times(events, lowered, parts)
    ours = [n.metadata_props["graphopt.node"] for n in lowered.graph][2]
    assert (row.node, row.op, row.ms) == (ours, f"OpenVINO x{len(nodes) - 2}", 2.0)


def test_the_profile_of_the_cpu_has_our_names() -> None:
    graph, _ = capture_any(randomised(MLP()), (randn(4, 8),), None)
    region = extract(graph, graph.calls, "region0")
    made = program.OrtProgram(region, to_onnx(region.graph), Provider(CPU))
    _, times = made.profile([torch.ones(4, 8)])
    assert {row.node for row in times} <= {node.name for node in graph.calls}
    assert all(row.ms >= 0 for row in times)
    assert made.describe() == {"provider": CPU}
    assert made.notes() == []
