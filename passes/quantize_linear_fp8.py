"""activation(linear(x, w, b)) -> float8_linear(quantize_rows(x), w8, scale, b, activation)."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.evaluate import hint_shape
from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, is_getitem
from graphopt.ir.pattern import Match, argument
from graphopt.kernels._float8_triton import WITH_FLOAT8
from graphopt.kernels._triton import capability
from graphopt.kernels.add_layer_norm import OP as ADD_LAYER_NORM
from graphopt.kernels.float8_linear import OP as FLOAT8_LINEAR
from graphopt.kernels.linear_activation import OP as LINEAR_ACTIVATION
from graphopt.kernels.quantize_rows import LARGEST
from graphopt.kernels.quantize_rows import OP as QUANTIZE_ROWS

aten = torch.ops.aten

_LINEARS = (aten.linear.default, LINEAR_ACTIVATION.overload)
_HALF = (torch.float16, torch.bfloat16)
_MULTIPLE = 16  # of both sizes of a weight, as cuBLAS wants them
# Fitted to one H100, weights not in its L2 cache. A product of (4096, 8192) to 8192 takes 462 us instead of
# 790, (128, 8192) to 8192 31.8 instead of 52.7, (4096, 3072) to 768 22.1 instead of 28.5, and (4096, 768) to
# 2304 23.3 instead of 24.8: what starts and ends one is no shorter. Rows are quantized in 36 us at (4096,
# 8192), in 8.9 at (4096, 3072) and in 2.6 at (4096, 768); behind a norm, in its kernel, in less than 1 there.
_PRODUCTS, _BYTES, _ENDS_US, _KERNEL_US = 1e15, 3e12, 4.0, 1.0


def pattern(graph: Graph) -> Iterator[Match]:
    """Every projection, with or without an activation."""
    for node in graph.calls:
        if not node._erased and node.target in _LINEARS:
            yield Match(graph, node, (node,), {"weight": argument(node, "weight")})


def check(match: Match) -> str | None:
    """The weight is a constant in half precision, on a GPU with float8, and the product saves something."""
    weight, x = match.constant("weight"), _input(match.root).meta["val"]
    if weight is None:
        return "the weight is not a constant"
    if weight.dim() != 2 or weight.dtype not in _HALF or x.dtype != weight.dtype:
        return f"the weight is {weight.dtype} of {weight.dim()} dimensions, not of half precision and 2"
    reason = _refused_sizes(*weight.shape) or _refused_device(weight.device)
    if reason is not None:
        return reason
    if not _is_plain(match.root) and argument(match.root, "residual") is not None:
        return "a residual is added behind the activation"
    if not bool(weight.isfinite().all()):
        return "the weight is not finite"
    rows, source = math.prod(hint_shape(x)[:-1]), _input(match.root)
    saved = saved_us(rows, *weight.shape)
    spent = quantizing_us(rows, weight.shape[1], _is_normed(source))
    spent /= sum(user.target in _LINEARS for user in source.users)
    if saved > spent:
        return None
    sizes = f"({rows}, {weight.shape[1]}) to {weight.shape[0]}"
    return f"{sizes} is about {saved:.1f} us shorter in float8, and quantizing the input takes {spent:.1f} us"


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Round the weight to a scale for each output; the rows of the input are quantized at each call.

    Projections of one value quantize it once: ``merge_common_subexpressions`` runs behind this pass.
    """
    root, weight, source = match.root, match.constant("weight"), match["weight"]
    assert weight is not None
    codes, scale = quantized(weight)
    made = (
        rewriter.constant(codes, [source], "in float8"),
        rewriter.constant(scale, [source], "a scale a row"),
    )
    rows = rewriter.call(QUANTIZE_ROWS.overload, _input(root))
    parts = (rewriter.call(operator.getitem, rows, place) for place in range(2))
    epilogue = () if _is_plain(root) else (argument(root, "activation"), argument(root, "parameter"))
    given = (*parts, *made, root.meta["val"].dtype, argument(root, "bias"), *epilogue)
    rewriter.replace(root, rewriter.call(FLOAT8_LINEAR.overload, *given))


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, float8_e4m3fn, and a scale for each row in float32: (N, K) and (N,).

    The arithmetic is float64's, and the one rounding is to the nearest number of the format, of two that are
    as near to the even one: a conversion from float64 would round to float32 on its way.
    """
    largest = weight.double().abs().amax(1)
    scale = torch.where(largest == 0, 1.0, largest / LARGEST).float()
    exact = weight.double() / scale.double()[:, None]
    exponent = torch.frexp(exact).exponent - 1
    step = torch.exp2((exponent.clamp_min(-6) - 3).double())  # below 2 ** -6 numbers are equally spaced
    codes = (exact / step).round() * step
    return codes.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def saved_us(rows: int, outputs: int, features: int) -> float:
    """What float8 saves of a product in half precision: half of the longer of computing and reading.

    None where that is shorter than the ends of a product, in which the difference is lost.
    """
    longer = max(rows * outputs * features / _PRODUCTS, outputs * features / _BYTES)
    return max(1e6 * longer - _ENDS_US, 0.0)


def quantizing_us(rows: int, features: int, normed: bool) -> float:
    """A byte written for each number; but for a norm's, whose kernel has it, in a kernel that reads first."""
    return 1e6 * (1 if normed else 3) * rows * features / _BYTES + (0.0 if normed else _KERNEL_US)


def _refused_sizes(outputs: int, features: int) -> str | None:
    if outputs % _MULTIPLE == 0 and features % _MULTIPLE == 0:
        return None
    return f"the weight is ({outputs}, {features}), and float8 products take multiples of {_MULTIPLE}"


def _refused_device(device: torch.device) -> str | None:
    have = capability(device)
    if have >= WITH_FLOAT8:
        return None
    if device.type != "cuda":
        return f"the weight is on {device}: fp8 is for GPUs"
    return f"the GPU is sm_{have[0]}{have[1]}: float8 products take sm_89"


def _input(node: fx.Node) -> fx.Node:
    """What a projection reads now: an earlier rewrite may have replaced what it read when it was found."""
    found: fx.Node = argument(node, "input" if _is_plain(node) else "x")
    return found


def _is_normed(node: fx.Node) -> bool:
    """True for what the cuda executor joins with its codes: see ``runtime/joining.py``."""
    source: Any = node.args[0] if is_getitem(node) and node.args[1] == 0 else None
    return source is not None and source.target is ADD_LAYER_NORM.overload


def _is_plain(node: fx.Node) -> bool:
    return node.target is aten.linear.default


PASS = register(Pass("quantize_linear_fp8", "cast", pattern, rewrite, check, level=3, exact=False))
