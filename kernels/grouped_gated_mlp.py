"""The first half of the gated feed-forward blocks of a mixture of experts, one expert a group of rows.

    out[s] = act(x[s] @ gate_weight[e]) * (x[s] @ up_weight[e])    for the expert e of row s

The rows are sorted by expert: ``ends[e]`` is the row behind the last one of expert e, and rows behind the
last of all become zeros. Without ``ends`` every expert has rows of its own, (E, S, D). ``act`` is as for
``gated_mlp``.

Source: Jiang et al., Mixtral of Experts (arXiv:2401.04088), section 2.1; rows in groups as in Gale et al.,
MegaBlocks (arXiv:2211.15841), section 5.1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels import gated_mlp
from graphopt.kernels._linear_configs import FEW_ROWS, chip_of, grouped_configs
from graphopt.kernels._linear_tile import epilogue, gated_sums, prefetch_weights, tile_of
from graphopt.kernels._linear_triton import refuse_product
from graphopt.kernels._onnx import Value, emit, op
from graphopt.kernels._rows import power_of_two
from graphopt.kernels._shape import nbytes, require, require_floating, shape_of
from graphopt.kernels._triton import (
    as_rows,
    capability,
    jit,
    launch,
    tl,
    triton,
    wait_for_all,
    wait_for_inputs,
)
from graphopt.kernels._tuning import choose

SCHEMA = "(Tensor x, Tensor weight, Tensor? ends=None, str activation='silu', bool up_first=False) -> Tensor"


def _shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor | None = None,
    activation: str = "silu",
    up_first: bool = False,
) -> torch.Tensor:
    """The shape rule.

    Args:
        x: (S, D) with ends, (E, S, D) without; floating.
        weight: (E, D, 2 I), x's dtype: gate and up weights side by side.
        ends: (E,), int32 or int64, not decreasing, none above S.
        activation: "silu", "gelu", "gelu_tanh", "relu" or "sigmoid".
        up_first: whether the up weights come first, not the gate's.

    Returns:
        An empty (S, I) or (E, S, I) of x's dtype.

    Raises:
        ValueError: a shape or dtype does not fit, or the activation is not known.
    """
    name = "grouped_gated_mlp"
    known = ", ".join(gated_mlp.ACTIVATIONS)
    require(activation in gated_mlp.ACTIVATIONS, f"{name}: activation is one of {known}, not {activation!r}")
    require_floating(name, x=x, weight=weight)
    fits = weight.dim() == 3 and x.dim() == (3 if ends is None else 2) and x.shape[-1] == weight.shape[1]
    fits = fits and (ends is not None or x.shape[0] == weight.shape[0])
    require(fits, f"{name}: weight {shape_of(weight)} does not fit x {shape_of(x)}")
    require(weight.shape[2] % 2 == 0, f"{name}: weight {shape_of(weight)} has no two halves")
    if ends is not None:
        fits = ends.dim() == 1 and ends.shape[0] == weight.shape[0]
        fits = fits and ends.dtype in (torch.int32, torch.int64)
        require(fits, f"{name}: ends {shape_of(ends)} of {ends.dtype} does not fit weight {shape_of(weight)}")
    return x.new_empty((*x.shape[:-1], weight.shape[2] // 2))


def _reference(
    x: torch.Tensor,
    weight_EDJ: torch.Tensor,
    ends_E: torch.Tensor | None = None,
    activation: str = "silu",
    up_first: bool = False,
) -> torch.Tensor:
    product = torch.bmm(x, weight_EDJ) if ends_E is None else _grouped_product(x, weight_EDJ, ends_E)
    gate, up = product.chunk(2, dim=-1)[:: -1 if up_first else 1]
    return (gated_mlp.ACTIVATIONS[activation](gate) * up).contiguous()


def _grouped_product(x_SD: torch.Tensor, weight_EDJ: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """(S, J): every row times its expert's weight; zeros behind the last expert's."""
    if has_grouped_product(x_SD, weight_EDJ):
        return _on_gpu(x_SD, weight_EDJ, ends_E)
    out = x_SD.new_zeros(x_SD.shape[0], weight_EDJ.shape[2])
    start = 0
    for weight_DJ, end in zip(weight_EDJ, ends_E.tolist(), strict=True):
        out[start:end] = x_SD[start:end] @ weight_DJ
        start = end
    return out


def has_grouped_product(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether PyTorch's grouped product multiplies these without reading their ends on the host.

    So it does for bfloat16 with rows of whole 16 bytes on GPUs of sm_90 and sm_100.

    Args:
        x: (S, D).
        weight: (E, D, J).
    """
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    fits = x.is_cuda and x.dtype == torch.bfloat16 and aligned and x.is_contiguous()
    return fits and capability(x.device)[0] in (9, 10)


def _on_gpu(x_SD: torch.Tensor, weight_EDJ: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """The same by PyTorch's grouped product, which leaves the rows behind the last expert's as they are."""
    product: torch.Tensor = F.grouped_mm(x_SD, weight_EDJ, offs=ends_E.to(torch.int32))
    inside_S = torch.arange(x_SD.shape[0], device=x_SD.device) < ends_E[-1]
    return product.where(inside_S[:, None], 0.0)


def _cost(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor | None = None,
    activation: str = "silu",
    up_first: bool = False,
) -> Cost:
    """Two products a row; every expert's weights are read, which few rows may not need."""
    rows, columns = x.numel() // x.shape[-1], weight.shape[2]
    moved = nbytes(x, weight, ends) + rows * (columns // 2) * x.element_size()
    return Cost(flops=2.0 * rows * x.shape[-1] * columns, bytes=moved)


@jit
def _group_of(tile, ends_ptr, E, M, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whose rows a row tile holds: expert, first row, and the row behind the last of them.

    Every expert's rows begin a tile of their own; what is left behind the last end is one more group, E. A
    tile behind all of them has no rows. Ends out of order or out of bounds lead to wrong rows, but none
    outside of the matrix.
    """
    groups = tl.arange(0, GROUPS)
    ends = tl.load(ends_ptr + groups, mask=groups < E, other=M)
    starts = tl.load(ends_ptr + groups - 1, mask=(groups > 0) & (groups <= E), other=0)
    starts = tl.where(groups <= E, tl.minimum(tl.maximum(starts, 0), M), M).to(tl.int32)
    ends = tl.minimum(tl.maximum(ends, starts), M).to(tl.int32)
    tiles = tl.cdiv(ends - starts, BLOCK_M)
    behind = tl.cumsum(tiles, 0)
    group = tl.sum((behind <= tile).to(tl.int32), 0)
    mine = groups == group
    first = tl.sum(tl.where(mine, starts + (tile - (behind - tiles)) * BLOCK_M, 0), 0)
    return group, first, tl.sum(tl.where(mine, ends, 0), 0)


@jit
def _grouped_gated_mlp_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    gate_ptr,
    up_ptr,
    ends_ptr,
    E,
    M,
    N,
    K,
    row_tiles,
    stride_xm,
    stride_we,
    stride_wk,
    stride_wn,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    tile, tile_n = tile_of(tl.program_id(0), row_tiles * BLOCK_M, N, BLOCK_M, BLOCK_N, GROUP_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if ends_ptr is None:  # M // E rows an expert
        tiles = row_tiles // E
        expert = tile // tiles
        first, end = expert * (M // E) + tile % tiles * BLOCK_M, (expert + 1) * (M // E)
        if PDL == 2 and PREFETCH:  # else nobody knows yet whose weights
            offset = expert.to(tl.int64) * stride_we
            prefetch_weights(gate_ptr + offset, columns % N, stride_wn, 0, K, BLOCK_K)
            prefetch_weights(up_ptr + offset, columns % N, stride_wn, 0, K, BLOCK_K)
    wait_for_inputs(PDL)
    if ends_ptr is not None:
        expert, first, end = _group_of(tile, ends_ptr, E, M, BLOCK_M, GROUPS)
    # Rows and columns that are not this tile's are read in bounds without a mask, and never stored.
    ks, rows = tl.arange(0, BLOCK_K), first + tl.arange(0, BLOCK_M)
    row, column = tl.minimum(rows, M - 1).to(tl.int64)[:, None], (columns % N).to(tl.int64)[None, :]
    x_ptrs = x_ptr + row * stride_xm + ks[None, :]
    weights = expert.to(tl.int64) * stride_we
    gate_ptrs = gate_ptr + weights + column * stride_wn + ks[:, None] * stride_wk
    up_ptrs = up_ptr + weights + column * stride_wn + ks[:, None] * stride_wk
    depth = tl.where((expert < E) & (first < end), K, 0)  # rows without an expert become zeros
    gate, up = gated_sums(
        x_ptrs, gate_ptrs, up_ptrs, depth, stride_wk, stride_wk, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K
    )
    out = epilogue(gate, 1.0, ACTIVATION) * up
    inside = (rows < end)[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor | None = None,
    activation: str = "silu",
    up_first: bool = False,
) -> torch.Tensor:
    """As many programs as any ends may need: those that these do not need leave without a product."""
    x_MK, (E, K, columns) = as_rows(x), weight.shape
    M, N = x_MK.shape[0], columns // 2
    out = x.new_empty(*x.shape[:-1], N)
    halves = weight[..., :N], weight[..., N:]
    gate, up = reversed(halves) if up_first else halves
    together = weight.stride(1) == 1
    key = M, N, K, E, x.dtype, together, weight.stride(2) == 1, ends is None
    chip = chip_of(x.device)
    candidates = grouped_configs(M, E, x.element_size(), chip)
    config = choose(_grouped_gated_mlp_kernel, x.device, key, candidates)
    m, n, k = (config.tiles[f"BLOCK_{letter}"] for letter in "MNK")
    groups = min(E + 1, M)  # that have rows; the last tile of each lacks m - 1 of its own at most
    tiles = E * triton.cdiv(x.shape[1], m) if ends is None else (M + groups * (m - 1)) // m
    args = out, x_MK, gate, up, None if ends is None else ends.contiguous(), E, M, N, K, tiles
    constants: dict[str, Any] = {
        "ACTIVATION": activation,
        "EVEN_K": K % k == 0,
        "PREFETCH": ends is None and M <= FEW_ROWS * E and together,
        "GROUPS": power_of_two(E + 1),
    }
    grid = (tiles * triton.cdiv(N, n),)
    strides = x_MK.stride(0), *weight.stride()
    launch(_grouped_gated_mlp_kernel, grid, *args, *strides, **constants, **config.options)
    return out


def _refuses(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor | None = None,
    activation: str = "silu",
    up_first: bool = False,
) -> str | None:
    return refuse_product(x, weight, ends)


def _reads_back(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor | None = None,
    activation: str = "silu",
    up_first: bool = False,
) -> str | None:
    if ends is None or has_grouped_product(x, weight):
        return None
    return f"in {x.dtype} its reference cuts out every expert's rows on the host, by the values of ends"


def _onnx(
    x: Value, weight: Value, ends: Value | None = None, activation: str = "silu", up_first: bool = False
) -> Any:
    """A MatMul an expert, on the rows between its bounds."""
    product = op.MatMul(x, weight) if ends is None else _onnx_product(x, weight, ends)
    halves = emit("Split", product, domain="", version=18, outputs=(True, True), axis=-1, num_outputs=2)
    gate, up = reversed(halves) if up_first else halves
    return op.Mul(gated_mlp.ONNX_ACTIVATIONS[activation](gate), up)


def _onnx_product(x: Value, weight: Value, ends: Value) -> Any:
    experts, zero = ends.shape[0], op.Constant(value_ints=[0])
    bounds = op.Concat(zero, op.Cast(ends, to=int(ir.DataType.INT64)), axis=0)
    each = [
        op.Slice(bounds, op.Constant(value_ints=[e]), op.Constant(value_ints=[e + 1]), zero)
        for e in range(experts + 1)
    ]
    parts = [
        op.MatMul(op.Slice(x, start, end, zero), op.Gather(weight, op.Constant(value_int=e), axis=0))
        for e, (start, end) in enumerate(itertools.pairwise(each))
    ]
    rest = op.Sub(op.Shape(x, start=0, end=1), each[-1])
    shape = op.Concat(rest, op.Shape(weight, start=2), axis=0)
    parts.append(op.ConstantOfShape(shape, value=ir.tensor([0.0], dtype=x.dtype)))
    return op.Concat(*parts, axis=0)


def _samples() -> Iterator[Sample]:
    x, weight = torch.randn(7, 12), torch.randn(3, 12, 20) / 12**0.5
    ends = torch.tensor([2, 5, 7], dtype=torch.int32)
    for activation in gated_mlp.ACTIVATIONS:
        yield Sample((x, weight, ends), {"activation": activation}, label=activation)
    yield Sample((x, weight, ends, "silu", True), label="up first")
    yield Sample((x, weight, torch.tensor([0, 7, 7])), label="experts without rows")
    yield Sample((x, weight, torch.tensor([2, 3, 5])), label="rows without expert")
    yield Sample((x, weight.mT.contiguous().mT, ends), label="weights transposed")
    yield Sample((100 * x, weight, ends), label="large magnitudes")
    yield Sample((torch.randn(3, 5, 12), weight), label="rows of each expert")
    yield Sample((torch.randn(3, 5, 12), weight, None, "gelu", True), label="rows of each expert, up first")


def _bad_samples() -> Iterator[BadSample]:
    x, weight, ends = torch.randn(7, 12), torch.randn(3, 12, 20), torch.tensor([2, 5, 7])
    yield BadSample((x, weight, ends, "tanh"), match="activation is one of silu")
    yield BadSample((x, weight), match="does not fit x")
    yield BadSample((x, weight.mT, ends), match="does not fit x")
    yield BadSample((torch.randn(2, 7, 12), weight), match="does not fit x")
    yield BadSample((x, weight[..., :19], ends), match="has no two halves")
    yield BadSample((x, weight, ends[:2]), match=r"ends \(2,\) of torch.int64 does not fit")
    yield BadSample((x, weight, ends.float()), match="ends .* of torch.float32 does not fit")
    yield BadSample((x, weight.double(), ends), match="weight is torch.float64")


FACE = TritonFace(_launch, _refuses)
OP = register(
    Op(
        "grouped_gated_mlp",
        SCHEMA,
        _shape,
        _reference,
        _cost,
        _onnx,
        _samples,
        _bad_samples,
        FACE,
        _reads_back,
    )
)
