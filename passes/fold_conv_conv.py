"""conv(conv(x, w1, b1), w2, b2) -> conv(x, w, b), where one looks at single pixels, and it is cheaper.

By the weights alone, whatever the size of the image: multiplications a pixel of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument
from graphopt.passes._layers import (
    CONVOLUTIONS,
    Layer,
    also_read,
    bias_of_both,
    layer_of,
    refuse_range,
    with_arguments,
)


def pattern(graph: Graph) -> Iterator[Match]:
    """Every convolution of a convolution, one of them over single pixels, neither in groups."""
    for target in CONVOLUTIONS:
        for node in graph.fx.find_nodes(op="call_function", target=target):
            second = None if node._erased else layer_of(graph, node)
            first = None if second is None else layer_of(graph, second.source)
            if first is None or second is None or first.node.target not in CONVOLUTIONS:
                continue
            if first.groups == second.groups == 1 and (_pointwise(first) or _pointwise(second)):
                yield Match(graph, node, (first.node, node), {"first": first, "second": second})


def check(match: Match) -> str | None:
    """Constants, no border of zeros between, nobody who reads the hidden image, and fewer multiplications."""
    first, second = match["first"], match["second"]
    reason = first.constants() or second.constants() or also_read(first.node, second.node)
    if reason is not None:
        return str(reason)
    if _pointwise(second):
        if second.pads():
            return "the second convolution pads with zeros, which the first one's bias is not"
        if _strides(second) != 1 and argument(first.node, "padding") == "same":
            return "the first convolution keeps its size, which takes no stride"
    elif _strides(first) != 1 or first.pads():
        return "the first convolution leaves out pixels or adds some"
    elif second.pads() and first.bias is not None:
        return "the second convolution pads with zeros, which the first one's bias is not"
    apart, together = _multiplications(first, second)
    if together >= apart:
        return f"one convolution takes {2 * together} FLOPs a pixel, the two take {2 * apart}"
    weight, bias = _product(first, second)
    dtype = second.weight.meta["val"].dtype
    reason = refuse_range(weight, weight, dtype)
    return reason or (None if bias is None else refuse_range(bias, bias, dtype))


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Multiply the filters, in float64; the geometry is that of the one that sees more than a pixel."""
    first, second = match["first"], match["second"]
    weight, bias = _product(first, second)
    wide = first if _pointwise(second) else second
    kernel = wide.weight.meta["val"].shape[2:]
    dtype = second.weight.meta["val"].dtype
    made_from = [n for layer in (first, second) for n in (layer.weight, layer.bias) if n is not None]
    folded = weight.reshape(*weight.shape[:2], *kernel).to(dtype)
    changes: dict[str, Any] = {"input": first.source, "bias": None, "stride": _stride(first, second)}
    changes["weight"] = rewriter.constant(folded, made_from, "multiplied")
    if bias is not None:
        changes["bias"] = rewriter.constant(bias.to(dtype), made_from, "multiplied")
    rewriter.replace(match.root, with_arguments(rewriter, wide.node, **changes))


def _pointwise(layer: Layer) -> bool:
    return bool(math.prod(layer.weight.meta["val"].shape[2:]) == 1)


def _strides(layer: Layer) -> int:
    """How many pixels of the input there are for one of the result."""
    rank = layer.weight.meta["val"].dim() - 2
    stride: Any = argument(layer.node, "stride")
    return math.prod(stride) if len(stride) == rank else int(stride[0]) ** rank


def _stride(first: Layer, second: Layer) -> list[int]:
    rank = first.weight.meta["val"].dim() - 2
    strides: list[Any] = [argument(layer.node, "stride") for layer in (first, second)]
    one, two = (list(stride) if len(stride) == rank else [stride[0]] * rank for stride in strides)
    return [a * b for a, b in zip(one, two, strict=True)]


def _multiplications(first: Layer, second: Layer) -> tuple[int, int]:
    """For one pixel of the second's result: by the two, and by one."""
    sizes = [layer.weight.meta["val"] for layer in (first, second)]
    apart = sizes[0].numel() * _strides(second) + sizes[1].numel()
    taps = max(math.prod(size.shape[2:]) for size in sizes)
    return apart, sizes[0].shape[1] * sizes[1].shape[0] * taps


def _product(first: Layer, second: Layer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Filters (out, in, positions) and bias (out,) of both layers in one, in float64."""
    one, two = first.wide_weight()[0], second.wide_weight()[0]
    weight = torch.einsum("hik,ohl->oikl", one, two).flatten(2)
    return weight, bias_of_both(first, second, two.sum(2))


PASS = register(Pass("fold_conv_conv", "fold", pattern, rewrite, check))
