"""A projection whose weight stays in 4 or 8 bits, with a scale for each block of a row.

    codes = the bits of weight, low ones first                  whole numbers from 0 to 2 ** bits - 1
    w = (codes - 2 ** (bits - 1)) * scale of the block
    out = activation(x @ w.T + bias)

x is not quantized: a step of a decoder reads every weight for one token, so that its time is that of
reading them. With ``rounds_input`` x is rounded to 8 bits as it comes, and blocks are multiplied in integers:

    step = max|x of the block| / 127, codes = round(x / step)

On a GPU nothing is gained by that: x stays as it is there.

The layout is that of ONNX Runtime's MatMulNBits: two codes a byte where there are 4 bits, the first in the
low half; the last block of a row is filled up.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861), section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.ir.tuning import Tuning, spelled
from graphopt.kernels._activations import TORCH, finished, require_known
from graphopt.kernels._block_quantized_triton import block_quantized_product
from graphopt.kernels._linear_triton import refuse_product
from graphopt.kernels._onnx import Value, emit, linear, op
from graphopt.kernels._shape import product_cost, require, require_floating, shape_of
from graphopt.kernels._triton import INTERPRETED, version

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, int bits, Tensor? bias=None, *, bool rounds_input=False,"
    ' str activation="none", float parameter=1.0) -> Tensor'
)
_BITS = (4, 8)
_LEAST_BLOCK = 16  # that ONNX Runtime has


# Triton 3.6 gives each thread 8 numbers of a product that is 16 deep: there are some for two threads in four.
WHOLE_BLOCKS = (3, 9)


def _shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None = None,
    *,
    rounds_input: bool = False,
    activation: str = "none",
    parameter: float = 1.0,
) -> torch.Tensor:
    """The shape rule.

    Args:
        x: (..., K) of two dimensions or more, floating; K is no symbol.
        weight: (N, ceil(K / block), block * bits / 8), uint8; N is no symbol.
        scale: (N, ceil(K / block)), x's dtype.
        bits: of a weight: 4 or 8.
        bias: (N,), x's dtype; None for zeros.
        rounds_input: x is rounded to 8 bits, block by block, where a kernel gains by it.
        activation: a name of ``kernels/_activations.py``.
        parameter: of the activation, where it has one.

    Returns:
        An empty (..., N) of x's dtype.

    Raises:
        ValueError: a shape or dtype does not fit, or the activation is unknown.
    """
    name = "block_quantized_linear"
    require_known(name, activation)
    require_floating(name, x=x, scale=scale, bias=bias)
    require(bits in _BITS, f"{name}: bits must be 4 or 8, not {bits}")
    require(weight.dtype == torch.uint8, f"{name}: weight must be torch.uint8, not {weight.dtype}")
    require(x.dim() >= 2, f"{name}: x must have two dimensions or more, not {shape_of(x)}")
    require(weight.dim() == 3, f"{name}: weight must be (rows, blocks, bytes), not {shape_of(weight)}")
    # The sizes are attributes of ONNX Runtime's node: whatever was left open of them is settled here.
    features, (rows, blocks, width) = int(x.shape[-1]), map(int, weight.shape)
    block = width * 8 // bits
    known = block >= _LEAST_BLOCK and block & (block - 1) == 0
    require(known, f"{name}: a block must be a power of 2 from {_LEAST_BLOCK} on, not {block} weights")
    fits = blocks == -(-features // block) > 0
    require(fits, f"{name}: weight {shape_of(weight)} of {bits} bits does not fit x {shape_of(x)}")
    wanted = {"scale": (scale, (rows, blocks)), "bias": (bias, (rows,))}
    for label, (tensor, shape) in wanted.items():
        fits = tensor is None or tensor.shape == shape
        require(fits, f"{name}: {label} {shape_of(tensor)} does not fit weight {shape_of(weight)}")
    return x.new_empty((*x.shape[:-1], rows))


def _reference(
    x: torch.Tensor,
    weight_NBC: torch.Tensor,
    scale_NB: torch.Tensor,
    bits: int,
    bias_N: torch.Tensor | None = None,
    *,
    rounds_input: bool = False,
    activation: str = "none",
    parameter: float = 1.0,
) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, block = x.to(wide), weight_NBC.shape[2] * 8 // bits
    if rounds_input:
        rows = rounded(rows, block)
    weight_NK = dequantized(weight_NBC, scale_NB.to(wide), bits, x.shape[-1])
    out = F.linear(rows, weight_NK, None if bias_N is None else bias_N.to(wide))
    return TORCH[activation](out, parameter).to(x.dtype).contiguous()


def packed(codes_NBK: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes, whole numbers of any type, as a weight: (N, blocks, block) to (N, blocks, bytes), uint8."""
    codes = codes_NBK.to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4 if bits == 4 else codes


def unpacked(weight_NBC: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of a weight: (N, blocks, bytes) to (N, blocks, block), uint8."""
    if bits == 8:
        return weight_NBC
    return torch.stack([weight_NBC & 15, weight_NBC >> 4], -1).flatten(-2)


def dequantized(weight_NBC: torch.Tensor, scale_NB: torch.Tensor, bits: int, features: int) -> torch.Tensor:
    """The numbers that a weight stands for, of scale's dtype: (N, features)."""
    centred_NBK = unpacked(weight_NBC, bits).to(scale_NB.dtype).sub_(2 ** (bits - 1))
    return centred_NBK.mul_(scale_NB[..., None]).flatten(1)[:, :features]


def rounded(x: torch.Tensor, block: int) -> torch.Tensor:
    """Rows as 8 bits hold them, with a step for each block: (..., K)."""
    filled: torch.Tensor = F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    step = filled.abs().amax(-1, keepdim=True) / 127
    codes = (filled / torch.where(step == 0, 1.0, step)).round_()
    return codes.mul_(step).flatten(-2)[..., : x.shape[-1]]


def _cost(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None = None,
    *,
    rounds_input: bool = False,
    activation: str = "none",
    parameter: float = 1.0,
) -> Cost:
    """One matrix product; of a weight its bits are read."""
    return product_cost(x, (weight.shape[0], x.shape[-1]), weight, scale, bias)


def _refuses(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None = None,
    *,
    rounds_input: bool = False,
    activation: str = "none",
    parameter: float = 1.0,
) -> str | None:
    reason = refuse_product(x, weight, scale, bias)
    if reason is None and bits == 4 and weight.shape[2] == 8 and not INTERPRETED and version() < WHOLE_BLOCKS:
        return "Triton before 3.9 lays out a product of 16 codes of 4 bits wrong"
    return reason


# Whether one node takes the packed weight; ONNX's own operators have to unpack it first.
_TAKES_BLOCKS: dict[Tuning, bool] = {"any": True, "portable": False}
_INTEGERS = 4  # MatMulNBits' accuracy level of products in 8 bits; 1 is float32


def _onnx(
    x: Value,
    weight: Value,
    scale: Value,
    bits: int,
    bias: Value | None = None,
    *,
    rounds_input: bool = False,
    activation: str = "none",
    parameter: float = 1.0,
) -> Any:
    """MatMulNBits; where that is not to be had, the codes in plain nodes, which a runtime folds as it loads.

    There x is not rounded: no kernel would gain by it.
    """
    given, kind, features = x.dtype, ir.DataType.FLOAT, _number(x.shape[-1])
    x, scale, bias = (
        v if v is None or v.dtype == kind else op.Cast(v, to=int(kind)) for v in (x, scale, bias)
    )
    rows, _, width = map(_number, weight.shape)
    if spelled(_TAKES_BLOCKS):
        inputs = (x, weight, scale) if bias is None else (x, weight, scale, None, None, bias)
        out = emit(
            "MatMulNBits",
            *inputs,
            K=features,
            N=rows,
            bits=bits,
            block_size=width * 8 // bits,
            accuracy_level=_INTEGERS if rounds_input else 1,
        )
    else:
        out = linear(x, _dequantized(weight, scale, bits, features), bias)
    return finished(out, activation, parameter, given)


def _number(size: Any) -> int:
    """A size; one that was open and that the shape rule settled is a symbol called by its number."""
    return size if isinstance(size, int) else int(size.value)


def _dequantized(weight: Value, scale: Value, bits: int, features: int) -> Any:
    """``dequantized`` in ONNX's own operators."""
    rows, blocks, width = map(_number, weight.shape)
    codes = weight
    if bits == 4:
        low = op.BitwiseAnd(weight, op.CastLike(op.Constant(value_int=15), weight))
        high = op.BitShift(weight, op.CastLike(op.Constant(value_int=4), weight), direction="RIGHT")
        last = op.Constant(value_ints=[-1])
        codes = op.Concat(op.Unsqueeze(low, last), op.Unsqueeze(high, last), axis=-1)
    codes = op.Reshape(codes, op.Constant(value_ints=[rows, blocks, width * 8 // bits]))
    centred = op.Sub(op.CastLike(codes, scale), op.Constant(value_float=float(2 ** (bits - 1))))
    numbers = op.Mul(centred, op.Unsqueeze(scale, op.Constant(value_ints=[-1])))
    flat = op.Reshape(numbers, op.Constant(value_ints=[rows, -1]))
    start, end, axis = (op.Constant(value_ints=[value]) for value in (0, features, 1))
    made = op.Slice(flat, start, end, axis)
    made.shape = ir.Shape([rows, features])  # what is computed has none yet
    return made


def _samples() -> Iterator[Sample]:
    x, scale, bias = torch.randn(2, 5, 48), (torch.rand(20, 3) + 0.5) / 32, torch.randn(20)
    weight = torch.randint(0, 256, (20, 3, 8), dtype=torch.uint8)
    yield Sample((x, weight, scale, 4, bias), label="4 bits, bias")
    yield Sample((x, weight, -scale, 4), label="4 bits, negative scales")
    yield Sample((x[:, 0, :40], weight, scale, 4, bias), label="4 bits, two dimensions, a block not full")
    wide, finer = torch.randint(0, 256, (20, 3, 16), dtype=torch.uint8), scale / 16
    yield Sample((x, wide, finer, 8, bias), label="8 bits, bias")
    yield Sample((x[..., :33], wide, finer, 8), label="8 bits, a block not full")
    yield Sample((1e2 * x, wide, finer, 8, bias), label="large magnitudes")
    for activation in ("silu", "gelu", "quick_gelu"):
        options = {"activation": activation, "parameter": 1.702}
        yield Sample((x, weight, scale, 4, bias), options, label=activation)
    # whole numbers with 127 among them in each block are what 8 bits hold
    whole = torch.randint(-127, 128, (2, 5, 48)).float()
    whole[..., ::16] = 127
    yield Sample((whole, weight, scale, 4, bias), {"rounds_input": True}, label="4 bits, a rounded input")
    yield Sample((whole, wide, finer, 8, bias), {"rounds_input": True}, label="8 bits, a rounded input")


def _bad_samples() -> Iterator[BadSample]:
    x, weight, scale = torch.randn(2, 48), torch.ones(20, 3, 8, dtype=torch.uint8), torch.ones(20, 3)
    yield BadSample((x, weight, scale, 3), match="bits must be 4 or 8, not 3")
    yield BadSample((x, weight.char(), scale, 4), match="weight must be torch.uint8")
    yield BadSample((x, weight.flatten(1), scale, 4), match=r"weight must be \(rows, blocks, bytes\)")
    yield BadSample((x[0], weight, scale, 4), match="x must have two dimensions or more")
    yield BadSample((x, weight[..., :4], scale, 4), match="a block must be a power of 2 from 16 on, not 8")
    yield BadSample((x, weight.repeat(1, 1, 3), scale, 8), match="a block must be a power of 2 .* not 24")
    yield BadSample((x[:, :32], weight, scale, 4), match="of 4 bits does not fit x")
    yield BadSample((x, weight, scale[:, :2], 4), match=r"scale \(20, 2\) does not fit")
    yield BadSample((x, weight, scale, 4, scale[:3, 0]), match=r"bias \(3,\) does not fit")
    yield BadSample((x, weight, scale, 4), {"activation": "swish"}, match="activation is one of")


TRITON = TritonFace(block_quantized_product, _refuses)
OP = register(
    Op("block_quantized_linear", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, TRITON)
)
