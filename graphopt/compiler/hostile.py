"""Inputs that bring out wrong rewrites: large, denormal, strided, masks with rows that attend to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

_SEED = 20240229


def hostile_inputs(values: Sequence[Any], varies: Sequence[bool]) -> Iterator[tuple[str, list[Any]]]:
    """Variations of a region's real inputs, each with a label, the same at every call.

    Args:
        values: the real inputs of a region. Integer tensors (indices, positions) keep their values, since a
            random index is out of range; sizes stay as they are.
        varies: False for values that no model input can change: they are kept.
    """
    varying = [value for value, may in zip(values, varies, strict=True) if may]
    generator = torch.Generator().manual_seed(_SEED)

    def each(change: Callable[[Any, torch.Generator], Any]) -> list[Any]:
        return [change(v, generator) if may else v for v, may in zip(values, varies, strict=True)]

    if any(_is_float(value) for value in varying):
        yield "large magnitudes", each(_large)
        yield "denormals", each(_denormal)
        yield "non-contiguous strides", each(_strided)
    if any(isinstance(value, torch.Tensor) and value.dtype == torch.bool for value in varying):
        yield "masks with empty rows", each(_random_mask)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _normal(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(value.shape, generator=generator).to(value.device)


def _large(value: Any, generator: torch.Generator) -> Any:
    if not _is_float(value):
        return value
    scale = 1e2 if value.dtype == torch.float16 else 1e4
    return (_normal(value, generator) * scale).to(value.dtype)


def _denormal(value: Any, generator: torch.Generator) -> Any:
    if not _is_float(value):
        return value
    return _normal(value, generator).double().mul(torch.finfo(value.dtype).tiny / 16).to(value.dtype)


def _strided(value: Any, generator: torch.Generator) -> Any:
    if not _is_float(value) or value.dim() == 0:
        return value
    wide = torch.stack([value, torch.full_like(value, float("nan"))], dim=-1)
    return wide[..., 0]


def _random_mask(value: Any, generator: torch.Generator) -> Any:
    if (
        not isinstance(value, torch.Tensor)
        or value.dtype != torch.bool
        or not value.dim()
        or not value.numel()
    ):
        return value
    mask = (torch.rand(value.shape, generator=generator) > 0.4).to(value.device)
    mask.view(-1, mask.shape[-1])[0] = False
    return mask
