"""Comparing two results with the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphopt.compiler.tolerance import limit


@dataclass(frozen=True)
class Comparison:
    """The errors of the two sides, and whether the second is acceptable.

    Args:
        error_before: of the original, relative to the largest reference value of the row (see tolerance.py).
        error_after: of the candidate, likewise; infinite where a value is finite on one side only, where an
            integer differs, or where shape or dtype changed.
        ok: the candidate is within the limit.
        reason: why not, in words.
    """

    error_before: float
    error_after: float
    ok: bool
    reason: str = ""


def compare(before: Any, after: Any, reference: Any, floor_ulps: float) -> Comparison:
    """Judge ``after`` against ``before`` and the float64 ``reference`` (tensors, or nested containers).

    Args:
        before: what the original computes in its own dtype.
        after: what the candidate computes.
        reference: what the original computes in float64.
        floor_ulps: the floor of the tolerance, in units in the last place.
    """
    sides = [pytree.tree_leaves(side) for side in (before, after, reference)]
    if len({len(side) for side in sides}) != 1:
        return Comparison(0.0, math.inf, False, f"{len(sides[1])} outputs instead of {len(sides[0])}")
    worst = Comparison(0.0, 0.0, True)
    for triple in zip(*sides, strict=True):
        found = _compare_leaf(*triple, floor_ulps=floor_ulps)
        if not found.ok:
            return found
        if found.error_after >= worst.error_after:
            worst = found
    return worst


def _compare_leaf(before: Any, after: Any, reference: Any, *, floor_ulps: float) -> Comparison:
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        same = type(before) is type(after) and repr(before) == repr(after)  # NaN is NaN
        return Comparison(0.0, 0.0, True) if same else _wrong(f"{after} is not {before}")
    if after.shape != before.shape or after.dtype != before.dtype:
        there, here = (f"{side.dtype} {list(side.shape)}" for side in (after, before))
        return _wrong(f"{there} instead of {here}")
    if not (before.is_floating_point() or before.is_complex()):
        count = int((before != after).sum())
        return _wrong(f"{count} values differ") if count else Comparison(0.0, 0.0, True)
    if before.numel() == 0:
        return Comparison(0.0, 0.0, True)
    if before.dtype.itemsize == 1:  # float8, which nothing computes in
        before, after, floor_ulps = before.float(), after.float(), _CODES / torch.finfo(torch.float32).eps
    # where float64 has no finite value, or none of this shape, there is only the original to compare with
    if reference.shape != before.shape:
        reference = before
    count, error_before, error_after = 0, 0.0, 0.0
    for old, new, wide in _blocks(before, after, reference):
        wide = torch.where(torch.isfinite(wide), wide, old)
        count += _disagreements(old, new, wide)
        error_before = max(error_before, relative_error(old, wide))
        error_after = max(error_after, relative_error(new, wide, besides=old))
    if count:
        return _wrong(f"{count} values are finite on one side and not on the other")
    most = limit(error_before, before.dtype, floor_ulps)
    if error_after <= most:
        return Comparison(error_before, error_after, True)
    reason = f"error {error_after:.2e} exceeds {most:.2e} (the original's is {error_before:.2e})"
    return Comparison(error_before, error_after, False, reason)


def _wrong(reason: str) -> Comparison:
    return Comparison(0.0, math.inf, False, reason)


def _blocks(*sides: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of one shape, some rows at a time: what is computed from them in float64 stays small."""
    flat = [_rows(side).flatten(0, -2) for side in sides]
    rows, width = flat[0].shape
    step = max(1, _BLOCK // width)
    for start in range(0, rows, step):
        yield tuple(side[start : start + step] for side in flat)


def _disagreements(before: torch.Tensor, after: torch.Tensor, reference: torch.Tensor) -> int:
    """How many values are NaN or infinite wrongly.

    Where the original overflowed although the reference is finite, the candidate may do as it likes; anywhere
    else it must be finite where the original is, and the same NaN or infinity where it is not.
    """
    overflowed = torch.isfinite(reference) & ~torch.isfinite(before)
    both_finite = torch.isfinite(before) & torch.isfinite(after)
    same = (before == after) | (before.isnan() & after.isnan())
    return int((~(both_finite | same | overflowed)).sum())


def relative_error(
    actual: torch.Tensor, reference: torch.Tensor, besides: torch.Tensor | None = None
) -> float:
    """The largest deviation from the reference in a row, relative to the row's largest reference value.

    A row is the last dimension, with those before it where it is short: of an image of one pixel, or of two
    classes, each value would be a row, and what is near 0 by chance would count as wrong by its rounding.

    Values near the end of the dtype's range (the fill of an additive mask) are measured each by itself:
    beside them, every other error in their row would vanish.

    Args:
        actual: a floating or complex tensor of any shape.
        reference: the same in float64.
        besides: values that must be finite too for a position to count.

    Returns:
        The error; 0 when no position counts. Deviations below the dtype's smallest normal number do not
        count: a device may flush them to zero.
    """
    actual = actual.float() if actual.dtype.itemsize == 1 else actual  # of float8 there are codes alone
    info = torch.finfo(actual.dtype)
    counted = torch.isfinite(reference) & torch.isfinite(actual)
    if besides is not None:
        counted &= torch.isfinite(besides)
    kind = torch.complex128 if actual.is_complex() else torch.float64
    wide = torch.where(counted, reference.to(kind), 0.0)
    deviation = (torch.where(counted, actual.to(kind), 0.0) - wide).abs()
    size = wide.abs()
    size, deviation = _rows(size), _rows(deviation)
    fills = size > _FILL * info.max
    scale = torch.where(fills, 0.0, size).amax(dim=-1, keepdim=True).clamp_min(info.tiny / info.eps)
    return float((deviation / torch.where(fills, size, scale)).max())


def _rows(values: torch.Tensor) -> torch.Tensor:
    """Dimensions merged from the last one on, until it holds enough values for one to be large."""
    rows = values[None] if values.dim() > 1 else values.reshape(1, -1)
    while rows.dim() > 2 and rows.shape[-1] < _MIN_ROW:
        rows = rows.flatten(-2)
    return rows


_BLOCK = 2**18  # numbers: 2 MiB in float64
_MIN_ROW = 16  # values of order 1 of which none is near 1: not once in a million rows
_FILL = 0.25  # of the largest number of a dtype: what is larger is a mask's fill, not a value
_CODES = (
    0.08  # of a row's largest: what is half way between two float8 may come out as either, 32 of 448 apart
)


def worst_error(actual: Sequence[Any], reference: Sequence[Any]) -> float:
    """The largest relative error over all floating outputs."""
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(reference), strict=True)
    floating = [
        (a, r) for a, r in pairs if isinstance(a, torch.Tensor) and a.is_floating_point() and a.numel()
    ]
    return max((relative_error(a, r) for a, r in floating), default=0.0)
