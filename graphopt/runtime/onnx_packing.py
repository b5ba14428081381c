"""Self-attention that takes Q, K and V as one product wrote them, for ONNX Runtime's CUDA provider.

    Gemm(x, W, b) -> Split -> MultiHeadAttention(q, k, v)  ->  Gemm(x, W') -> MultiHeadAttention(qkv, bias=b)

MultiHeadAttention takes (batch, length, heads, 3, features) and a bias, and takes them apart in one kernel.
That saves Split's, and the kernel in which the provider's Gemm copies a bias into its output. W' has the rows
of W head by head; it replaces W, so that a weight is kept once.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.passes import common


@dataclass(frozen=True)
class _Projection:
    """One product that makes Q, K and V.

    Args:
        gemm: the product, with a bias.
        split: that takes it apart.
        heads: of each of the three.
        features: of a head.
    """

    gemm: ir.Node
    split: ir.Node
    heads: int
    features: int


def pack_projections(model: ir.Model) -> None:
    """Hand Q, K and V over packed wherever one product makes them for one attention."""
    weights: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in list(model.graph):
        found = _projection_of(node)
        if found is not None:
            _pack(model.graph, node, found, weights)
    if weights:
        common.RemoveUnusedNodesPass()(model)


def _projection_of(node: ir.Node) -> _Projection | None:
    """The product that makes an attention's Q, K and V in this order, and nothing else; None if none does."""
    if node.op_type != "MultiHeadAttention" or node.attributes.get_int("unidirectional", False):
        return None  # packed, causality is not supported
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        return None
    heads, sources = node.attributes.get_int("num_heads", 0), [_source(x) for x in node.inputs[:3]]
    split = sources[0].producer() if sources[0] is not None else None
    if split is None or split.op_type != "Split" or list(split.outputs) != sources:
        return None
    parts = [list(part.shape or ()) for part in split.outputs]
    width = parts[0][-1] if len(parts[0]) == 3 else None
    if not isinstance(width, int) or parts != [parts[0]] * 3:
        return None
    if any(_by_head(x) != [*parts[0][:2], heads, width // heads] for x in node.inputs[:3]):
        return None
    product = _source(split.inputs[0])
    gemm = product.producer() if product is not None else None
    if gemm is None or gemm.op_type != "Gemm" or len(gemm.inputs) != 3:
        return None
    return _Projection(gemm, split, heads, width // heads) if _is_plain(gemm, 3 * width) else None


def _source(value: ir.Value | None) -> ir.Value | None:
    """What a value is but for its shape; None where somebody else reads it on the way."""
    while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
        node = value.producer()
        if node is None or node.op_type != "Reshape":
            return value
        value = node.inputs[0]
    return None


def _by_head(value: ir.Value | None) -> list[int | ir.SymbolicDim]:
    """The shape (batch, length, heads, features) that an attention's input has been reshaped from."""
    node = value.producer() if value is not None else None
    given = node.inputs[0] if node is not None and node.op_type == "Reshape" else None
    return list(given.shape) if given is not None and given.shape is not None else []


def _is_plain(gemm: ir.Node, outputs: int) -> bool:
    """True for x @ W.T + b of a weight and a bias that are the model's."""
    weight, bias = gemm.inputs[1], gemm.inputs[2]
    factors = [gemm.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    transposed = [gemm.attributes.get_int(name, 0) for name in ("transA", "transB")]
    return (
        (factors, transposed) == ([1.0, 1.0], [0, 1])
        and weight is not None
        and bias is not None
        and isinstance(getattr(weight.const_value, "raw", None), torch.Tensor)
        and weight.shape is not None
        and weight.shape[0] == outputs
        and bias.shape == ir.Shape([outputs])
    )


def _pack(
    graph: ir.Graph, attention: ir.Node, found: _Projection, weights: dict[tuple[ir.Value, int], ir.Value]
) -> None:
    weight, bias = found.gemm.inputs[1], found.gemm.inputs[2]
    assert weight is not None
    if (weight, found.heads) not in weights:
        weights[weight, found.heads] = _head_by_head(graph, weight, found.heads)
    found.gemm.replace_input_with(1, weights[weight, found.heads])
    found.gemm.resize_inputs(2)
    sizes = [0, 0, found.heads, 3, found.features]
    shape = initializer(graph, f"packed_{found.heads}x3x{found.features}", ir.tensor(sizes))
    apart = ir.node("Reshape", [found.split.inputs[0], shape], metadata_props=dict(attention.metadata_props))
    apart.outputs[0].name = f"{attention.outputs[0].name}_packed"
    apart.outputs[0].type = found.split.outputs[0].type
    graph.insert_before(attention, apart)
    attention.resize_inputs(max(4, len(attention.inputs)))
    for place, value in enumerate((apart.outputs[0], None, None, bias)):
        attention.replace_input_with(place, value)


def _head_by_head(graph: ir.Graph, weight: ir.Value, heads: int) -> ir.Value:
    """A weight of Q's, K's and V's rows as one of each head's Q, K and V."""
    raw: torch.Tensor = weight.const_value.raw  # type: ignore[union-attr]
    rows = raw.detach().reshape(3, heads, -1, raw.shape[1]).transpose(0, 1).reshape(raw.shape)
    return initializer(graph, f"{weight.name}_by_head", ir.tensor(rows.contiguous()))


def initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """The initializer of a name: the one that is there, or a new one of this tensor."""
    if name not in graph.initializers:
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.initializers.add(value)
    return graph.initializers[name]
