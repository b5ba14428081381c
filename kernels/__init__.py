"""The ops: one file an op, registered on import."""

from graphopt.kernels import (
    add_layer_norm,
    add_rms_norm,
    attention,
    conv_activation,
    embedding_layer_norm,
    gated_mlp,
    group_norm_silu,
    linear_activation,
    linear_cross_entropy,
    masked_mean_pool,
    quantized_linear,
    quick_gelu,
    rms_norm,
    rope,
)

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "conv_activation",
    "embedding_layer_norm",
    "gated_mlp",
    "group_norm_silu",
    "linear_activation",
    "linear_cross_entropy",
    "masked_mean_pool",
    "quantized_linear",
    "quick_gelu",
    "rms_norm",
    "rope",
]
