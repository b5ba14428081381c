"""What changes from call to call: inputs of other sizes than the examples, which some prepare for anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.compiler.evaluate import outputs
from graphopt.ir.graph import Graph, size_bounds
from graphopt.runtime.target import Target

_SMALLEST = 2  # sizes of 0 and 1 are often cases of their own


def changing(
    graph: Graph, inputs: Sequence[torch.Tensor], target: Target, mask: str | None = None
) -> list[Sequence[torch.Tensor]]:
    """Inputs as calls will have them: the examples, and what differs in each size that may vary.

    Args:
        graph: as captured.
        inputs: the example inputs: flat tensors in placeholder order.
        target: where they run. On a GPU all have graphs for sizes that come again.
        mask: name of the input that tells real tokens, where their number matters.

    Returns:
        The examples first; they alone where no size varies, or where the model does not take others.
    """
    found = [inputs]
    if target.device.type != "cpu":
        return found
    others = _shorter(graph, inputs)
    if mask is not None:
        others = _with_fewer_tokens(others, [node.name for node in graph.placeholders].index(mask))
    if any(other is not given for other, given in zip(others, inputs, strict=True)):
        try:
            if graph.guards is not None:
                graph.guards(*others)
            outputs(graph, others)
        except (AssertionError, RuntimeError, IndexError):  # a value that the sizes decide: a position
            return found
        found.append(others)
    return found


def _shorter(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The inputs with every size that may vary less by one, where that is allowed."""
    specs = [spec for spec in graph.inputs if spec.node is not None]
    made = list(inputs)
    varying = [size for spec in specs for size in spec.shape if not isinstance(size, int)]
    if not all(size.node.expr.is_Symbol for size in varying):
        return made  # one less of this is not one less of that
    for place, (spec, tensor) in enumerate(zip(specs, inputs, strict=True)):
        for dim, size in enumerate(spec.shape):
            if isinstance(size, int):
                continue
            least, _ = size_bounds(size)
            if tensor.shape[dim] - 1 >= max(_SMALLEST, least):
                made[place] = made[place].narrow(dim, 0, tensor.shape[dim] - 1)
    return [
        tensor if tensor is given else tensor.contiguous() for tensor, given in zip(made, inputs, strict=True)
    ]


def _with_fewer_tokens(inputs: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """The inputs with a mask that pads one token more, the last of the longest sequence."""
    mask = inputs[at].clone()
    counts = torch.count_nonzero(mask, dim=-1)
    row = int(counts.argmax())
    if int(counts[row]) >= _SMALLEST:
        mask[row, int(mask[row].nonzero()[-1])] = 0
    return [*inputs[:at], mask, *inputs[at + 1 :]]
