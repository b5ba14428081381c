"""One table of what is computed in a narrower floating type, and the rewrite of a node into it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, is_getitem
from graphopt.ir.pattern import Match
from graphopt.kernels import (
    add_layer_norm,
    add_rms_norm,
    attention,
    conv_activation,
    gated_mlp,
    layer_norm_add,
    linear_activation,
    linear_add_layer_norm,
    quick_gelu,
    rms_norm,
    rms_norm_add,
    rope,
)
from graphopt.passes._affine import MOVES

aten = torch.ops.aten

# Products: here the time goes, and each sums in float32 whatever it multiplies.
_PRODUCTS = frozenset(
    {
        *(aten.linear.default, aten.matmul.default, aten.bmm.default, aten.addmm.default, aten.mm.default),
        *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
        *(aten.scaled_dot_product_attention.default, attention.OP.overload, gated_mlp.OP.overload),
        *(linear_activation.OP.overload, linear_add_layer_norm.OP.overload, conv_activation.OP.overload),
    }
)
# What stands between products: computed in float32 inside, so that only its result is rounded. It follows its
# inputs: where one of them is narrow, all are made so, and what comes next reads half the bytes.
_FOLLOWING = frozenset(
    {
        *(
            aten.layer_norm.default,
            aten.gelu.default,
            aten.relu.default,
            aten.silu.default,
            aten.tanh.default,
        ),
        *(aten.sigmoid.default, aten.add.Tensor, aten.mul.Tensor, aten.max_pool2d.default),
        *(add_layer_norm.OP.overload, layer_norm_add.OP.overload, quick_gelu.OP.overload),
        *(add_rms_norm.OP.overload, rms_norm_add.OP.overload, rms_norm.OP.overload, rope.OP.overload),
    }
)
# What moves values and computes nothing.
_MOVING = MOVES | {
    *(aten.split_with_sizes.default, aten.slice.Tensor, aten.select.int, aten.expand.default),
    *(aten.contiguous.default, aten.cat.default, aten.unsqueeze.default, aten.squeeze.dim),
}
# All else stays as it is: softmax outside attention, exponentials, logarithms, sums and means over many
# values, losses, comparisons, lookups (whose tables are as large in either type for the rows that are read).


def narrowed_matches(graph: Graph) -> Iterator[Match]:
    """Every float32 node that the table lets compute in a narrower type, in topological order."""
    narrow: set[fx.Node] = set()
    for node in graph.calls:
        if node._erased:
            continue
        if is_getitem(node):
            if node.args[0] in narrow:
                narrow.add(node)
            continue
        follows = node.target in _FOLLOWING or node.target in _MOVING
        reads_narrow = any(source in narrow or _was_narrow(source) for source in node.all_input_nodes)
        if not (node.target in _PRODUCTS or (follows and reads_narrow)) or not _is_float32(node):
            continue
        narrow.add(node)
        parts = tuple(user for user in node.users if is_getitem(user))
        yield Match(graph, node, (node, *parts), {"parts": parts})


def refuse_narrowing(match: Match) -> str | None:
    """A node with several results is read through its parts alone, and its tensors are on the CPU."""
    root = match.root
    if isinstance(root.meta["val"], (tuple, list)) and len(match["parts"]) < len(root.users):
        return "its results are returned as a list"
    return None


def narrow(rewriter: Rewriter, match: Match, dtype: torch.dtype) -> None:
    """Cast what a node reads, compute, and cast what it returns back.

    Weights are cast now, and kept in the narrow type alone.
    """
    root, graph = match.root, match.graph
    made: dict[fx.Node, fx.Node] = {}

    def cast(node: fx.Node) -> fx.Node:
        val = node.meta["val"]
        if not isinstance(val, torch.Tensor) or val.dtype != torch.float32:
            return node
        if node not in made:
            tensor = graph.constant(node)
            made[node] = (
                rewriter.call(aten.to.dtype, node, dtype)
                if tensor is None
                else rewriter.constant(tensor.to(dtype), [node], f"in {str(dtype).removeprefix('torch.')}")
            )
        return made[node]

    args, kwargs = fx.map_arg((root.args, root.kwargs), cast)
    result = rewriter.call(root.target, *args, **kwargs)  # type: ignore[arg-type]
    if not isinstance(root.meta["val"], (tuple, list)):
        rewriter.replace(root, rewriter.call(aten.to.dtype, result, torch.float32))
        return
    for part in match["parts"]:
        taken: Any = rewriter.call(operator.getitem, result, part.args[1])
        if part.meta["val"].dtype == torch.float32:
            taken = rewriter.call(aten.to.dtype, taken, torch.float32)
        rewriter.replace(part, taken)


def _was_narrow(node: fx.Node) -> bool:
    """True for what this rewrite leaves behind a node: a cast back to float32."""
    if node.target is not aten.to.dtype:
        return False
    source: Any = node.args[0]
    return source.meta["val"].dtype in (torch.bfloat16, torch.float16)


def _is_float32(node: fx.Node) -> bool:
    """True when the node's results are float32, and it reads no other floating type."""
    val = node.meta["val"]
    results = list(val) if isinstance(val, (tuple, list)) else [val]
    read = [source.meta["val"] for source in node.all_input_nodes]
    tensors = [v for v in (*results, *read) if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return bool(tensors) and all(v.dtype == torch.float32 for v in tensors) and _computes_here(results)


def _computes_here(results: list[Any]) -> bool:
    return any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in results)
