"""The ops: one file an op, registered on import."""

from graphopt.kernels import (
    add_layer_norm,
    add_rms_norm,
    attention,
    bias_gelu,
    embedding_layer_norm,
    gated_mlp,
    quick_gelu,
    rms_norm,
    rope,
)

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "bias_gelu",
    "embedding_layer_norm",
    "gated_mlp",
    "quick_gelu",
    "rms_norm",
    "rope",
]
