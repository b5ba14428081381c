"""Running parts of a Graph: in the model's own precision, and in float64 as the reference."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from graphopt.ir.graph import Graph, size_hint

aten = torch.ops.aten

_LARGE = 2**20  # numbers of a weight: 8 MiB in float64

_LEAST_CACHE, _MOST_CACHE = 16 * 2**20, 256 * 2**20  # bytes

# Ops that only pick out numbers, whatever their precision.
_LOOKUPS = frozenset(
    {aten.embedding.default, aten.index_select.default, aten.gather.default, aten.index.Tensor}
)


def evaluate(
    graph: Graph,
    wanted: Sequence[fx.Node],
    given: Mapping[fx.Node, Any],
    *,
    float64: bool = False,
    noise: torch.Generator | None = None,
    see: Callable[[fx.Node, Any], None] | None = None,
) -> list[Any]:
    """Compute nodes from the values of other nodes, running nothing that is not needed.

    Args:
        graph: the graph; its constants are used as they are.
        wanted: the nodes to compute.
        given: values to start from: at least the placeholders that the wanted nodes depend on.
        float64: run every floating tensor and every explicit floating cast in float64, which gives the
            reference that both sides of a rewrite are compared with.
        noise: round every computed value at random, by up to half a unit in the last place: what then differs
            from run to run is what rounding alone decides (Monte Carlo arithmetic: Parker, 1997).
        see: called with every node that is computed and its value, which is not kept.

    Returns:
        The values of the wanted nodes, in order.
    """
    needed = _ancestors(wanted, given)

    def read(node: fx.Node) -> Any:
        return graph.constant(node) if node.op == "get_attr" else values[node]

    reads = {node: sum(user in needed for user in node.users) for node in needed}
    keep = set(wanted)
    values: dict[fx.Node, Any] = {n: widen(v) if float64 else v for n, v in given.items()}
    with torch.no_grad():
        for node in sorted(needed):
            if node.op == "get_attr":
                continue
            values[node] = _call_float64(node, read) if float64 else _call(node, read)
            if noise is not None and not _is_view(node):
                values[node] = pytree.tree_map(lambda v: _rounded(v, noise), values[node])
            if see is not None:
                see(node, values[node])
            for source in node.all_input_nodes:
                if source in reads and source.op != "get_attr":
                    reads[source] -= 1
                    if reads[source] == 0 and source not in keep:
                        del values[source]
    return [widen(read(node)) if float64 else read(node) for node in wanted]


def outputs(
    graph: Graph,
    inputs: Sequence[torch.Tensor],
    *,
    float64: bool = False,
    noise: torch.Generator | None = None,
) -> list[Any]:
    """What a graph returns for flat tensor inputs, literals and repeated outputs included."""
    results: Any = graph.output.args[0]
    wanted = [result for result in results if isinstance(result, fx.Node)]
    given = dict(zip(graph.placeholders, inputs, strict=True))
    found = iter(evaluate(graph, wanted, given, float64=float64, noise=noise))
    return [next(found) if isinstance(result, fx.Node) else result for result in results]


def _is_view(node: fx.Node) -> bool:
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return any(value.alias_info is not None for value in returns)


def _rounded(value: Any, noise: torch.Generator) -> Any:
    """A value with each number moved by up to half a unit in the last place; infinities and fills stay."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    info = torch.finfo(value.dtype)
    draw = torch.rand(value.shape, generator=noise, dtype=torch.float64).sub_(0.5).to(value.device)
    if (
        value.dtype == torch.float64
    ):  # there is nothing wider to round from: a quarter goes up, a quarter down
        towards = torch.where(draw.abs() > 0.25, draw.sign() * torch.inf, value)
        moved = torch.nextafter(value, towards)
    else:
        moved = (value.double() * draw.mul_(info.eps).add_(1.0)).to(value.dtype)
    return torch.where(value.abs() < 0.25 * info.max, moved, value)


def _call(node: fx.Node, read: Callable[[fx.Node], Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), read)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _call_float64(node: fx.Node, read: Callable[[fx.Node], Any]) -> Any:
    """The call in float64; an op that has no such kernel runs in its own precision.

    Constants are widened here, at each reader: all weights in float64 are twice the model. One matrix may be
    a third of a small model already, so that of a table only what is looked up is widened, and a large matrix
    in parts.
    """
    if node.target in _LOOKUPS:
        return widen(_call(node, read))
    args, kwargs = pytree.tree_map(_float64_argument, fx.map_arg((node.args, node.kwargs), read))
    try:
        if node.target is aten.linear.default and args[1].numel() > _LARGE:
            return _linear_in_parts(*args)
        args, kwargs = widen((args, kwargs))
        found = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, ValueError, AssertionError):  # NotImplementedError is a RuntimeError
        found = _call(node, lambda source: _narrowed(read(source), source.meta["val"]))
    return widen(found)


def _linear_in_parts(
    x: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """A projection in float64, so many rows of its weight at a time."""
    x = widen(x)
    out = x.new_empty((*x.shape[:-1], weight_NK.shape[0]))
    rows = max(1, _LARGE // weight_NK.shape[1])
    for start in range(0, weight_NK.shape[0], rows):
        part = slice(start, start + rows)
        bias = None if bias_N is None else widen(bias_N[part])
        out[..., part] = torch.nn.functional.linear(x, widen(weight_NK[part]), bias)
    return out


def _narrowed(value: Any, like: Any) -> Any:
    return pytree.tree_map(lambda v, w: v.to(w.dtype) if isinstance(v, torch.Tensor) else v, value, like)


def _ancestors(wanted: Sequence[fx.Node], given: Mapping[fx.Node, Any]) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    work = [node for node in wanted if node not in given]
    while work:
        node = work.pop()
        if node in needed:
            continue
        if node.op == "placeholder":
            raise ValueError(f"no value was given for input {node.name}")
        needed.add(node)
        work.extend(source for source in node.all_input_nodes if source not in given)
    return needed


def widen(value: Any) -> Any:
    """The value with every floating tensor in float64, every complex one in complex128."""
    return pytree.tree_map(lambda v: v.to(_wide(v.dtype)) if isinstance(v, torch.Tensor) else v, value)


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def _float64_argument(value: Any) -> Any:
    return _wide(value) if isinstance(value, torch.dtype) else value


class Activations:
    """The values that the example inputs give inside a graph, computed when asked for.

    Args:
        graph: the graph; it may be rewritten between calls, as long as values stay what they are.
        inputs: the flat tensor inputs, in placeholder order.
    """

    def __init__(self, graph: Graph, inputs: Sequence[torch.Tensor]) -> None:
        self.graph = graph
        held = sum(_bytes(constant.tensor) for constant in graph.constants.values())
        self._limit = max(_LEAST_CACHE, min(_MOST_CACHE, held // 8))
        self._inputs = dict(zip(graph.placeholders, inputs, strict=True))
        self._cache: OrderedDict[fx.Node, Any] = OrderedDict()

    def values(self, nodes: Sequence[fx.Node]) -> list[Any]:
        """The values of nodes; recent ones are kept, up to an eighth of the weights."""
        for node in [node for node in self._cache if node._erased]:
            del self._cache[node]
        found = evaluate(self.graph, nodes, {**self._inputs, **self._cache})
        for node, value in zip(nodes, found, strict=True):
            if node.op == "call_function":
                self._cache[node] = value
                self._cache.move_to_end(node)
        while sum(map(_bytes, self._cache.values())) > self._limit and len(self._cache) > 1:
            self._cache.popitem(last=False)
        return found


def _bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor))


def concrete(val: Any, device: str = "meta") -> Any:
    """A fake value with numbers for its symbolic sizes; its tensors become empty ones on a device."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return torch.empty(hint_shape(leaf), dtype=leaf.dtype, device=device)
        return size_hint(leaf) if isinstance(leaf, torch.SymInt) else leaf

    return pytree.tree_map(of_leaf, val)


def hint_shape(value: torch.Tensor) -> tuple[int, ...]:
    """A fake tensor's shape in numbers."""
    return tuple(size_hint(size) for size in value.shape)
