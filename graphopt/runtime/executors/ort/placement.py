"""Where ONNX Runtime put each node of a model, and why the CPU has some that were meant for a provider."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnxruntime

from graphopt.runtime.executors.ort.providers import CPU, Provider


@dataclass(frozen=True)
class Placed:
    """A node of the model, as ONNX Runtime partitioned it.

    Args:
        name: of the ONNX node; one that ONNX Runtime made has a name of its own.
        op: its type.
        provider: that runs it.
    """

    name: str
    op: str
    provider: str


@dataclass(frozen=True)
class Fallback:
    """A node that the CPU runs though a provider was asked for.

    Args:
        node: the graph's node that it serves; "" for one that ONNX Runtime made.
        op: its type.
        reason: in words.
    """

    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a session run.

    Args:
        parts: the nodes that were handed to a provider together; () where there is only the CPU.
    """

    parts: tuple[tuple[Placed, ...], ...] = ()

    @property
    def nodes(self) -> list[Placed]:
        """All of them."""
        return [node for part in self.parts for node in part]

    def of(self, provider: str) -> list[tuple[Placed, ...]]:
        """The parts of one provider, in its order."""
        return [part for part in self.parts if part and part[0].provider == provider]

    def counts(self) -> dict[str, int]:
        """Nodes by provider."""
        return dict(Counter(node.provider for node in self.nodes))

    def reads_elsewhere(self, model: ir.Model, provider: str) -> set[str]:
        """The initializers that some node reads of which it is not known that it runs on a provider."""
        if provider == CPU:
            return set()
        there = {node.name for node in self.nodes if node.provider == provider}
        return {
            value.name or ""
            for value in model.graph.initializers.values()
            if any(node.name not in there for node, _ in value.uses())
        }

    def fallbacks(self, model: ir.Model, provider: Provider) -> list[Fallback]:
        """The nodes that the CPU runs instead of a provider, and what that says of each when it is asked."""
        ours = {node.name: node for node in model.graph}
        said: dict[tuple[Any, ...], str] = {}
        found = []
        for placed in self.nodes:
            if placed.provider != CPU or provider.name == CPU:
                continue
            node = ours.get(placed.name)
            if node is None:
                found.append(Fallback("", placed.op, "ONNX Runtime made it for the CPU"))
                continue
            kind = (node.domain, node.op_type, *(value and value.dtype for value in node.inputs))
            if kind not in said:
                said[kind] = _reason(node, provider)
            found.append(Fallback(node.metadata_props.get("graphopt.node", ""), placed.op, said[kind]))
        return found


def placement_of(session: Any, model: ir.Model) -> Placement:
    """What ONNX Runtime recorded when it partitioned the model; nothing where it was not asked to."""
    if session.get_providers() == [CPU]:
        return Placement()
    return Placement(
        tuple(
            tuple(Placed(node.name, node.op_type, part.ep_name) for node in part.get_nodes())
            for part in session.get_provider_graph_assignment_info()
        )
    )


def by_node(fallbacks: list[Fallback]) -> dict[str, list[Fallback]]:
    """Fall-backs by the graph's node that they serve."""
    found: dict[str, list[Fallback]] = defaultdict(list)
    for fallback in fallbacks:
        found[fallback.node].append(fallback)
    return dict(found)


# Asking


def _reason(node: ir.Node, provider: Provider) -> str:
    """Why a provider does not run a node: it is asked for that node alone, with no CPU to fall back to."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    alone = provider.given(enable_cuda_graph="0")
    try:
        if alone.devices:
            options.add_provider_for_devices(list(alone.devices), dict(alone.options))
        onnxruntime.InferenceSession(
            _model_of(node), options, providers=alone.entries()[:-1], enable_fallback=0
        )
    except Exception as error:  # of the provider's own, too
        if "fallback to cpu" in str(error).lower():
            return f"{provider.name} has no kernel for it"
        return f"{provider.name} refuses it: {str(error).splitlines()[0]}"
    return f"{provider.name} takes it alone, but ONNX Runtime expects the CPU to be faster in this place"


_SMALL = 4096  # bytes of a constant that may decide what a kernel does, such as axes


def _model_of(node: ir.Node) -> bytes:
    """A model of one node, which is given its inputs, but for small constants."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    made: dict[ir.Value, ir.Value] = {}
    constants = []
    for value in dict.fromkeys(value for value in node.inputs if value is not None):
        new = ir.val(f"input{len(made)}", _type_of(value, values), value.shape)
        if value.const_value is not None and value.const_value.nbytes < _SMALL:
            new.const_value = value.const_value
            constants.append(new)
        made[value] = new
    inputs = [None if value is None else made[value] for value in node.inputs]
    attributes = list(node.attributes.values())
    alone = ir.Node(
        node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs), name="alone"
    )
    for index, (new, old) in enumerate(zip(alone.outputs, node.outputs, strict=True)):
        new.name, new.shape = f"output{index}", old.shape
        new.type = ir.TensorType(_type_of(old, values))
    given = [value for value in made.values() if value not in constants]
    opsets = dict(node.graph.opset_imports) if node.graph is not None else {}
    graph = ir.Graph(
        given, alone.outputs, nodes=[alone], initializers=constants, opset_imports=opsets, name="alone"
    )
    serialized: bytes = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return serialized


def _type_of(value: ir.Value, others: Iterable[ir.Value]) -> ir.DataType:
    """The type of a value; that of its neighbours where a translation left it open."""
    known = [other.dtype for other in (value, *others) if other.dtype is not None]
    return known[0] if known else ir.DataType.FLOAT


def told(fallbacks: list[Fallback]) -> Iterator[dict[str, Any]]:
    """Fall-backs for the plan's row: those of one op and reason together."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for fallback in fallbacks:
        groups[fallback.op, fallback.reason].append(fallback.node)
    for (op, reason), nodes in groups.items():
        yield {"op": op, "reason": reason, "nodes": sorted(set(filter(None, nodes))), "count": len(nodes)}
