"""What kernels of matrix products share: a program's tile, its sums, weights ahead of time, the epilogue."""

from __future__ import annotations

from graphopt.kernels._activations_triton import activate, gelu_to_half
from graphopt.kernels._triton import dot, jit, tl


@jit
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which tile a program makes: down GROUP_M row tiles, then on to the next column tile."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    inside = program % (GROUP_M * tiles_n)
    return group * GROUP_M + inside % height, inside // height


@jit
def prefetch_weights(weight_ptr, rows, stride_wn, first, last, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ask for rows of weights to be brought into L2, a cache line of 128 bytes at a time.

    They are on their way while the kernel ahead still runs, and nobody's registers wait for them.
    """
    LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
    lines = tl.arange(0, (BLOCK_K + LINE - 1) // LINE) * LINE
    row_ptrs = weight_ptr + rows.to(tl.int64)[:, None] * stride_wn
    for k in range(first, last, BLOCK_K):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [row_ptrs + tl.minimum(k + lines, last - 1)[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@jit
def tile_sums(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    rows,
    columns,
    M,
    N,
    first,
    last,
    stride_xm,
    stride_wn,
    stride_wk,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile's sums of products in float32, over the depth from the first to the last.

    Rows and columns past the end are taken from the start: read in bounds without a mask, never stored.
    """
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (rows % M).to(tl.int64)[:, None] * stride_xm + (first + ks)[None, :]
    weight_ptrs = (
        weight_ptr + (columns % N).to(tl.int64)[None, :] * stride_wn + (first + ks)[:, None] * stride_wk
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(first, last, BLOCK_K):
        if EVEN_K:
            x, weight = tl.load(x_ptrs), tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(k + ks < last)[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(k + ks < last)[:, None], other=0.0)
        acc = dot(x, weight, acc)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * stride_wk
    return acc


@jit
def gated_sums(  # type: ignore[no-untyped-def]
    x_ptrs,
    gate_ptrs,
    up_ptrs,
    K,
    stride_gk,
    stride_uk,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the products of rows with two weights, in float32, from pointers to the start of K."""
    ks = tl.arange(0, BLOCK_K)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x, gate_weight, up_weight = tl.load(x_ptrs), tl.load(gate_ptrs), tl.load(up_ptrs)
        else:
            left = k + ks < K
            x = tl.load(x_ptrs, mask=left[None, :], other=0.0)
            gate_weight = tl.load(gate_ptrs, mask=left[:, None], other=0.0)
            up_weight = tl.load(up_ptrs, mask=left[:, None], other=0.0)
        gate = dot(x, gate_weight, gate)
        up = dot(x, up_weight, up)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K * stride_gk
        up_ptrs += BLOCK_K * stride_uk
    return gate, up


@jit
def with_bias(acc, bias_ptr, columns, N):  # type: ignore[no-untyped-def]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    return acc


@jit
def epilogue(acc, parameter, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation of sums whose result is in half precision."""
    return gelu_to_half(acc) if ACTIVATION == "gelu" else activate(acc, parameter, ACTIVATION)


@jit
def with_residual(acc, residual_ptr, rows, columns, M, N, stride_rm):  # type: ignore[no-untyped-def]
    if residual_ptr is not None:
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        ptrs = residual_ptr + rows.to(tl.int64)[:, None] * stride_rm + columns[None, :]
        acc += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    return acc
