"""Products with constant weights, in whatever node they are, and the node built anew with other products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.compiler import cpu
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument
from graphopt.kernels.gated_mlp import OP as GATED_MLP
from graphopt.kernels.linear_activation import OP as LINEAR_ACTIVATION

aten = torch.ops.aten


@dataclass(frozen=True)
class Projection:
    """activation(x @ weight.T + bias).

    Args:
        weight: the node of the weight, (N, K).
        bias: the node of the bias, or None.
        activation: a name of ``kernels/_activations.py``.
        parameter: of the activation.
    """

    weight: fx.Node
    bias: fx.Node | None
    activation: str = "none"
    parameter: float = 1.0


def matches(graph: Graph) -> Iterator[Match]:
    """Every node with products that may be narrowed: projections, and gated blocks with two each."""
    for node in graph.calls:
        if not node._erased and node.target in _READ:
            yield Match(graph, node, (node,))


_READ: dict[Any, str] = {
    aten.linear.default: "input",
    LINEAR_ACTIVATION.overload: "x",
    GATED_MLP.overload: "x",
}


def source(node: fx.Node) -> fx.Node:
    """What the products of a node are of; another node once what computes it was rewritten."""
    found: fx.Node = argument(node, _READ[node.target])
    return found


def projections(node: fx.Node) -> list[Projection]:
    """The products of a node, the gate first."""
    if node.target is GATED_MLP.overload:
        weight, bias = argument(node, "gate_weight"), argument(node, "gate_bias")
        gate = Projection(weight, bias, argument(node, "activation"))
        return [gate, Projection(argument(node, "up_weight"), argument(node, "up_bias"))]
    plain = Projection(argument(node, "weight"), argument(node, "bias"))
    if node.target is aten.linear.default:
        return [plain]
    return [Projection(plain.weight, plain.bias, argument(node, "activation"), argument(node, "parameter"))]


def refuse(match: Match, least: int, because: str) -> str | None:
    """Why the products cannot be narrowed; None where they can.

    Args:
        match: of ``matches``.
        least: numbers that a weight must have.
        because: why fewer are not worth it.
    """
    reasons = (_refuse(match, one.weight, least, because) for one in projections(match.root))
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is None and match.root.target is LINEAR_ACTIVATION.overload:
        added = argument(match.root, "residual") is not None
        return "a residual is added behind the activation" if added else None
    return reason


def _refuse(match: Match, node: fx.Node, least: int, because: str) -> str | None:
    weight, x = match.graph.constant(node), source(match.root).meta["val"]
    if weight is None:
        return "the weight is not a constant"
    if weight.dtype != torch.float32 or x.dtype != torch.float32 or weight.dim() != 2:
        return f"the weight is {weight.dtype} of {weight.dim()} dimensions, not float32 of 2"
    if weight.device.type != "cpu":
        return f"the weight is on {weight.device}: integers are for the CPU"
    if weight.numel() < least:
        return f"{weight.numel()} weights are too few: {because}"
    return None if bool(weight.isfinite().all()) else "the weight is not finite"


def rebuild(rewriter: Rewriter, match: Match, make: Callable[[Projection], fx.Node]) -> None:
    """Stage a node anew with each of its products made by a function, which returns what it staged."""
    made = [make(one) for one in projections(match.root)]
    rewriter.replace(match.root, made[0] if len(made) == 1 else rewriter.call(aten.mul.Tensor, *made))


def largest_code() -> int:
    """The largest code of a weight in int8 that may be multiplied by codes of 8 bits without a sign.

    Without VNNI two such products are added in 16 bits, which saturate.
    """
    return 127 if cpu.features().vnni else 63


def rows_in_int8(weight: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, int8 within +-largest, and a scale for each row: those of weight's shape (N, ...), and (N,)."""
    scale = weight.flatten(1).abs().amax(1) / largest
    scale = torch.where(scale == 0, 1.0, scale)
    shaped = scale.view(-1, *[1] * (weight.dim() - 1))
    return (weight / shaped).round().clamp(-largest, largest).to(torch.int8), scale
