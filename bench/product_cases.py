"""Calls at sizes that models have, of every Triton kernel that multiplies matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.kernel_cases import Case
from graphopt.kernels.quantize_rows import OP as QUANTIZE_ROWS

Make = Callable[[torch.device, torch.dtype], tuple[Any, ...]]


def products() -> Iterator[Case]:
    """All of them: BERT-base, ViT-B/16, ResNet-50; gated blocks and losses of language models."""
    yield Case("linear_activation", "1x2048 to 1000", _linear(1, 2048, 1000, "none"))
    yield Case("linear_add_layer_norm", "1x3072 to 768", _normed(1, 3072, 768))
    for rows in (128, 1024, 4096, 64 * 197):
        yield Case("linear_activation", f"{rows}x768 to 2304", _linear(rows, 768, 2304, "none"))
        yield Case("linear_activation", f"{rows}x768 to 3072, GELU", _linear(rows, 768, 3072, "gelu"))
        for depth in (768, 3072):
            yield Case("linear_add_layer_norm", f"{rows}x{depth} to 768", _normed(rows, depth, 768))
    for rows in (128, 4096):
        for depth in (768, 3072):
            yield Case("quantize_rows", f"{rows}x{depth}", _rows(rows, depth))
        yield Case("float8_linear", f"{rows}x768 to 3072, GELU", _float8(rows, 768, 3072, "gelu"))
        yield Case("float8_linear", f"{rows}x3072 to 768", _float8(rows, 3072, 768, "none"))
    for rows in (1, 16, 128, 4096):
        yield Case("quantized_linear", f"{rows}x4096 to 4096", _quantized(rows, 4096, 4096))
    yield Case("quantized_linear", "16x768 to 3072, zero points", _quantized(16, 768, 3072, offset=True))
    for bits in (4, 8):
        for rows in (1, 16, 512):
            shape = f"{rows}x4096 to 4096, {bits} bits"
            yield Case("block_quantized_linear", shape, _blocks(rows, 4096, 4096, bits))
    for rows in (16, 128, 4096):
        yield Case("gated_mlp", f"{rows}x2048 to 5632", _gated(rows, 2048, 5632))
    for rows in (256, 8192):
        yield Case("grouped_gated_mlp", f"{rows}x4096 to 14336, 8 experts", _experts(rows, 4096, 14336))
    yield Case("grouped_gated_mlp", "8x32x2048 to 5632", _experts(256, 2048, 5632, of_each=True))
    for batch, length, masked in ((1, 128, False), (8, 128, True), (32, 512, True), (64, 197, False)):
        shape = f"{batch}x{length}, 12 heads of 64" + ", key padding" * masked
        yield Case("attention", shape, _attention(batch, length, masked, False))
    yield Case("attention", "8x1024, 12 heads of 64, causal", _attention(8, 1024, False, True))
    yield Case("packed_attention", "32x277, 12 heads of 64", _packed(32, 277))
    for batch in (1, 64):
        yield Case("conv_activation", f"{batch}x256x14x14, 3x3", _convolution(batch, 14, 256, 256, 3))
    for rows, classes in ((2048, 32000), (2048, 128256), (16, 128256)):
        yield Case("linear_cross_entropy", f"{rows}x2048 to {classes}", _loss(rows, 2048, classes))
    ends = _convolution(64, 56, 64, 256, 1, residual=True)
    yield Case("conv_activation", "64x64x56x56 to 256, 1x1, residual", ends)


def _linear(rows: int, depth: int, features: int, activation: str) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        draw = _drawn(device, dtype)
        return draw(rows, depth), draw(features, depth) / depth**0.5, draw(features), activation

    return make


def _rows(rows: int, depth: int) -> Make:
    return lambda device, dtype: (_drawn(device, dtype)(rows, depth),)


def _float8(rows: int, depth: int, features: int, activation: str) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        draw = _drawn(device, dtype)
        weight, scale = QUANTIZE_ROWS(draw(features, depth) / depth**0.5)
        x = QUANTIZE_ROWS(draw(rows, depth))
        return *x, weight, scale.squeeze(1), dtype, draw(features), activation

    return make


def _quantized(rows: int, depth: int, features: int, offset: bool = False) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        draw = _drawn(device, dtype)
        weight = torch.randint(-127, 128, (features, depth), dtype=torch.int8, device=device)
        zero = torch.randint(-20, 20, (features,), dtype=torch.int8, device=device) if offset else None
        return draw(rows, depth), weight, draw(features).abs() / 127, draw(features), zero

    return make


def _blocks(rows: int, depth: int, features: int, bits: int) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        draw, size = _drawn(device, dtype), (features, depth // 32, 4 * bits)
        weight = torch.randint(256, size, dtype=torch.uint8, device=device)
        return draw(rows, depth), weight, draw(*size[:2]) / 2**bits, bits, draw(features)

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


def _experts(rows: int, depth: int, features: int, of_each: bool = False) -> Make:
    """Eight experts, whose weights lie as Mixtral's do; the rows are shared out unevenly, or alike."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        draw = _drawn(device, dtype)
        weight = (draw(8, 2 * features, depth) / depth**0.5).mT
        if of_each:
            return draw(8, rows // 8, depth), weight
        ends = torch.tensor([5, 7, 12, 14, 17, 24, 30, 32], device=device)  # in 32nds of the rows
        return draw(rows, depth), weight, (ends * (rows // 32)).int()

    return make


def _loss(rows: int, depth: int, classes: int) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        draw = _drawn(device, dtype)
        target = torch.randint(classes, (rows,), device=device)
        return draw(rows, depth), draw(classes, depth) / depth**0.5, None, target, -100, "mean", True

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


def _convolution(
    batch: int, size: int, channels: int, features: int, kernel: int, residual: bool = False
) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        def images(*sizes: int) -> torch.Tensor:
            return _drawn(device, dtype)(*sizes).contiguous(memory_format=torch.channels_last)

        x, weight = images(batch, channels, size, size), images(features, channels, kernel, kernel)
        where = [1, 1], [kernel // 2] * 2, [1, 1]
        added = images(batch, features, size, size) if residual else None
        bias = torch.randn(features, device=device).to(dtype)
        return x, weight / weight[0].numel() ** 0.5, bias, *where, 1, "relu", 1.0, added

    return make


def _drawn(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    return lambda *size: torch.randn(size, device=device).to(dtype)
