"""Numbers kept in few bits: what PyTorch's quantization puts into a graph, and with which parameters.

A quantizer writes ``quantize`` and ``dequantize`` of ``quantized_decomposed``, which exist once some package
has registered them, or ``fake_quantize``, which is both in one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import Graph
from graphopt.ir.pattern import arguments

aten = torch.ops.aten

_NAMESPACE = "quantized_decomposed"
_FAKE = (
    aten.fake_quantize_per_tensor_affine.default,
    aten.fake_quantize_per_tensor_affine.tensor_qparams,
    aten.fake_quantize_per_channel_affine.default,
)
_SINGULAR = {"scales": "scale", "zero_points": "zero_point"}
# A scale whose reciprocal float32 holds to the last bit but one.
_SMALLEST, _LARGEST = 2.0**-100, 2.0**100


@dataclass(frozen=True)
class Coding:
    """value = (code - zero_point) * scale.

    Args:
        scale: one number, or one an index of the axis.
        zero_point: the code of 0, in the same shape.
        axis: along which they vary; None for none.
        low: the smallest code.
        high: the largest code.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    axis: int | None
    low: int
    high: int

    @property
    def is_sound(self) -> bool:
        """Whether codes of up to 16 bits come back from the float32 values that they stand for."""
        finite = bool(((self.scale >= _SMALLEST) & (self.scale <= _LARGEST)).all())
        near = bool((self.zero_point.abs() <= 2**16).all())
        return finite and near and self.high - self.low < 2**16

    def difference(self, other: Coding) -> str | None:
        """The name of a parameter in which two codings differ, or None."""
        for name in ("scale", "zero_point"):
            if not torch.equal(getattr(self, name), getattr(other, name)):
                return name
        return next((n for n in ("axis", "low", "high") if getattr(self, n) != getattr(other, n)), None)


def calls(graph: Graph, verb: str) -> Iterator[fx.Node]:
    """Every call that quantizes or dequantizes.

    Args:
        graph: the graph.
        verb: ``"quantize"``, ``"dequantize"`` or ``"fake_quantize"``.
    """
    targets: list[Any] = [*_FAKE]
    if verb != "fake_quantize":
        packets = [
            getattr(getattr(torch.ops, _NAMESPACE), f"{verb}_per_{of}", None) for of in ("tensor", "channel")
        ]
        targets = [getattr(p, name) for p in packets if p is not None for name in p.overloads()]
    for target in targets:
        for node in graph.fx.find_nodes(op="call_function", target=target):
            if not node._erased:
                yield node


def is_call(node: Any, verb: str) -> bool:
    """True for a call that does what the verb says (see ``calls``)."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if verb == "fake_quantize":
        return node.target in _FAKE
    packet = node.target._schema.name
    return packet in (f"{_NAMESPACE}::{verb}_per_tensor", f"{_NAMESPACE}::{verb}_per_channel")


def coding(graph: Graph, node: fx.Node) -> Coding | None:
    """The parameters of a call, or None where one of them is no constant."""
    given = {_SINGULAR.get(name, name): value for name, (value, _) in arguments(node).items()}
    numbers: dict[str, torch.Tensor] = {}
    for name in ("scale", "zero_point", "quant_min", "quant_max"):
        value = 0 if given[name] is None else given[name]
        constant = graph.constant(value) if isinstance(value, fx.Node) else torch.tensor(value)
        if constant is None:
            return None
        exact = torch.float64 if name == "scale" else torch.int64
        numbers[name] = constant.detach().cpu().to(exact)
    scale = numbers["scale"]
    axis = given.get("axis")
    return Coding(
        scale,
        numbers["zero_point"].expand_as(scale),
        None if axis is None else int(axis) % node.args[0].meta["val"].dim(),  # type: ignore[union-attr]
        int(numbers["quant_min"]),
        int(numbers["quant_max"]),
    )
