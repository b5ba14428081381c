"""The registry of fused operations that graphopt adds to the ATen vocabulary.

One op is one file, ``kernels/<op>.py``, which ends in ``OP = register(Op(...))``. Registering an op defines
``torch.ops.graphopt.<name>`` with the reference as its implementation on every device and the shape rule as
its fake implementation, so an optimized graph runs in plain torch wherever no executor has anything better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

NAMESPACE = "graphopt"


@dataclass(frozen=True)
class Cost:
    """What one call of an op costs at least.

    Args:
        flops: floating-point operations, a multiply-add counted as two.
        bytes: bytes moved through device memory when every input is read once and every output written once.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Sample:
    """Arguments for one call of an op.

    Args:
        args: positional arguments; floating tensors are float32 and random, never zeros.
        kwargs: keyword arguments.
        label: what is particular about this sample ("odd sizes", "grouped heads").
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True)
class BadSample:
    """Arguments that an op must refuse, and what the refusal says.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        error: the exception's type.
        match: a regular expression that the message matches.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    error: type[Exception] = ValueError
    match: str = ""


@dataclass(frozen=True)
class TritonFace:
    """An op's kernels for a GPU.

    Args:
        launch: the same arguments as the reference, on a GPU; returns what it returns, contiguous and freshly
            allocated, on the current stream and without waiting for it. It reads no value back and times
            nothing, so a CUDA graph can capture it. Takes only what ``refuses`` admits.
        refuses: the same arguments, fake tensors will do; why ``launch`` cannot take them, in words for a
            remark, or None. Asked once a region, never on the hot path.
    """

    launch: Callable[..., Any]
    refuses: Callable[..., str | None]


@dataclass(frozen=True)
class Op:
    """One fused operation and its faces.

    Args:
        name: the op's name in the ``graphopt`` namespace.
        schema: the arguments and returns in PyTorch's schema language, without the name.
        shape: the shape rule: the same arguments as ``reference``, on fake tensors; returns empty tensors and
            raises ``ValueError`` for shapes or dtypes that the op refuses.
        reference: the formula in plain torch; right in every floating dtype, float64 included.
        cost: FLOPs and bytes of one call, from the arguments (fake tensors will do).
        onnx: an onnxscript function of the same arguments that emits the ONNX nodes ONNX Runtime runs best.
        samples: inputs for the generic tests.
        bad_samples: inputs that must be refused.
        triton: the Triton kernels, and what they cannot take; None where there are none.
        reads_back: the same arguments, fake tensors will do; why the reference reads values of these on the
            host, so that no CUDA graph can hold it and no compiler trace it, in words for a remark, or None.
            None instead of a function where it never does.
    """

    name: str
    schema: str
    shape: Callable[..., Any]
    reference: Callable[..., Any]
    cost: Callable[..., Cost]
    onnx: Callable[..., Any]
    samples: Callable[[], Iterable[Sample]]
    bad_samples: Callable[[], Iterable[BadSample]]
    triton: TritonFace | None = None
    reads_back: Callable[..., str | None] | None = None

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The op as a call target in a graph: ``torch.ops.graphopt.<name>.default``."""
        packet = getattr(getattr(torch.ops, NAMESPACE), self.name)
        overload: torch._ops.OpOverload = packet.default
        return overload

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op on real tensors."""
        return self.overload(*args, **kwargs)


OPS: dict[str, Op] = {}
_BY_OVERLOAD: dict[Any, Op] = {}


def register(op: Op) -> Op:
    """Add an op to the vocabulary and define it in PyTorch's dispatcher.

    Args:
        op: the op.

    Returns:
        The op itself, so that a file can end in ``OP = register(Op(...))``.

    Raises:
        ValueError: an op of that name is registered already.
    """
    if op.name in OPS:
        raise ValueError(f"op {op.name!r} is registered already")

    def implementation(*args: Any, **kwargs: Any) -> Any:
        op.shape(*args, **kwargs)  # one place refuses bad shapes, for real tensors and fake ones alike
        return op.reference(*args, **kwargs)

    qualified = f"{NAMESPACE}::{op.name}"
    torch.library.define(qualified, op.schema)
    torch.library.impl(qualified, "default", implementation)
    torch.library.register_fake(qualified, op.shape)
    OPS[op.name] = op
    _BY_OVERLOAD[op.overload] = op
    return op


def op_of(target: Any) -> Op | None:
    """The registered op that a node's target calls, or None when the target is not one of ours."""
    return _BY_OVERLOAD.get(target)
