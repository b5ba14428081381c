"""The geometry of a convolution's call as numbers, one for each spatial dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir.pattern import argument

aten = torch.ops.aten

PLAIN = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
NAMED_PADDING = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)


def each(conv: fx.Node, name: str) -> list[int]:
    """A number for each spatial dimension; one may stand for all of them."""
    given: Any = argument(conv, name)
    sizes: list[int] = [given] if isinstance(given, int) else list(given)
    spatial = argument(conv, "weight").meta["val"].dim() - 2
    return sizes * spatial if len(sizes) == 1 else sizes


def padding(conv: fx.Node) -> list[int] | None:
    """Zeros on either side of each spatial dimension; None when "same" puts more on one of them."""
    if conv.target not in NAMED_PADDING:
        return each(conv, "padding")
    kernel = argument(conv, "weight").meta["val"].shape[2:]
    if argument(conv, "padding") == "valid":
        return [0] * len(kernel)
    reach = [(size - 1) * dilation for size, dilation in zip(kernel, each(conv, "dilation"), strict=True)]
    return None if any(total % 2 for total in reach) else [total // 2 for total in reach]
