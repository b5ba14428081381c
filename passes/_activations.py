"""Activations named by what they compute: a function of one number is probed and compared with known ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.kernels.quick_gelu import OP as QUICK_GELU

aten = torch.ops.aten

# How far a spelling may be from the function that it is taken for, in units in the last place of its dtype:
# constants are rounded in their sources (0.7978845608; sqrt(2) in float32 is 2e-8 off), which must cost less
# than verification allows. 0.0447 for 0.044715 in GELU makes a difference of 1e-5.
_ULPS = 2.0
_RESEMBLES = 2e-3  # off by less: worth a remark
_NOISE = 1e-15  # rounding of the probe itself, where a spelling cancels: exp(x) - 1 near 0


@dataclass(frozen=True)
class Operand:
    """The value of a step; 0 is the function's argument."""

    index: int


@dataclass(frozen=True)
class Number:
    """A tensor that is one number everywhere."""

    value: bool | int | float


@dataclass(frozen=True)
class Step:
    """A pointwise call: its op, and its arguments: operands, numbers and literals."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Activation:
    """A known function, as the call that computes it.

    Args:
        name: the activation's.
        target: the op.
        args: its arguments behind the tensor.
        kwargs: its keyword arguments.
    """

    name: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The function's values."""
        result: torch.Tensor = self.target(x, *self.args, **dict(self.kwargs))
        return result


@dataclass(frozen=True)
class Identified:
    """What a function is.

    Args:
        activation: the known function nearest to it.
        error: how far apart the two are.
        refusal: why it may not be replaced by that one, or None.
    """

    activation: Activation
    error: float
    refusal: str | None = None


_FIXED = (
    Activation("relu", aten.relu.default),
    Activation("sigmoid", aten.sigmoid.default),
    Activation("tanh", aten.tanh.default),
    Activation("silu", aten.silu.default),
    Activation("gelu", aten.gelu.default, kwargs=(("approximate", "none"),)),
    Activation("gelu (tanh)", aten.gelu.default, kwargs=(("approximate", "tanh"),)),
    Activation("mish", aten.mish.default),
    Activation("relu6", aten.relu6.default),
    Activation("hardswish", aten.hardswish.default),
    Activation("hardsigmoid", aten.hardsigmoid.default),
    Activation("selu", aten.selu.default),
    Activation("log_sigmoid", aten.log_sigmoid.default),
)
NAMED = frozenset(
    {
        *(known.target for known in _FIXED),
        *(aten.leaky_relu.default, aten.elu.default, aten.celu.default, aten.softplus.default),
        QUICK_GELU.overload,
    }
)


def identify(steps: tuple[Step, ...], dtype: torch.dtype) -> Identified | None:
    """The known activation that a chain of steps computes, or resembles.

    Args:
        steps: the chain; its last step gives the value.
        dtype: in which it is computed, floating.

    Returns:
        None when the function is like no known one.
    """
    return _identify(steps, _ULPS * torch.finfo(dtype).eps)


@functools.lru_cache(maxsize=4096)
def _identify(steps: tuple[Step, ...], tolerance: float) -> Identified | None:
    try:
        values = _values(steps, _grid())
    except (RuntimeError, TypeError):  # no such kernel in float64: a function of bits, not of numbers
        return None
    if not isinstance(values, torch.Tensor) or values.shape != _grid().shape or values.dtype != torch.float64:
        return None
    near: list[Identified] = []
    for known in (*_FIXED, *_fitted(lambda at: float(_values(steps, _point(at))))):
        found = _compare(values, known, tolerance)
        if found is not None and found.refusal is None:
            return found
        near += [found] if found is not None else []
    return min(near, key=lambda found: found.error, default=None)


@functools.cache
def _grid() -> torch.Tensor:
    """Dense where activations bend, denormal to large elsewhere, infinities and NaN last."""
    magnitudes = torch.logspace(-310, 20, 331, dtype=torch.float64)
    dense = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=torch.float64)
    return torch.cat([dense, magnitudes, -magnitudes, special])


def _point(at: float) -> torch.Tensor:
    return torch.tensor([at], dtype=torch.float64)


def _values(steps: tuple[Step, ...], x: torch.Tensor) -> Any:
    values: list[Any] = [x]

    def read(argument: Any) -> Any:
        if isinstance(argument, Operand):
            return values[argument.index]
        if isinstance(argument, Number):
            return torch.tensor(argument.value)
        floating = isinstance(argument, torch.dtype) and argument.is_floating_point
        return torch.float64 if floating else argument

    for step in steps:
        args = [read(argument) for argument in step.args]
        values.append(step.target(*args, **{name: read(value) for name, value in step.kwargs}))
    return values[-1]


def _fitted(function: Callable[[float], float]) -> Iterator[Activation]:
    """Families of activations, each with the parameter that a value of the function implies."""
    slope = -function(-1.0)
    if 0 < slope < 1:
        yield Activation("leaky_relu", aten.leaky_relu.default, (_rounded(slope),))
    alpha = -function(-1e3)
    if 0 < alpha < math.inf:
        yield Activation("elu", aten.elu.default, (_rounded(alpha),))
        yield Activation("celu", aten.celu.default, (_rounded(alpha),))
    middle = function(0.0)
    if 0 < middle < math.inf:
        yield Activation("softplus", aten.softplus.default, (_rounded(math.log(2) / middle),))
    gate = function(1.0)
    if 0.5 < gate < 1:
        yield Activation("quick_gelu", QUICK_GELU.overload, (_rounded(math.log(gate / (1 - gate))),))


def _rounded(number: float) -> float:
    """Without the rounding errors of reading it off."""
    return float(f"{number:.12g}")


def _compare(values: torch.Tensor, known: Activation, tolerance: float) -> Identified | None:
    """Whether the values are those of a known activation; None when they are far from it."""
    x, wanted = _grid(), known(_grid())
    size = torch.maximum(wanted.abs(), x.abs().clamp(max=1.0))  # small results count beside small arguments
    finite = torch.isfinite(values) & torch.isfinite(wanted)
    error = torch.where(finite, ((values - wanted).abs() - _NOISE) / size.clamp_min(_NOISE), 0.0)
    worst = float(error.max())
    if not finite[x.abs() <= 12].all() or worst > _RESEMBLES:
        return None
    if worst > tolerance:
        where = x[int(error.argmax())]
        return Identified(known, worst, f"differs from {known.name} by {worst:.1e} at {where:.3g}")
    same = (values == wanted) | (values.isnan() & wanted.isnan())
    undefined = values.isnan() & torch.isinf(x)  # 0 * inf, which the named function avoids
    differs = ~(finite | same | undefined)
    if differs.any():
        at = int(differs.nonzero()[0])
        seen = f"is {values[at]:.3g} at {x[at]:.3g}, where {known.name} is {wanted[at]:.3g}"
        return Identified(known, worst, seen)
    return Identified(known, worst)
