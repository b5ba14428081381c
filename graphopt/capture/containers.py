"""Containers of inputs and outputs: what PyTorch's pytrees know, and what they are taught here."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.utils._pytree as pytree


def known_containers() -> None:
    """Make Hugging Face's KV cache a known container, where transformers is installed."""
    try:
        from transformers.integrations.executorch import register_dynamic_cache_export_support
    except ImportError:
        return
    register_dynamic_cache_export_support()


def flatten(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves and structure of a value; dataclasses that nobody registered are registered on the way."""
    while True:
        leaves, spec = pytree.tree_flatten(value)
        unknown = {type(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf)}
        if not unknown:
            return leaves, spec
        for kind in unknown:
            torch.export.register_dataclass(kind)
