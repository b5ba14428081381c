"""What the ONNX lowerings share: the opset, a way to emit any node, and the norms.

A lowering is called while ``torch.onnx.export`` traces. Its arguments are ``onnx_ir`` values whose shapes
hold an int for a fixed size and a named ``SymbolicDim`` for a dynamic one, and the ops that it calls are
recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import onnx.defs
import onnx_ir as ir
from onnxscript import opset23, values

from graphopt.ir.tuning import Tuning, spelled

# The first opset with Attention, RMSNormalization and RotaryEmbedding. ONNX Runtime 1.30 and 1.31 have
# kernels for all three on the CPU. Untyped, because onnxscript's annotations know nothing of onnx_ir.
OPSET = 23
op: Any = opset23

# An onnx_ir.Value. The exporter reads the annotations of a lowering and stumbles over the class itself.
Value: TypeAlias = Any


@functools.cache
def _declare(
    op_type: str,
    domain: str,
    version: int,
    inputs: int,
    outputs: int,
    attributes: tuple[tuple[str, str], ...],
) -> Any:
    """An onnxscript op of exactly these inputs, outputs and attributes; the exporter checks no types."""
    schema = onnx.defs.OpSchema
    parameter, optional = schema.FormalParameter, schema.FormalParameterOption.Optional
    declared = schema(
        op_type,
        domain,
        version,
        inputs=[parameter(f"x{i}", "tensor(float)", param_option=optional) for i in range(inputs)],
        outputs=[parameter(f"y{i}", "tensor(float)") for i in range(outputs)],
        attributes=[schema.Attribute(name, getattr(schema.AttrType, kind)) for name, kind in attributes],
    )
    return values.Op(values.Opset(domain, version), op_type, declared)


def emit(
    op_type: str,
    *inputs: Value | None,
    domain: str = "com.microsoft",
    version: int = 1,
    outputs: tuple[bool, ...] = (True,),
    **attributes: int | float | str | None,
) -> Any:
    """Emit one node that onnx has no schema of, or that shall have fewer outputs than its schema.

    Args:
        op_type: the node's operator.
        inputs: the node's inputs; None for an optional one that is left out.
        domain: the operator's domain; ONNX's own is the empty string.
        version: the opset that the operator is taken from.
        outputs: for every output up to the last that is wanted, whether it is.
        attributes: the node's attributes; None for one that is left out.

    Returns:
        The wanted output, or a tuple of them when there are more.
    """
    given = {name: x for name, x in attributes.items() if x is not None}
    kinds = tuple((name, ir.convenience.convert_attribute(name, x).type.name) for name, x in given.items())
    results = _declare(op_type, domain, version, len(inputs), len(outputs), kinds)(*inputs, **given)
    results = results if len(outputs) > 1 else (results,)
    for result, wanted in zip(results, outputs, strict=True):
        if not wanted:
            result.name = ""  # how ONNX writes an output that is not there
    kept = tuple(result for result, wanted in zip(results, outputs, strict=True) if wanted)
    return kept if len(kept) > 1 else kept[0]


def linear(x: Value, weight: Value, bias: Value | None = None) -> Any:
    """A projection as a Gemm, which reads a weight as PyTorch keeps it: its memory can be shared."""
    return projection(x, weight, bias, lambda rows: rows)


def projection(x: Value, weight: Value, bias: Value | None, epilogue: Callable[[Value], Any]) -> Any:
    """Gemm, and what follows it, over the rows of a tensor of any rank.

    MatMul wants the weight transposed: 440 MB copied for BERT-base. Gemm takes matrices only, so leading
    dimensions are folded into one; a Reshape moves nothing.

    Args:
        x: (..., K).
        weight: (N, K), as PyTorch keeps it.
        bias: (N,), or None for zeros.
        epilogue: called on the product, (rows, N), so that ONNX Runtime sees it next to the Gemm.

    Returns:
        (..., N).
    """
    features, outputs = weight.shape[1], weight.shape[0]
    flat = len(x.shape) == 2
    rows = x if flat else op.Reshape(x, _sizes([-1], features, weight, 1))
    product = epilogue(op.Gemm(*((rows, weight) if bias is None else (rows, weight, bias)), transB=1))
    if flat:
        return product
    static = [size if isinstance(size, int) else None for size in x.shape[:-1]]
    if static.count(None) <= 1:
        leading = [-1 if size is None else size for size in static]
        return op.Reshape(product, _sizes(leading, outputs, weight, 0))
    last = op.Shape(weight, start=0, end=1)
    return op.Reshape(product, op.Concat(op.Shape(x, start=0, end=-1), last, axis=0))


def dequantized(weight: Value, scale: Value, zero_point: Value | None = None) -> Any:
    """A weight (N, ...) of codes as numbers, by a scale and a zero point for each of N."""
    given = (weight, scale) if zero_point is None else (weight, scale, zero_point)
    numbers = op.DequantizeLinear(*given, axis=0)
    numbers.shape = weight.shape  # what is computed has none yet
    return numbers


def _sizes(leading: list[int], last: Any, like: Value, dim: int) -> Any:
    """A shape whose last size is a dimension of ``like``, a constant where that is known."""
    if isinstance(last, int):
        return op.Constant(value_ints=[*leading, last])
    size = op.Shape(like, start=dim, end=dim + 1)
    return op.Concat(op.Constant(value_ints=leading), size, axis=0) if leading else size


def ones_like_last_dim(x: Value) -> Any:
    """A vector of ones of shape (D,) for an x (..., D), in x's dtype."""
    return op.ConstantOfShape(op.Shape(x, start=-1), value=ir.tensor([1.0], dtype=x.dtype))


def layer_norm(x: Value, like: Value, weight: Value | None, bias: Value | None, eps: float) -> Any:
    """LayerNormalization over the last dimension; ``like`` lends its dtype and D when there is no weight."""
    weight = ones_like_last_dim(like) if weight is None else weight
    return emit("LayerNormalization", x, weight, bias, domain="", version=17, axis=-1, epsilon=eps)


def group_norm(
    x: Value, groups: int, weight: Value | None, bias: Value | None, eps: float, cudnn_enabled: bool = True
) -> Any:
    """A group norm as an instance norm of the groups, and a batch norm of mean 0 and variance 1 behind it.

    GroupNormalization is a function, which ONNX Runtime takes apart. At (1, 320, 64, 64) in 32 groups, with a
    SiLU, it takes 7.4 ms on one thread of an AVX-512 CPU, the instance norm with Mul and Add 6.5 ms, and with
    BatchNormalization for the two 2.9 ms (ONNX Runtime 1.31, float32).

    Args:
        x: (B, C, ...).
        groups: that the channels are divided into.
        weight: (C,), or None for ones.
        bias: (C,), or None for zeros.
        eps: added to the variance.
        cudnn_enabled: of PyTorch's op; says nothing here.
    """

    def filled(count: Value, value: float) -> Any:
        return op.ConstantOfShape(count, value=ir.tensor([value], dtype=x.dtype))

    each = op.Constant(value_ints=[groups])
    rows = op.Reshape(x, op.Constant(value_ints=[0, groups, -1]))
    normed = op.InstanceNormalization(rows, filled(each, 1.0), filled(each, 0.0), epsilon=eps)
    out = op.Reshape(normed, op.Shape(x))
    if weight is None and bias is None:
        return out
    channels = op.Shape(x, start=1, end=2)
    ones, zeros = filled(channels, 1.0), filled(channels, 0.0)
    scale, shift = ones if weight is None else weight, zeros if bias is None else bias
    return op.BatchNormalization(out, scale, shift, zeros, ones, epsilon=0.0)


def rms_norm(x: Value, like: Value, weight: Value | None, eps: float) -> Any:
    """RMSNormalization over the last dimension; ``like`` lends its dtype and D when there is no weight."""
    if weight is None or weight.dtype == like.dtype:
        weight = ones_like_last_dim(like) if weight is None else weight
        return op.RMSNormalization(x, weight, axis=-1, epsilon=eps)
    wide = op.RMSNormalization(op.Cast(x, to=int(weight.dtype)), weight, axis=-1, epsilon=eps)
    return op.Cast(wide, to=int(like.dtype))


# Whether a residual norm is one node. The CPU provider's fused kernels lose (see ``add_norm``).
_FUSED_ADD_NORM: dict[Tuning, bool] = {"any": True, "cpu": False, "portable": False}


def add_norm(
    fused: str, x: Value, residual: Value, weight: Value | None, bias: Value | None, eps: float
) -> tuple[Any, Any]:
    """A norm of ``x + residual`` and that sum, as the fused node or as two nodes.

    On the CPU the fused kernels lose: at (1, 128, 768) in float32 SkipLayerNormalization takes 0.504 ms
    against 0.075 ms for the two nodes, and SkipSimplifiedLayerNormalization 0.114 ms against 0.049 ms (ONNX
    Runtime 1.31, one thread of an AVX-512 CPU). They also round worse: SkipLayerNormalization makes 3 times
    the error at a mean of 0 and 12 times at one of 100. ``Sum`` stands for ``Add`` because ONNX Runtime fuses
    Add and LayerNormalization back into SkipLayerNormalization.

    Args:
        fused: "SkipLayerNormalization" or "SkipSimplifiedLayerNormalization" (no bias).
        x: (..., D).
        residual: of a shape that broadcasts to x's; one of the two may be float32 beside another x.
        weight: (D,), or None for ones.
        bias: (D,), or None for zeros.
        eps: added to the variance or to the mean square.

    Returns:
        The norm, of x's type, and the sum, both (..., D).
    """
    rank = len(x.shape) if x.shape is not None else None
    one_type = residual.dtype == x.dtype and (weight is None or weight.dtype == x.dtype)
    # the shapes that the fused nodes take
    if spelled(_FUSED_ADD_NORM) and one_type and rank in (2, 3) and x.shape == residual.shape:
        scale = ones_like_last_dim(x) if weight is None else weight
        kept = (True, False, False, True)
        normed, total = emit(fused, x, residual, scale, bias, outputs=kept, epsilon=eps)
        return normed, total
    if residual.dtype != x.dtype:
        return _add_norm_in_float32(fused, x, residual, weight, bias, eps)
    total = op.Sum(x, residual)
    if fused == "SkipLayerNormalization":
        return layer_norm(total, x, weight, bias, eps), total
    return rms_norm(total, x, weight, eps), total


def typed(result: Value, like: Value) -> Any:
    """A result that the exporter has not typed yet, of the type and shape of another value."""
    result.dtype, result.shape = like.dtype, None if like.shape is None else like.shape.copy()
    return result


def added(normed: Value, x: Value, residual: Value, add: Callable[[Value, Value], Any]) -> Any:
    """``residual + normed``, in float32 where one of the two is.

    Args:
        normed: the norm of x, of its type.
        x: (..., D).
        residual: of a shape that broadcasts to x's.
        add: ``op.Sum`` where a LayerNormalization may follow (see ``add_norm``); else ``op.Add``, which takes
            0.047 ms with the norm where Sum takes 0.049 ms, at (1, 128, 768) in float32 (ONNX Runtime 1.31,
            one thread of an AVX-512 CPU).
    """
    if residual.dtype == x.dtype:
        return add(residual, normed)
    kind = ir.DataType.FLOAT
    residual, normed = (
        value if dtype == kind else op.Cast(value, to=int(kind))
        for value, dtype in ((residual, residual.dtype), (normed, x.dtype))
    )
    return add(residual, normed)


def _add_norm_in_float32(
    fused: str, x: Value, residual: Value, weight: Value | None, bias: Value | None, eps: float
) -> tuple[Any, Any]:
    """A norm of a float32 sum, in x's type."""
    kind, like = ir.DataType.FLOAT, x if x.dtype == ir.DataType.FLOAT else residual
    x32, residual32, weight32, bias32 = (
        v if v is None or v.dtype == kind else op.Cast(v, to=int(kind)) for v in (x, residual, weight, bias)
    )
    total = op.Sum(x32, residual32)
    weight32 = ones_like_last_dim(like) if weight32 is None else weight32
    if fused == "SkipLayerNormalization":
        normed = layer_norm(total, like, weight32, bias32, eps)
    else:
        normed = op.RMSNormalization(total, weight32, axis=-1, epsilon=eps)
    return (normed if x.dtype == kind else op.Cast(normed, to=int(x.dtype))), total
