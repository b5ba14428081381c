"""The activations of ``_activations.py`` as functions of float32 blocks, for epilogues in Triton."""

from __future__ import annotations

from graphopt.kernels._triton import jit, tl


@jit
def activate(x, parameter, ACTIVATION: tl.constexpr):
    """The activation of that name. x is a block of float32."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "relu6":
        x = tl.minimum(tl.maximum(x, 0.0), 6.0)
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x > 0, x, parameter * x)
    elif ACTIVATION == "elu":
        x = tl.where(x > 0, x, parameter * (tl.exp(x) - 1))
    elif ACTIVATION == "selu":
        x = 1.0507009873554805 * tl.where(x > 0, x, 1.6732632423543772 * (tl.exp(x) - 1))
    elif ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        x = _tanh(x)
    elif ACTIVATION == "softplus":
        x = _softplus(x)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "mish":
        x = x * _tanh(_softplus(x))
    elif ACTIVATION == "hardswish":
        x = x * tl.minimum(tl.maximum(x + 3, 0.0), 6.0) / 6
    elif ACTIVATION == "hardsigmoid":
        x = tl.minimum(tl.maximum(x + 3, 0.0), 6.0) / 6
    elif ACTIVATION == "gelu":
        x = _gelu(x)
    elif ACTIVATION == "gelu_tanh":  # 0.5 * (1 + tanh(y)) is sigmoid(2 * y)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(parameter * x)
    else:
        tl.static_assert(ACTIVATION == "none", "the activation has no Triton form")
    return x


@jit
def _gelu(x):  # type: ignore[no-untyped-def]
    """x * Phi(x), to 6e-7 absolute and, below zero, 5e-6 relative: far inside half a place of float16.

    The logarithm of Phi(-a) is nearly a parabola, so a polynomial of degree 7 that was fitted to it on
    [0, 5.5] (least largest difference, 4.5e-6) does; its last coefficient is below zero, so that it goes on
    falling. Half as many instructions as the error function, which cost a product of (12608, 768) and
    (3072, 768) 60 of 160 us on an H100.
    """
    a = tl.minimum(tl.abs(x), 16.0)
    q = -1.79345498e-06 * a + 6.09041652e-05
    q = q * a - 9.26028923e-04
    q = q * a + 8.49375669e-03
    q = q * a - 5.39378441e-02
    q = q * a - 4.58480511e-01
    q = q * a - 1.15124683
    q = q * a - 0.999995465
    return tl.maximum(x, 0.0) - a * tl.exp2(q)


@jit
def _tanh(x):
    """To 2e-7 absolute: libdevice's, which is closer, is not there in the interpreter."""
    return 2 * tl.sigmoid(2 * x) - 1


@jit
def _softplus(x):
    """torch's, which is x itself above its threshold of 20."""
    return tl.where(x > 20, x, tl.log(1 + tl.exp(tl.minimum(x, 20.0))))
