"""What a node costs at least: FLOPs, bytes, and the roofline time on a device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.utils.flop_counter import flop_registry

from graphopt.compiler.device import Limits
from graphopt.compiler.evaluate import concrete
from graphopt.ir.graph import Graph, is_getitem, tensor_bytes, value
from graphopt.ir.op import Cost, op_of

aten = torch.ops.aten

# Ops that make a view: they move no bytes.
VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.transpose.int,
        aten.permute.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.t.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.detach.default,
        aten.alias.default,
    }
)


_CONVOLUTIONS = frozenset({aten.conv1d, aten.conv2d, aten.conv3d})
_TRANSPOSED_CONVOLUTIONS = frozenset(
    {
        aten.conv_transpose1d,
        aten.conv_transpose2d,
        aten.conv_transpose3d,
    }
)

_LOOKUPS = frozenset(
    {
        aten.embedding.default,
        aten.index.Tensor,
        aten.index_select.default,
        aten.gather.default,
    }
)


def node_cost(node: fx.Node) -> Cost:
    """FLOPs and bytes of one node, dynamic sizes at the example's values.

    Matrix products and convolutions are counted by PyTorch's own flop counter, graphopt's ops by their cost
    face, and everything else at one operation an output element.
    """
    if node.op != "call_function" or is_getitem(node) or node.target in VIEWS:
        return Cost(0.0, 0.0)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: concrete(n.meta["val"]))
    op = op_of(node.target)
    if op is not None:
        return op.cost(*args, **kwargs)
    out = concrete(value(node))
    written = tensor_bytes(out)
    read = [tensor_bytes(source.meta["val"]) for source in node.all_input_nodes]
    if node.target in _LOOKUPS:  # of the table, only the rows that are looked up
        read[0] = min(read[0], written)
    return Cost(_flops(node, args, kwargs, out), sum(read) + written)


def _flops(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    packet = getattr(node.target, "overloadpacket", None)
    if packet is aten.linear:
        return float(2.0 * out.numel() * args[1].shape[-1])
    if packet is aten.matmul:
        return float(2.0 * out.numel() * args[0].shape[-1])
    if packet in _CONVOLUTIONS:
        return float(2.0 * out.numel() * args[1][0].numel())
    if packet in _TRANSPOSED_CONVOLUTIONS:
        return float(2.0 * args[0].numel() * args[1][0].numel())
    if packet is aten.einsum:
        return _einsum_flops(*args[:2])
    if node.target is aten.scaled_dot_product_attention.default:
        query, key, values = args[:3]
        batch_heads = query.numel() / (query.shape[-1] * query.shape[-2])
        return float(
            2.0 * batch_heads * query.shape[-2] * key.shape[-2] * (query.shape[-1] + values.shape[-1])
        )
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=out))
    return float(sum(t.numel() for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)))


def _einsum_flops(equation: str, operands: list[torch.Tensor]) -> float:
    """Every index once: a multiply-add for each; an ellipsis counts like an index of its own."""
    sizes: dict[str, int] = {}
    for indices, operand in zip(equation.split("->")[0].replace(" ", "").split(","), operands, strict=True):
        before, _, after = indices.partition("...")
        shape = list(operand.shape)
        sizes.update(zip(before, shape, strict=False))
        sizes.update(zip(reversed(after), reversed(shape), strict=False))
        inner = shape[len(before) : len(shape) - len(after)]
        sizes["..."] = max(sizes.get("...", 1), math.prod(inner))
    return 2.0 * math.prod(sizes.values())


def region_cost(nodes: Iterable[fx.Node], root: fx.Node, *, fused: bool) -> Cost:
    """What a region costs that one kernel in its place would not.

    Args:
        nodes: of the region.
        root: its last node, whose value has to be written in any case.
        fused: the region's arithmetic stays and only its inner values are no longer written and read;
            otherwise its arithmetic goes too.
    """
    inside = [node for node in nodes if node is not root]
    moved = 2.0 * sum(tensor_bytes(n.meta.get("val")) for n in inside if node_cost(n).bytes)
    return Cost(0.0 if fused else sum(node_cost(node).flops for node in inside), moved)


def milliseconds(cost: Cost, limits: Limits, dtype: torch.dtype = torch.float32) -> float:
    """The roofline: the longer of computing (in that dtype) and moving, in milliseconds."""
    return 1e3 * max(cost.flops / limits.flops_in(dtype), cost.bytes / limits.bytes_per_s)


def node_dtype(node: fx.Node) -> torch.dtype:
    """The dtype that a node computes in: of its first floating result, float32 where it has none."""
    for leaf in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.dtype
    return torch.float32


def graph_milliseconds(graph: Graph, limits: Limits) -> float:
    """The roofline of a whole graph, its calls one after the other, in milliseconds."""
    return sum(milliseconds(node_cost(node), limits, node_dtype(node)) for node in graph.calls)
