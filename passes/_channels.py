"""Channels that must be removed together: the layers that make them, those that read them, what lies between.

    group = follow(graph, node, axis, units)
    group.refusal            why these channels cannot be removed, or None
    group.idle()             which of them add nothing, or a constant, to what comes out
    narrow(rewriter, group, kept)       (in _narrow.py) removes the others

What adds nothing is a channel whose weights are zero, in the layer that makes it or in every layer that reads
it. Values are taken to be finite: 0 times infinity, which the original may compute there, is taken for 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import Graph
from graphopt.ir.pattern import argument
from graphopt.passes._axes import Axis, fits, rule, shape
from graphopt.passes._layers import CONVOLUTIONS, TRANSPOSED
from graphopt.passes._ranges import as_uniform
from graphopt.passes._stacks import Stack, stacked, taken

aten = torch.ops.aten

_AVERAGES = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
_MATMULS = (aten.matmul.default, aten.mm.default)


@dataclass(frozen=True)
class Layer:
    """A product with a constant weight.

    Args:
        node: the call.
        weight: its weight.
        bias: its bias, if it has one.
        made: the weight's dimension that goes with the output's channels.
        read: the weight's dimension that goes with the input's channels.
        dim: the dimension of the channels in input and output, counted from the end.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    made: int
    read: int
    dim: int


def layer(graph: Graph, node: fx.Node) -> Layer | None:
    """The call as a layer, or None: a linear map, a convolution of one group, a product with a matrix."""
    if node.op != "call_function":
        return None
    if node.target is aten.linear.default:
        found = Layer(node, argument(node, "weight"), argument(node, "bias"), 0, 1, -1)
    elif node.target in (*CONVOLUTIONS, *TRANSPOSED) and argument(node, "groups") == 1:
        made = int(node.target in TRANSPOSED)
        dim = 2 - len(shape(argument(node, "weight")))
        found = Layer(node, argument(node, "weight"), argument(node, "bias"), made, 1 - made, dim - 1)
    elif node.target in _MATMULS and len(shape(node.args[1])) == 2:  # type: ignore[arg-type]
        found = Layer(node, node.args[1], None, 1, 0, -1)  # type: ignore[arg-type]
    else:
        return None
    constants = [graph.constant(found.weight)] + ([graph.constant(found.bias)] if found.bias else [])
    fixed = all(value is not None and value.is_floating_point() for value in constants)
    return found if fixed and len(shape(found.weight)) >= 2 else None


def is_depthwise(graph: Graph, node: fx.Node) -> bool:
    """True for a convolution of each channel by itself, with constant filters."""
    if node.op != "call_function" or node.target not in CONVOLUTIONS:
        return False
    weight, bias = (argument(node, name) for name in ("weight", "bias"))
    alone = argument(node, "groups") > 1 and shape(weight)[1] == 1
    return alone and all(part is None or graph.constant(part) is not None for part in (weight, bias))


@dataclass
class Group:
    """Channels that are removed together, one unit of all at a time.

    Args:
        graph: the graph.
        units: how many there are.
        axes: where every value that keeps them keeps them.
        made: the layers that make them.
        read: the layers that read them, with where their input keeps them.
        sizes: reads of a size of a value in between.
        refusal: why they cannot be removed.
    """

    graph: Graph
    units: int
    axes: dict[fx.Node, Axis] = field(default_factory=dict)
    made: dict[fx.Node, Layer] = field(default_factory=dict)
    read: dict[fx.Node, tuple[Layer, Axis]] = field(default_factory=dict)
    sizes: list[fx.Node] = field(default_factory=list)
    refusal: str | None = None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Everything between, and the layers themselves, in topological order."""
        return tuple(sorted({*self.axes, *self.read, *self.sizes}))

    def refuse(self, reason: str) -> None:
        """Keep the first reason."""
        self.refusal = self.refusal or reason

    def unread(self) -> torch.Tensor:
        """(units,) bool: zero in the weights of every layer that reads them."""
        found = torch.full((self.units,), bool(self.read))
        for one, axis in self.read.values():
            zero = blocks(self.graph, one.weight, one.read, axis, self.units).eq(0)
            found &= zero.all(3).all(2).all(0).cpu()
        return found

    def unmade(self, every_part: bool = True) -> torch.Tensor:
        """(units,) bool: zero in the weights and biases of a layer that makes them.

        Args:
            every_part: in all parts of a layer that makes several, rather than in one of them.
        """
        found = torch.zeros(self.units, dtype=torch.bool)
        for node, one in self.made.items():
            zero = _zero_rows(self.graph, one, self.axes[node], self.units)
            found |= zero.all(0) if every_part else zero.any(0)
        return found

    def idle(self) -> torch.Tensor:
        """(units,) bool: what adds nothing but a constant to every layer that reads it."""
        values = constants(self)
        found = torch.ones(self.units, dtype=torch.bool)
        for node, (one, axis) in self.read.items():
            zero = blocks(self.graph, one.weight, one.read, axis, self.units).eq(0).all(3).cpu()
            value = values[node.all_input_nodes[0]]
            known = value.eq(0) | (value.isfinite() & takes_constants(one))
            found &= (zero | known).all(2).all(0)
        return found


def follow(graph: Graph, start: fx.Node, axis: Axis, units: int) -> Group:
    """Everything that keeps the channels of a value, in both directions, up to the layers around it."""
    group = Group(graph, units)
    work = [(start, axis)]
    while work:
        node, axis = work.pop()
        if node in group.axes or node.op == "get_attr":
            if group.axes.get(node, axis) != axis:
                group.refuse(f"{node.name} keeps the channels in two ways")
            continue
        if node.op != "call_function" or not fits(node, axis, units):
            what = "is an input" if node.op == "placeholder" else "has not the size that these channels have"
            group.refuse(f"{node.name} {what}")
            continue
        group.axes[node] = axis
        work += [*_behind(group, node, axis), *_ahead(group, node, axis)]
    if not group.read:
        group.refuse("no layer reads these channels")
    return group


def _behind(group: Group, node: fx.Node, axis: Axis) -> list[tuple[fx.Node, Axis]]:
    one = layer(group.graph, node)
    if one is not None and one.dim == axis.dim:
        group.made[node] = one
        return []
    if is_depthwise(group.graph, node):
        x, inner = node.all_input_nodes[0], axis.inner * argument(node, "groups") // shape(node)[axis.dim]
        return [(x, axis._replace(inner=inner))]
    known = rule(node)
    found = (
        f"{node.name} is not known to keep channels apart"
        if known is None
        else known.behind(node, axis, group.units)
    )
    if isinstance(found, str):
        group.refuse(found)
        return []
    return list(found.items())


def _ahead(group: Group, node: fx.Node, axis: Axis) -> list[tuple[fx.Node, Axis]]:
    found: list[tuple[fx.Node, Axis]] = []
    for user in node.users:
        one = layer(group.graph, user)
        known = rule(user)
        if one is not None and one.dim == axis.dim and user.args[0] is node:
            group.read[user] = one, axis
            continue
        if user.target is aten.sym_size.int:
            group.sizes.append(user)
            continue
        if is_depthwise(group.graph, user) and axis.dim == 1 - len(shape(node)):
            inner = axis.inner * shape(user)[axis.dim] // argument(user, "groups")
            found.append((user, axis._replace(inner=inner)))
            continue
        out: Axis | str = (
            f"{user.name} needs all channels" if user.op != "output" else f"{node.name} is returned"
        )
        if known is not None:
            out = known.ahead(user, node, axis, group.units)
        if isinstance(out, str):
            group.refuse(out)
        else:
            found.append((user, out))
    return found


def blocks(graph: Graph, constant: fx.Node, dim: int, axis: Axis, units: int) -> torch.Tensor:
    """A constant as (outer, units, inner, everything else)."""
    value = graph.constant(constant)
    assert value is not None
    return value.movedim(dim, 0).reshape(axis.outer, units, axis.inner, -1)


def _zero_rows(graph: Graph, one: Layer, axis: Axis, units: int) -> torch.Tensor:
    """(outer, units) bool."""
    zero = blocks(graph, one.weight, one.made, axis, units).eq(0).all(3)
    if one.bias is not None:
        zero &= blocks(graph, one.bias, 0, axis, units).eq(0).all(3)
    return zero.all(2).cpu()


def takes_constants(one: Layer) -> bool:
    """True when a constant input gives a constant output, which its bias can hold: no zeros are padded in."""
    if one.node.target in _MATMULS or one.node.target in TRANSPOSED:
        return False
    if one.node.target is aten.linear.default:
        return True
    return _unpadded(one.node)


def _unpadded(node: fx.Node) -> bool:
    """True when no zeros are put around an image."""
    padding: Any = argument(node, "padding")
    return padding == "valid" or (not isinstance(padding, str) and not torch.tensor(padding).any())


# What is known of every channel


def constants(group: Group) -> dict[fx.Node, torch.Tensor]:
    """What each channel is for all inputs, NaN where it varies: (outer, units, inner), on the CPU."""
    values: dict[fx.Node, torch.Tensor] = {}
    stacks: dict[fx.Node, Stack] = {}
    for node in sorted(group.axes):
        axis = group.axes[node]
        size = axis.outer, group.units, axis.inner
        part, stack = taken(node, stacks), stacked(node, group.axes, values, stacks, _as)
        if stack is not None:
            stacks[node] = stack
        if node in group.made:
            values[node] = _made(group, group.made[node], axis)
        elif is_depthwise(group.graph, node):
            values[node] = _filtered(group, node, values)
        elif part is not None:
            values[node] = _as(part, axis)
        else:
            values[node] = _passed(group, node, values).broadcast_to(size)
    return values


def _made(group: Group, one: Layer, axis: Axis) -> torch.Tensor:
    """The bias where a row is zero."""
    zero = blocks(group.graph, one.weight, one.made, axis, group.units).eq(0).all(3).cpu()
    bias = torch.zeros(()).double()
    if one.bias is not None:
        bias = blocks(group.graph, one.bias, 0, axis, group.units)[..., 0].double().cpu()
    return torch.where(zero, bias, torch.nan)


def _filtered(group: Group, node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    """The bias, where the filter of a channel or the channel is zero."""
    axis = group.axes[node]
    zero = blocks(group.graph, argument(node, "weight"), 0, axis, group.units).eq(0).all(3).cpu()
    zero |= _as(values[node.all_input_nodes[0]], axis).eq(0)
    bias = torch.zeros(()).double()
    if argument(node, "bias") is not None:
        bias = blocks(group.graph, argument(node, "bias"), 0, axis, group.units)[..., 0].double().cpu()
    return torch.where(zero, bias, torch.nan)


def _passed(group: Group, node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    known, axis = rule(node), group.axes[node]
    assert known is not None
    if known.constant == "unknown":
        return torch.full((), torch.nan).double()
    if known.constant == "computed":
        return _computed(group, node, values)
    if known.constant == "part":
        return _part(node, values[node.all_input_nodes[0]], axis)
    if known.constant == "normalised":
        return _normalised(group, node, values[node.all_input_nodes[0]])
    sources = node.args[2:3] if known.constant == "attended" else node.all_input_nodes
    given = [_as(values[s], axis) for s in sources if s in values]  # type: ignore[index]
    if not given:  # it reads nothing of the group: positions added to scores, a mask
        return torch.full((), torch.nan).double()
    if known.constant == "kept" or (node.target in _AVERAGES and _unpadded(node)):
        return given[0]
    zero = torch.stack([value.eq(0) for value in given])
    of_all = node.target is aten.cat.default  # a product is zero where one factor is
    return torch.where(zero.all(0) if of_all else zero.any(0), 0.0, torch.nan).double()


def _normalised(group: Group, node: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Batch norm of what is known."""
    names = ("weight", "bias", "running_mean", "running_var")
    given = [argument(node, name) for name in names]
    numbers = [None if source is None else group.graph.constant(source) for source in given]
    if any(number is None and source is not None for number, source in zip(numbers, given, strict=True)):
        return torch.full((), torch.nan).double()
    wide = [None if number is None else number.double().cpu() for number in numbers]
    eps = argument(node, "eps")
    normed: torch.Tensor = aten.batch_norm.default(value.reshape(1, -1), *wide, False, 0.0, eps, False)
    return normed.reshape(value.shape)


def _computed(group: Group, node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    """The operation itself, on one element a channel in float64; 0 times anything is 0."""
    axis = group.axes[node]
    known = rule(node)
    behind = known.behind(node, axis, group.units) if known else {}
    assert isinstance(behind, dict)

    def read(source: fx.Node) -> Any:
        if source in values:
            return _as(values[source], axis)
        if source in behind and group.graph.constant(source) is not None:
            block = blocks(group.graph, source, axis.dim, behind[source], group.units).double().cpu()
            return torch.where((block == block[..., :1]).all(3), block[..., 0], torch.nan)
        number = as_uniform(group.graph, source)
        return torch.tensor(torch.nan if number is None else float(number)).double()

    mapped: Any = fx.map_arg((node.args, node.kwargs), read)
    args, kwargs = mapped
    if node.target is aten.to.dtype:
        kept: torch.Tensor = args[0]
        return kept if node.meta["val"].is_floating_point() else torch.full((), torch.nan).double()
    result: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    if node.target is aten.mul.Tensor:
        zero = torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, args))).eq(0).any(0)
        result = torch.where(zero, 0.0, result)
    return result.double()


def _part(node: fx.Node, whole: torch.Tensor, axis: Axis) -> torch.Tensor:
    """One part of a split: some of the outer repetitions, or, along another dimension, all of them."""
    if whole.shape[0] == axis.outer:
        return whole
    index: Any = node.args[1]
    return whole[index * axis.outer : (index + 1) * axis.outer]


def _as(value: torch.Tensor, axis: Axis) -> torch.Tensor:
    """What is known, in another arrangement of the same units: NaN where elements differ."""
    for dim, size in ((0, axis.outer), (2, axis.inner)):
        if value.shape[dim] not in (1, size):
            first = value.narrow(dim, 0, 1)
            value = torch.where((value == first).all(dim, keepdim=True), first, torch.nan)
    return value.expand(axis.outer, value.shape[1], axis.inner)
