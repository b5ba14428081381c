"""The ``onednn`` executor: PyTorch's own kernels on the CPU, with weights packed once for oneDNN.

PyTorch's linear layer packs its weight at every call: in bfloat16, where the product itself is fast, that
takes as long again as the product. Here the packed weight is a constant and the activation the product's
epilogue, and products in 8 bits run in 8 bits, where ``eager`` only imitates them. All else runs as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.errors import LoweringError
from graphopt.ir.graph import Graph
from graphopt.ir.op import op_of
from graphopt.ir.pattern import argument
from graphopt.kernels import dynamic_quantized_linear, linear_activation, static_quantized_linear
from graphopt.kernels._activations import TORCH
from graphopt.runtime.executors._protocol import KernelTime, Silent
from graphopt.runtime.executors.eager import timed
from graphopt.runtime.region import Region
from graphopt.runtime.target import Target

aten = torch.ops.aten

# Epilogues of oneDNN: its name, and the variant; the parameter is handed over where there is one.
_EPILOGUES = {
    **{name: (name, "") for name in ("none", "relu", "sigmoid", "tanh", "hardswish", "leaky_relu")},
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}

# Those that products in 8 bits take.
_INT8_EPILOGUES = {name: _EPILOGUES[name] for name in ("none", "relu", "gelu", "gelu_tanh")}


class OnednnProgram(Silent):
    """A region as generated Python over ATen ops and packed weights.

    Args:
        module: the region, its products replaced.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Run the region under ``no_grad``."""
        with torch.no_grad():
            results: Sequence[Any] = self._module.forward(*inputs)
        return results

    def profile(self, inputs: Sequence[torch.Tensor]) -> tuple[Sequence[Any], list[KernelTime]]:
        """Run node by node, and time each."""
        return timed(self._module, inputs)


class Onednn:
    """Packs weights for PyTorch's kernels on the CPU."""

    name = "onednn"

    def supports(self, node: fx.Node, target: Target) -> str | None:
        """Everything is supported where PyTorch has oneDNN."""
        if target.device.type != "cpu":
            return f"the onednn executor runs on the CPU, the target is {target}"
        return None if torch.backends.mkldnn.is_available() else "this PyTorch is built without oneDNN"

    def compile(self, region: Region, target: Target, effort: str) -> OnednnProgram:
        """Pack the weights.

        Raises:
            LoweringError: there is none to pack, so that this would be ``eager``.
        """
        module = _copied(region.graph)
        packed = sum(_pack(module, region.graph, node) for node in list(module.graph.nodes))
        if not packed:
            raise LoweringError("no product of the region has a weight to pack")
        module.graph.eliminate_dead_code()
        module.recompile()
        return OnednnProgram(module)


def _copied(graph: Graph) -> fx.GraphModule:
    """The region with graphopt's ops as their references, which need no dispatch."""
    copied, made = fx.Graph(), dict[fx.Node, fx.Node]()
    copied.output(copied.graph_copy(graph.fx, made))
    for old, new in made.items():
        new.meta = dict(old.meta)
    return fx.GraphModule(graph.module, copied)


def _pack(module: fx.GraphModule, graph: Graph, node: fx.Node) -> bool:
    """Replace one node by its packed form; returns whether there is one."""
    rule = _RULES.get(node.target)
    weight = graph.constant(argument(node, "weight")) if rule is not None else None
    if rule is not None and weight is not None and weight.dim() == 2 and rule(module, node, weight):
        return True
    op = op_of(node.target)
    if op is not None:
        node.target = op.reference
    return False


def _packed_linear(module: fx.GraphModule, node: fx.Node, weight: torch.Tensor) -> bool:
    """``mkldnn::_linear_pointwise``: a packed weight, and an activation or a sum behind the product."""
    plain = node.target is aten.linear.default
    activation = "none" if plain else argument(node, "activation")
    residual = None if plain else argument(node, "residual")
    if activation not in _EPILOGUES or not _multiplies(weight.dtype):
        return False
    if residual is not None and activation != "none":
        return False
    name, variant = _EPILOGUES[activation]
    scalars = [argument(node, "parameter")] if activation == "leaky_relu" else []
    packed = _attribute(module, node, torch.ops.mkldnn._reorder_linear_weight(weight))
    x, bias = argument(node, "input" if plain else "x"), argument(node, "bias")
    if residual is None:
        node.target = torch.ops.mkldnn._linear_pointwise.default
        node.args = (x, packed, bias, name, scalars, variant)
    else:
        node.target = torch.ops.mkldnn._linear_pointwise.binary
        node.args = (x, residual, packed, bias, "add")
    node.kwargs = {}
    return True


def _multiplies(dtype: torch.dtype) -> bool:
    """True when oneDNN has products of a type on this processor."""
    half = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return bool(half[dtype]()) if dtype in half else dtype == torch.float32


def _packed_int8(module: fx.GraphModule, node: fx.Node, weight: torch.Tensor) -> bool:
    """``onednn::qlinear_pointwise`` of the rows' codes, and both corrections as one product of rank 2."""
    scale, bias = (_constant(module, argument(node, name)) for name in ("scale", "bias"))
    if scale is None or scale.dtype != torch.float32 or (bias is None) != (argument(node, "bias") is None):
        return False
    sums = weight.float().sum(1) * scale
    right = torch.stack([sums, torch.zeros_like(sums) if bias is None else bias])
    packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    zeros = torch.zeros(weight.shape[0], dtype=torch.int32)
    held = [_attribute(module, node, tensor) for tensor in (packed, scale, zeros, right)]
    epilogue = [argument(node, name) for name in ("activation", "parameter")]
    node.args, node.kwargs = (argument(node, "x"), *held, *epilogue), {}
    node.target = int8_linear
    return True


def int8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale_N: torch.Tensor,
    zeros_N: torch.Tensor,
    right_2N: torch.Tensor,
    activation: str,
    parameter: float,
) -> torch.Tensor:
    """``graphopt::dynamic_quantized_linear`` with a packed weight.

    Args:
        x: (..., K), float32.
        packed: the weight, as oneDNN wants it.
        scale_N: (N,), of the weight.
        zeros_N: (N,), int32 zeros: those of the weight.
        right_2N: (2, N): the sums of the dequantized weight's rows, and the bias.
        activation: behind the product.
        parameter: of the activation.
    """
    codes_MK, step_M1, zero_M1 = dynamic_quantized_linear.quantized_rows(x.reshape(-1, x.shape[-1]))
    out_MN = torch.ops.onednn.qlinear_pointwise(
        codes_MK.to(torch.uint8),
        1.0,
        0,
        packed,
        scale_N,
        zeros_N,
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    left_M2 = torch.cat([-step_M1 * zero_M1, torch.ones_like(step_M1)], 1)
    out_MN = torch.addmm(out_MN.mul_(step_M1), left_M2, right_2N)
    return TORCH[activation](out_MN, parameter).view(*x.shape[:-1], right_2N.shape[1])


def _packed_static_int8(module: fx.GraphModule, node: fx.Node, weight: torch.Tensor) -> bool:
    """``onednn::qlinear_pointwise`` with the bias in it, and those activations that it takes."""
    names = ("scale", "factor", "bias")
    scale, factor, bias = (_constant(module, argument(node, name)) for name in names)
    if scale is None or factor is None or scale.dtype != torch.float32:
        return False
    if bias is None and argument(node, "bias") is not None:
        return False
    packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    zeros = torch.zeros(weight.shape[0], dtype=torch.int32)
    held = [_attribute(module, node, tensor) for tensor in (packed, scale, zeros, factor)]
    rest = [argument(node, name) for name in ("zero_point", "bias", "activation", "parameter")]
    node.args, node.kwargs = (argument(node, "x"), *held, *rest), {}
    node.target = static_int8_linear
    return True


def static_int8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale_N: torch.Tensor,
    zeros_N: torch.Tensor,
    factor_K: torch.Tensor,
    zero_point: int,
    bias_N: torch.Tensor | None,
    activation: str,
    parameter: float,
) -> torch.Tensor:
    """``graphopt::static_quantized_linear`` with a packed weight.

    Args:
        x: (..., K), float32.
        packed: the weight, as oneDNN wants it.
        scale_N: (N,), of the product.
        zeros_N: (N,), int32 zeros: those of the weight.
        factor_K: (K,), steps of x, inverted.
        zero_point: the code of 0.
        bias_N: (N,), float32, or None.
        activation: behind the product.
        parameter: of the activation.
    """
    scaled_MK = x.reshape(-1, x.shape[-1]) * factor_K
    codes_MK = scaled_MK.round_().add_(zero_point).clamp_(0, 255).to(torch.uint8)
    inside = _INT8_EPILOGUES.get(activation)
    name, variant = ("none", "") if inside is None else inside
    out_MN = torch.ops.onednn.qlinear_pointwise(
        codes_MK,
        1.0,
        zero_point,
        packed,
        scale_N,
        zeros_N,
        bias_N,
        1.0,
        0,
        torch.float32,
        name,
        [],
        variant,
    )
    out_MN = out_MN if inside is not None else TORCH[activation](out_MN, parameter)
    return out_MN.view(*x.shape[:-1], scale_N.shape[0])


def _constant(module: fx.GraphModule, node: Any) -> torch.Tensor | None:
    """The tensor that a ``get_attr`` node of a module reads; None for anything else."""
    is_constant = isinstance(node, fx.Node) and node.op == "get_attr"
    return getattr(module, str(node.target)) if is_constant else None


def _attribute(module: fx.GraphModule, node: fx.Node, packed: Any) -> fx.Node:
    """A packed weight as a constant of the module, read in front of a node."""
    name = f"_packed_{len(module._buffers)}"
    module.register_buffer(name, packed, persistent=False)
    with module.graph.inserting_before(node):
        return module.graph.get_attr(name)


_RULES: dict[Any, Callable[[fx.GraphModule, fx.Node, torch.Tensor], bool]] = {
    aten.linear.default: _packed_linear,
    linear_activation.OP.overload: _packed_linear,
    dynamic_quantized_linear.OP.overload: _packed_int8,
    static_quantized_linear.OP.overload: _packed_static_int8,
}
