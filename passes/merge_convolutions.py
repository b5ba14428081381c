"""conv(x, w1), conv(x, w2), ... -> split(conv(x, [w1; w2; ...]), channels): an Inception block's branches."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument

aten = torch.ops.aten

_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_GEOMETRY = ("stride", "padding", "dilation", "groups")


def pattern(graph: Graph) -> Iterator[Match]:
    """Groups of convolutions of one geometry that read one value."""
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for target in _CONVOLUTIONS:
        for conv in graph.fx.find_nodes(op="call_function", target=target):
            kernel = tuple(argument(conv, "weight").meta["val"].shape[2:])
            geometry = tuple(_numbers(argument(conv, name), len(kernel)) for name in _GEOMETRY)
            no_bias = argument(conv, "bias") is None
            groups[argument(conv, "input"), kernel, geometry, no_bias].append(conv)
    for (x, *_), group in groups.items():
        if len(group) > 1:
            members = tuple(sorted(group))
            yield Match(graph, members[-1], members, {"x": x})


def check(match: Match) -> str | None:
    """Constant filters, all of which see every channel."""
    for conv in match.nodes:
        for name in ("weight", "bias"):
            if argument(conv, name) is not None and match.graph.constant(argument(conv, name)) is None:
                return f"a {name} is not a constant"
    groups = argument(match.root, "groups")
    if groups != 1:
        return f"the channels are in {groups} groups"
    if match.val("x").dim() != argument(match.root, "weight").meta["val"].dim():
        return "the input has no batch dimension"
    return None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Stack the filters, read the input once, split the channels."""
    first = match.nodes[0]
    operands = [_stacked(rewriter, match, name) for name in ("weight", "bias")]
    geometry = [argument(first, name) for name in _GEOMETRY]
    merged = rewriter.call(first.target, match["x"], *operands, *geometry)  # type: ignore[arg-type]
    sizes = [node.meta["val"].shape[1] for node in match.nodes]
    parts = rewriter.call(aten.split_with_sizes.default, merged, sizes, 1)
    for index, node in enumerate(match.nodes):
        rewriter.replace(node, rewriter.call(operator.getitem, parts, index))


def _stacked(rewriter: Rewriter, match: Match, name: str) -> fx.Node | None:
    nodes = [argument(conv, name) for conv in match.nodes]
    parts = [part for node in nodes if (part := match.graph.constant(node)) is not None]
    return rewriter.constant(torch.cat(parts), nodes, "stacked") if parts else None


def _numbers(given: Any, spatial: int) -> Any:
    """One number a spatial dimension; one may stand for all of them."""
    if isinstance(given, int):
        return given
    return tuple(given) * (spatial if len(given) == 1 else 1)


# Not by default: on the CPU, ONNX Runtime keeps convolutions in a layout of its own that Split does not know.
PASS = register(Pass("merge_convolutions", "fuse", pattern, rewrite, check, level=3))
