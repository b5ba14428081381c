"""Weights in few bits with a scale for each block of a row: which scales, and the rewrite of a product."""

from __future__ import annotations

import torch
from torch import fx

from graphopt.compiler import cpu
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.pattern import Match
from graphopt.kernels.block_quantized_linear import OP as BLOCK_QUANTIZED_LINEAR
from graphopt.kernels.block_quantized_linear import packed
from graphopt.passes._projections import Projection, rebuild, refuse, source

BLOCK = 32  # weights that share a scale: with it a weight takes 5 bits, or 9
_MIN_WEIGHTS = 4096
_SHRINKS = (
    1.0,
    0.95,
    0.9,
    0.85,
    0.8,
)  # of the largest weight of a block, which may be cut off for the others
_ROWS = 4096  # of a weight that are searched at a time: a table of 50,000 words has 30 million weights


def refuse_blocks(match: Match) -> str | None:
    """The weights are constants of some size, in float32 on the CPU, and x is a matrix of rows."""
    x = source(match.root).meta["val"]
    if x.dim() < 2 or not isinstance(x.shape[-1], int):
        return f"x has shape {list(x.shape)}, not rows of a fixed length"
    return refuse(match, _MIN_WEIGHTS, "reading them takes no time")


def quantize_blocks(rewriter: Rewriter, match: Match, bits: int) -> None:
    """Round each block of the weights to its own scale; they are kept so alone."""

    def make(one: Projection) -> fx.Node:
        weight = match.graph.constant(one.weight)
        assert weight is not None
        codes, scale = in_blocks(weight, bits)
        made = (
            rewriter.constant(packed(codes, bits), [one.weight], f"in {bits} bits"),
            rewriter.constant(scale, [one.weight], "a scale a block"),
        )
        more = {} if one.activation == "none" else {"activation": one.activation, "parameter": one.parameter}
        return rewriter.call(
            BLOCK_QUANTIZED_LINEAR.overload,
            source(match.root),
            *made,
            bits,
            one.bias,
            rounds_input=cpu.features().vnni,
            **more,
        )

    rebuild(rewriter, match, make)


def in_blocks(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and a scale for each block: (N, ceil(K / 32), 32), uint8, and (N, ceil(K / 32)), float32.

    The number of largest magnitude is the code 0, which has no counterpart: with its sign in the scale, all
    codes are used. Where 4 bits are so few that less error is left when it is cut off, it is.
    """
    filled = torch.nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    parts = [_rounded(part, bits) for part in filled.split(_ROWS)]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scale for _, scale in parts])


def _rounded(blocks: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = 2 ** (bits - 1)
    at = blocks.abs().argmax(-1, keepdim=True)
    extreme = blocks.gather(-1, at)
    least, codes, scale = _tried(blocks, -extreme / half, half)
    for shrink in _SHRINKS if bits == 4 else ():
        error, other_codes, other_scale = _tried(blocks, -shrink * extreme / half, half)
        less = error < least
        least = torch.where(less, error, least)
        codes, scale = torch.where(less, other_codes, codes), torch.where(less, other_scale, scale)
    return (codes + half).to(torch.uint8), scale.squeeze(-1).contiguous()


def _tried(
    blocks: torch.Tensor, scale: torch.Tensor, half: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The squared error of a scale for each block, the codes that it gives, and the scale."""
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (blocks / scale).round_().clamp_(-half, half - 1)
    return (codes * scale - blocks).square_().sum(-1, keepdim=True), codes, scale
