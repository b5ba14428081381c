"""assert(c) -> nothing, where c is computed from constants, literals and fixed sizes only, and holds.

Capture writes what the model checks at run time (``torch._check``, ranges of sizes read from tensors) as
calls that nobody reads. The condition is computed here as every call would compute it. What torch knows of a
symbolic size is no proof: the assertion itself may have put it there. Assertions on the type and layout of a
tensor do not get here: capture leaves them to the check of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.evaluate import evaluate
from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """Every assertion, by itself: what only it reads dies with it."""
    for node in graph.calls:
        if not node._erased and node.target in _HOLDS:
            yield Match(graph, node, (node,))


def check(match: Match) -> str | None:
    """Its condition must be the same at every call, and hold."""
    condition: Any = match.root.args[0]
    if isinstance(condition, fx.Node):
        sizes = _fixed_sizes(condition)
        if isinstance(sizes, str):
            return f"its condition depends on {sizes}"
        (condition,) = evaluate(match.graph, [condition], sizes)
    if _HOLDS[match.root.target](match.root, condition):
        return None
    return "its condition is false: every call fails"


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Remove it."""
    rewriter.remove(match.root, proved=True)


def _fixed_sizes(condition: fx.Node) -> dict[fx.Node, int] | str:
    """The sizes of inputs that a condition reads; or what else it reads that may differ between calls.

    A size of anything but an input is computed with what it is a size of: its recorded value may be what an
    assertion says that it is.
    """
    sizes: dict[fx.Node, int] = {}
    seen: set[fx.Node] = set()
    work = [condition]
    while work:
        node = work.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            return f"the input {node.name}"
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return f"the random numbers of {node.name}"
        source = node.all_input_nodes[0] if node.target is aten.sym_size.int else None
        if source is None or source.op != "placeholder":
            work.extend(node.all_input_nodes)
        elif isinstance(node.meta["val"], int):
            sizes[node] = node.meta["val"]
        else:
            return f"dimension {argument(node, 'dim')} of the input {source.name}, which varies"
    return sizes


def _is_true(node: fx.Node, condition: Any) -> bool:
    return bool(condition)


def _is_one_true(node: fx.Node, condition: torch.Tensor) -> bool:
    return condition.numel() == 1 and bool(condition)


def _is_in_range(node: fx.Node, size: Any) -> bool:
    low, high = argument(node, "min"), argument(node, "max")
    return (low is None or low <= size) and (high is None or size <= high)


def _is_size_in_range(node: fx.Node, size: Any) -> bool:
    return bool(size >= 0) and _is_in_range(node, size)


# Whether an assertion holds, by the value of its condition: its first argument.
_HOLDS: dict[Any, Callable[[fx.Node, Any], bool]] = {
    aten._assert_scalar.default: _is_true,
    aten._assert_async.default: _is_one_true,
    aten._assert_async.msg: _is_one_true,
    aten.sym_constrain_range.default: _is_in_range,
    aten.sym_constrain_range_for_size.default: _is_size_in_range,
}

PASS = register(Pass("prune_asserts", "prune", pattern, rewrite, check))
