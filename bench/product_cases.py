"""Calls at sizes that models have, of every Triton kernel that multiplies matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.kernel_cases import Case

Make = Callable[[torch.device, torch.dtype], tuple[Any, ...]]


def products() -> Iterator[Case]:
    """All of them: BERT-base and ViT-B/16, and the gated block of a small language model."""
    yield Case("linear_activation", "1x2048 to 1000", _linear(1, 2048, 1000, "none"))
    yield Case("linear_add_layer_norm", "1x3072 to 768", _normed(1, 3072, 768))
    for rows in (128, 1024, 4096, 64 * 197):
        yield Case("linear_activation", f"{rows}x768 to 2304", _linear(rows, 768, 2304, "none"))
        yield Case("linear_activation", f"{rows}x768 to 3072, GELU", _linear(rows, 768, 3072, "gelu"))
        for depth in (768, 3072):
            yield Case("linear_add_layer_norm", f"{rows}x{depth} to 768", _normed(rows, depth, 768))
    for rows in (16, 128, 4096):
        yield Case("gated_mlp", f"{rows}x2048 to 5632", _gated(rows, 2048, 5632))
    for batch, length, masked in ((1, 128, False), (8, 128, True), (32, 512, True), (64, 197, False)):
        shape = f"{batch}x{length}, 12 heads of 64" + ", key padding" * masked
        yield Case("attention", shape, _attention(batch, length, masked, False))
    yield Case("attention", "8x1024, 12 heads of 64, causal", _attention(8, 1024, False, True))
    yield Case("packed_attention", "32x277, 12 heads of 64", _packed(32, 277))


def _linear(rows: int, depth: int, features: int, activation: str) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        draw = _drawn(device, dtype)
        return draw(rows, depth), draw(features, depth) / depth**0.5, draw(features), activation

    return make


def _normed(rows: int, depth: int, features: int) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        draw = _drawn(device, dtype)
        product = draw(rows, depth), draw(features, depth) / depth**0.5, draw(features)
        return *product, draw(rows, features), draw(features), draw(features), 1e-12

    return make


def _gated(rows: int, depth: int, features: int) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        draw = _drawn(device, dtype)
        return draw(rows, depth), *(draw(features, depth) / depth**0.5 for _ in range(2))

    return make


def _attention(batch: int, length: int, masked: bool, causal: bool) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        heads = _drawn(device, dtype)(batch, length, 3, 12, 64).unbind(2)
        lengths = torch.randint(length // 4, length + 1, (batch, 1, 1, 1), device=device)
        mask = torch.arange(length, device=device) < lengths
        return *heads, mask if masked else None, causal

    return make


def _packed(batch: int, length: int) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        heads = _drawn(device, dtype)(batch * length, 3, 12, 64).unbind(1)
        offsets = length * torch.arange(batch + 1, dtype=torch.int32, device=device)
        return *heads, offsets, length

    return make


def _drawn(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    return lambda *size: torch.randn(size, device=device).to(dtype)
