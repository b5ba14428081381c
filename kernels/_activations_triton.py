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
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 * (1 + tanh(y)) is sigmoid(2 * y)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(parameter * x)
    else:
        tl.static_assert(ACTIVATION == "none", "the activation has no Triton form")
    return x


@jit
def _tanh(x):
    """To 2e-7 absolute, from the exponential: libdevice's, which is closer, is not there in the interpreter."""
    return 2 * tl.sigmoid(2 * x) - 1


@jit
def _softplus(x):
    """torch's, which is x itself above its threshold of 20."""
    return tl.where(x > 20, x, tl.log(1 + tl.exp(tl.minimum(x, 20.0))))
