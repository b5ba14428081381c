"""A projection, the residual sum after it and the LayerNorm of that: how a block of a transformer ends.

    total = x @ weight.T + bias + residual
    out = (total - mean(total)) / sqrt(var(total) + eps) * norm_weight + norm_bias

Mean and (biased) variance are over the last dimension. In one op because a product of few rows has too few tiles to
fill a GPU: it is cut along its depth, and the norm, which must read every sum once anyway, adds the parts up.

Source: Ba et al., Layer Normalization (arXiv:1607.06450), equation 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels._linear_triton import products, sum_splits
from graphopt.kernels._onnx import Value, add_norm, linear
from graphopt.kernels._rows import centred_and_scaled, refuse_row, row_configs, row_tile, vector
from graphopt.kernels._shape import nbytes, require, require_floating, require_last_dim, shape_of
from graphopt.kernels._triton import as_rows, jit, launch, tl, wait_for_all, wait_for_inputs
from graphopt.kernels._tuning import choose


@jit
def _split_norm_kernel(  # type: ignore[no-untyped-def]
    normed_ptr,
    total_ptr,
    partial_ptr,
    bias_ptr,
    residual_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    rows,
    stride_rr,
    eps,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    row, column, seen = row_tile(rows, D, BLOCK_R, BLOCK_D)
    bias = vector(bias_ptr, column, D, bias_ptr is not None, 0.0)
    norm_weight = vector(norm_weight_ptr, column, D, norm_weight_ptr is not None, 1.0)
    norm_bias = vector(norm_bias_ptr, column, D, norm_bias_ptr is not None, 0.0)
    wait_for_inputs(PDL)
    residual = tl.load(residual_ptr + row * stride_rr + column, mask=seen, other=0.0).to(tl.float32)
    total = sum_splits(partial_ptr, row * D + column, seen, rows.to(tl.int64) * D, SPLITS) + bias + residual
    tl.store(total_ptr + row * D + column, total, mask=seen)
    normed = centred_and_scaled(total, seen, D, eps) * norm_weight + norm_bias
    tl.store(normed_ptr + row * D + column, normed, mask=seen)
