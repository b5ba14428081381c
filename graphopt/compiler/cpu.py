"""What this machine's processor multiplies fast, asked for in one place."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Features:
    """Instructions for products of narrow numbers.

    Args:
        bf16: products of bfloat16 (AVX512_BF16 or AMX).
        fp16: products of float16 (AMX_FP16; AVX512_FP16 where PyTorch tells it).
        vnni: products of 8 bits, summed in 32 without saturating in between.
        amx: tiles of bfloat16 and of 8 bits.
    """

    bf16: bool
    fp16: bool
    vnni: bool
    amx: bool

    def __str__(self) -> str:
        names = {"bf16": "bfloat16", "fp16": "float16", "vnni": "VNNI (int8)", "amx": "AMX"}
        found = [words for name, words in names.items() if getattr(self, name)]
        return ", ".join(found) or "none for narrow numbers"


def features() -> Features:
    """What the processor has, as PyTorch's own dispatch sees it."""
    cpu = torch.cpu
    amx = cpu._is_amx_tile_supported()
    told = cpu.get_capabilities() if hasattr(cpu, "get_capabilities") else {}
    return Features(
        bf16=amx or cpu._is_avx512_bf16_supported() or bool(told.get("bf16")),
        fp16=cpu._is_amx_fp16_supported() or bool(told.get("avx512_fp16") or told.get("fp16_arith")),
        vnni=amx or cpu._is_vnni_supported() or bool(told.get("avx_vnni") or told.get("i8mm")),
        amx=amx,
    )
