"""What a model is run on: ragged batches, and other dtypes and devices."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphopt.compiler.reference import Reference
from graphopt.errors import InputError

_SIGMA = 0.6  # of the logarithm of sentence lengths in English prose: Williams, Biometrika 31 (1940)
_Z95 = 1.645  # standard deviations from the median of a normal distribution to its 95th percentile
_SHORTEST = 4  # tokens: a word between the marks of its ends, and a full stop
_SHORTEST_UNIFORM = 16

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def real_lengths(batch: int, seq: int, seed: int) -> list[int]:
    """Lengths of sentences as texts have them: log-normal, 95 % of them no longer than ``seq``.

    A service sizes its batches so that nearly all sentences fit. The median is then 0.37 of ``seq`` and the
    mean 0.45 of it. Longer ones are cut at ``seq``, and the longest of a batch is ``seq`` tokens long, as a
    batch is padded to its longest sentence.

    Args:
        batch: sentences.
        seq: tokens that the batch is padded to.
        seed: of the draw; one seed gives one batch.

    Returns:
        Tokens of each sentence.
    """
    draw = random.Random(f"{seed}/{batch}/{seq}")
    median = math.log(seq) - _Z95 * _SIGMA
    drawn = [round(draw.lognormvariate(median, _SIGMA)) for _ in range(batch)]
    return _filled([max(min(_SHORTEST, seq), min(seq, length)) for length in drawn], seq)


def uniform_lengths(batch: int, seq: int, seed: int) -> list[int]:
    """Lengths from 16 tokens to ``seq``, each as likely as any other; arguments and result as above."""
    draw = random.Random(f"{seed}/{batch}/{seq}")
    return _filled([draw.randint(min(_SHORTEST_UNIFORM, seq), seq) for _ in range(batch)], seq)


def _filled(lengths: list[int], seq: int) -> list[int]:
    """The longest is ``seq`` tokens long."""
    lengths[max(range(len(lengths)), key=lengths.__getitem__)] = seq
    return lengths


# How a batch becomes ragged, by the name of it.
DRAWS: Mapping[str, Callable[[int, int, int], list[int]]] = {"real": real_lengths, "uniform": uniform_lengths}


def padded(kwargs: Mapping[str, Any], kind: str, draw_seed: int) -> tuple[dict[str, Any], list[int]]:
    """Inputs whose sentences have lengths of their own; what lies behind a sentence's end is masked.

    Args:
        kwargs: hold an ``attention_mask`` of shape [batch, seq].
        kind: a name in ``DRAWS``.
        draw_seed: of the lengths.

    Returns:
        The inputs, and the lengths.

    Raises:
        InputError: there is no such mask.
    """
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise InputError(
            f"--lengths {kind} needs an input attention_mask of shape [batch, seq], and the model has none",
            hint="let the factory return it among its keyword inputs, or leave --lengths out",
        )
    batch, seq = mask.shape
    lengths = DRAWS[kind](batch, seq, draw_seed)
    real = torch.arange(seq, device=mask.device) < torch.tensor(lengths, device=mask.device)[:, None]
    return {**kwargs, "attention_mask": real.to(mask.dtype)}, lengths


def real_only(found: Sequence[Any], reference: Reference, mask: torch.Tensor) -> list[Any]:
    """Outputs without what stands at padded positions: who packs a batch computes nothing there.

    Those are outputs of shape [batch, seq, ...] with at least three dimensions. In one of two dimensions the
    second may be a width that happens to be ``seq``; such a one is compared whole, and so are all others.

    Args:
        found: what a side computes.
        reference: what it is held against.
        mask: of shape [batch, seq], 0 where there is padding.

    Returns:
        The outputs, with the reference's values at padded positions.
    """
    return [
        _without_padding(value, before, float64, mask.bool())
        for value, before, float64 in zip(found, reference.before, reference.float64, strict=True)
    ]


def _without_padding(value: Any, before: Any, float64: Any, real: torch.Tensor) -> Any:
    tensors = all(isinstance(side, torch.Tensor) for side in (value, before, float64))
    if not tensors or not value.shape == before.shape == float64.shape:
        return value
    if value.dim() < 3 or value.shape[:2] != real.shape or value.dtype != before.dtype:
        return value
    right = torch.where(float64.isfinite(), float64.to(before.dtype), before)
    return torch.where(real.reshape(*real.shape, *[1] * (value.dim() - 2)), value, right)


def fill(lengths: Sequence[int], seq: int) -> float:
    """The share of a batch that is no padding."""
    return sum(lengths) / (len(lengths) * seq)


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        InputError: no model is measured in such a dtype.
    """
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}", where="--dtype", hint=f"one of: {', '.join(DTYPES)}")
    return DTYPES[name]


def moved(values: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Nested inputs on a device; floating tensors also in a dtype, memory format kept."""

    def of_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)

    return pytree.tree_map(of_leaf, values)
