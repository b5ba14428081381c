"""linear(x, (w8 - z) * scale, b) -> quantized_linear(x, w8, scale, b, z): the weight stays in 8 bits.

The weight is spelled with a cast, or with a quantizer's calls of a constant: dequantize(w8),
dequantize(quantize(w)) or fake_quantize(w).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.compiler.evaluate import evaluate
from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument, shared_inside
from graphopt.kernels.quantized_linear import OP as QUANTIZED_LINEAR
from graphopt.passes._quantized import coding, is_call

aten = torch.ops.aten

_CODES = (torch.int8, torch.uint8)


@dataclass(frozen=True)
class _Weight:
    """What a float weight is made of.

    Args:
        codes: (N, K), int8 or uint8.
        scale: (N,), floating.
        zero_point: (N,), of the codes' type; None for zeros.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None


def pattern(graph: Graph) -> Iterator[Match]:
    """Every projection whose weight is made of integers."""
    for linear in graph.fx.find_nodes(op="call_function", target=aten.linear.default):
        weight: Any = argument(linear, "weight")
        made = None if linear._erased else _made_by_calls(graph, weight) or _made_by_cast(graph, weight)
        if made is not None:
            nodes, bound = made
            yield Match(graph, linear, tuple(sorted([*nodes, linear])), {"linear": linear, **bound})


def check(match: Match) -> str | None:
    """8-bit integers, a constant scale a row in the type of the product, and no other reader."""
    made = _weight(match)
    if isinstance(made, str):
        return made
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Keep the integers: folded, the weight would take four times the memory."""
    made, linear, codes = _weight(match), match["linear"], match["weight"]
    assert isinstance(made, _Weight)
    if match.constant("weight") is not made.codes:
        codes = rewriter.constant(made.codes, [codes], "quantized")
    scale = rewriter.constant(made.scale, _nodes(match["scale"]), "a scale a row")
    operands = [argument(linear, "input"), codes, scale, argument(linear, "bias")]
    if made.zero_point is not None:
        points = rewriter.constant(made.zero_point, _nodes(match["zero_point"]), "a zero point a row")
        operands.append(points)
    rewriter.replace(linear, rewriter.call(QUANTIZED_LINEAR.overload, *operands))


def _nodes(value: Any) -> list[fx.Node]:
    return [value] if isinstance(value, fx.Node) else []


def _weight(match: Match) -> _Weight | str:
    """What the weight is made of, or why it cannot be kept in 8 bits."""
    return _weight_of_call(match) if "call" in match.bindings else _weight_of_cast(match)


def _made_by_cast(graph: Graph, scaled: Any) -> tuple[list[fx.Node], dict[str, Any]] | None:
    """``w8.to(float) * scale``, ``(w8.to(float) - zero_point) * scale``."""
    if scaled.target is not aten.mul.Tensor:
        return None
    for centred, scale in (scaled.args[:2], scaled.args[1::-1]):
        nodes, cast, zero_point = [scaled], centred, None
        if isinstance(centred, fx.Node) and centred.target is aten.sub.Tensor and not centred.kwargs:
            cast, zero_point = centred.args[:2]
            nodes.append(centred)
        is_cast = isinstance(cast, fx.Node) and cast.target is aten.to.dtype
        if is_cast and graph.constant(cast.args[0]) is not None:
            bound = {"weight": cast.args[0], "scale": scale, "zero_point": zero_point}
            return [*nodes, cast], bound
    return None


def _made_by_calls(graph: Graph, call: Any) -> tuple[list[fx.Node], dict[str, Any]] | None:
    """A quantizer's calls of a constant."""
    if not is_call(call, "dequantize") and not is_call(call, "fake_quantize"):
        return None
    source, nodes = call.args[0], [call]
    if is_call(source, "quantize") and is_call(call, "dequantize"):
        nodes.append(source)
        source = source.args[0]
    if graph.constant(source) is None:
        return None
    return nodes, {"call": call, "weight": source, "scale": call.args[1], "zero_point": call.args[2]}


def _weight_of_cast(match: Match) -> _Weight | str:
    weight, scale, linear = match.constant("weight"), match["scale"], match["linear"]
    assert weight is not None
    if weight.dtype not in _CODES or weight.dim() != 2:
        return f"the weight is {weight.dtype} of {weight.dim()} dimensions, not int8 or uint8 of 2"
    x = argument(linear, "input").meta["val"].dtype
    rows: dict[str, torch.Tensor] = {}
    for name, given in (("scale", scale), ("zero point", match["zero_point"] or 0)):
        values = match.graph.constant(given) if isinstance(given, fx.Node) else torch.tensor(given)
        if values is None:
            return f"the {name} is not a constant"
        if tuple(values.shape) not in ((), (1,), (1, 1), (weight.shape[0], 1)):
            return f"the {name} has shape {list(values.shape)}, not one value a row"
        rows[name] = values.reshape(-1).expand(weight.shape[0]).to(weight.device)
    if isinstance(scale, fx.Node) and rows["scale"].dtype != x:
        return f"the scale is {rows['scale'].dtype}, the product {x}"
    zeros = rows["zero point"].to(weight.dtype)
    if not torch.equal(zeros.double(), rows["zero point"].double()):
        return "the zero point is no integer of 8 bits"
    return _Weight(weight, rows["scale"].to(x).contiguous(), zeros.contiguous() if zeros.any() else None)


def _weight_of_call(match: Match) -> _Weight | str:
    call, source, x = match["call"], match.constant("weight"), argument(match["linear"], "input").meta["val"]
    found = coding(match.graph, call)
    assert source is not None
    if found is None:
        return "the scale or the zero point is not a constant"
    if source.dim() != 2 or found.axis not in (None, 0):
        return f"the scales are those of dimension {found.axis} of {source.dim()}, not one a row"
    fitting = [t for t in _CODES if torch.iinfo(t).min <= found.low and found.high <= torch.iinfo(t).max]
    if not fitting:
        return f"codes from {found.low} to {found.high} have more than 8 bits"
    if call.meta["val"].dtype != torch.float32 or x.dtype != torch.float32:
        return f"the weight is dequantized to {call.meta['val'].dtype}, not to float32"
    dtype = source.dtype if source.dtype in fitting else fitting[0]
    scale, zero = (vector.reshape(-1).expand(source.shape[0]) for vector in (found.scale, found.zero_point))
    if not torch.equal(zero.to(dtype).to(zero.dtype), zero):
        return "the zero point is no integer of 8 bits"
    (wanted,) = evaluate(match.graph, [call], {})
    codes = source if source.dtype == dtype else (wanted.cpu() / scale[:, None] + zero[:, None]).round()
    scale, zero, codes = scale.float(), zero.to(dtype), codes.to(dtype)
    same = torch.equal((codes.cpu().float() - zero[:, None].float()) * scale[:, None], wanted.cpu())
    if not same:
        return "the weight is no multiple of its scale"
    device = source.device
    return _Weight(
        codes.to(device),
        scale.to(device).contiguous(),
        zero.to(device).contiguous() if zero.any() else None,
    )


PASS = register(Pass("fuse_quantized_linear", "fuse", pattern, rewrite, check))
