"""The activations of ``_activations.py`` as functions of float32 blocks, for kernels in Triton.

Each is within a few ulp of the formula, next to zero too, and hands on what is not a number, as torch does.
"""

from __future__ import annotations

from graphopt.kernels._triton import jit, tl


@jit
def activate(x, parameter, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation of that name. x is a block of float32."""
    if ACTIVATION == "relu":
        x = clamped(x, 0.0, float("inf"))
    elif ACTIVATION == "relu6":
        x = clamped(x, 0.0, 6.0)
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x > 0, x, parameter * x)
    elif ACTIVATION == "elu":
        x = tl.where(x > 0, x, parameter * expm1(x))
    elif ACTIVATION == "selu":
        x = 1.0507009873554805 * tl.where(x > 0, x, 1.6732632423543772 * expm1(x))
    elif ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    elif ACTIVATION == "softplus":
        x = softplus(x)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "mish":
        x = x * tanh(softplus(x))
    elif ACTIVATION == "hardswish":
        x = x * clamped(x + 3, 0.0, 6.0) / 6
    elif ACTIVATION == "hardsigmoid":
        x = clamped(x + 3, 0.0, 6.0) / 6
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 * (1 + tanh(y)) is sigmoid(2 * y)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(parameter * x)
    else:
        tl.static_assert(ACTIVATION == "none", "the activation has no Triton form")
    return x


@jit
def clamped(x, low, high):  # type: ignore[no-untyped-def]
    """x between two numbers; what is not a number stays so, which ``tl.minimum`` would hide."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@jit
def tanh(x):  # type: ignore[no-untyped-def]
    """From the exponential; next to zero, where that would cancel, the first terms of the series."""
    power = tl.exp(-2 * tl.abs(x))
    far = (1 - power) / (1 + power)
    square = x * x
    series = -0.05396825396825397 + square * (0.021869488536155203 - square * 0.008863235529902197)
    near = x + x * square * (-0.3333333333333333 + square * (0.13333333333333333 + square * series))
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far))


@jit
def expm1(x):  # type: ignore[no-untyped-def]
    """exp(x) - 1; next to zero, where that would cancel, the first terms of the series."""
    series = 0.008333333333333333 + x * (0.001388888888888889 + x * 0.0001984126984126984)
    near = x + x * x * (0.5 + x * (0.16666666666666666 + x * (0.041666666666666664 + x * series)))
    return tl.where(tl.abs(x) < 0.2, near, tl.exp(x) - 1)


@jit
def softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)) as max(x, 0) + log(1 + exp(-|x|)), which neither overflows nor loses what is small.

    The second logarithm is Kahan's: what rounding took from 1 + y is given back as y / ((1 + y) - 1).
    """
    power = tl.exp(-tl.abs(x))
    sum_ = 1 + power
    small = tl.where(sum_ == 1, power, tl.log(sum_) * (power / tl.where(sum_ == 1, 1.0, sum_ - 1)))
    return tl.where(x > 0, x, 0.0) + small


@jit
def gelu_to_half(x):  # type: ignore[no-untyped-def]
    """x * Phi(x) for a result in half precision: to 6e-7 absolute and, below zero, 5e-6 relative.

    The logarithm of Phi(-a) is nearly a parabola, so a polynomial of degree 7 will do, fitted to it on
    [0, 5.5] for the least largest difference, 4.5e-6. Its last coefficient is below zero: it goes on falling.
    The error function has twice as many instructions, and made the product of (4096, 768) and (3072, 768)
    53.9 us long where this makes it 39.2 us (H100, float16).
    """
    a = tl.minimum(tl.abs(x), 16.0)
    q = -1.79345498e-06 * a + 6.09041652e-05
    q = q * a - 9.26028923e-04
    q = q * a + 8.49375669e-03
    q = q * a - 5.39378441e-02
    q = q * a - 4.58480511e-01
    q = q * a - 1.15124683
    q = q * a - 0.999995465
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tl.exp2(q)
