"""Which ops PyTorch's tracing keeps whole, and which it spells otherwise."""

from __future__ import annotations

import functools
from typing import Any

import torch

aten = torch.ops.aten

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@functools.cache
def is_kept_whole(target: Any) -> bool:
    """True when tracing a call once more, without decompositions, finds the same call.

    Tracing makes a graph functional: it replaces what writes its arguments, and takes composite ops apart
    that may return a view of them (``reshape``, ``to``, ``contiguous``) or that it distrusts (``dropout``,
    ``batch_norm``). It keeps all others, composite or not.
    """
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if torch.Tag.maybe_aliasing_or_mutating in target.tags or target is aten.native_batch_norm.default:
        return False
    return not (_is_composite(target) and any(arg.alias_info for arg in target._schema.arguments))


def _is_composite(target: torch._ops.OpOverload) -> bool:
    """True for an op that PyTorch defines by other ops, in C++ or in Python."""
    in_cpp = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    return bool(in_cpp) or _COMPOSITE in target.py_kernels
