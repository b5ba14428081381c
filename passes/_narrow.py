"""Removing channels: every layer and value of a group, built anew with those that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.pattern import argument, arguments
from graphopt.passes._axes import Axis, rule, shape
from graphopt.passes._channels import Group, constants, is_depthwise, takes_constants

aten = torch.ops.aten


def narrow(rewriter: Rewriter, group: Group, kept: Sequence[int]) -> None:
    """Stage the group with fewer channels; what stands behind it keeps its shape.

    What a removed channel adds to a layer whatever the inputs are goes into the bias of that layer.

    Args:
        rewriter: of a match that holds the nodes of the group.
        group: without a refusal.
        kept: the units that stay, ascending.
    """
    _Narrower(rewriter, group, kept).run()


class _Narrower:
    def __init__(self, rewriter: Rewriter, group: Group, kept: Sequence[int]) -> None:
        self.rewriter, self.group, self.graph = rewriter, group, rewriter.graph
        self.kept = list(kept)
        self.how = f"{len(self.kept)} of {group.units} units"
        self.values = constants(group)
        self.new: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        """Every node in order; those that keep no channels are replaced."""
        for node in self.group.nodes:
            if node in self.group.made or node in self.group.read:
                new = self._layer(node)
            elif is_depthwise(self.graph, node):
                new = self._depthwise(node)
            else:
                new = self._between(node)
            if node in self.group.axes:
                self.new[node] = new
            else:
                self.rewriter.replace(node, new)

    def _layer(self, node: fx.Node) -> fx.Node:
        """A layer with fewer rows, fewer columns, or both."""
        read = self.group.read.get(node)
        one = read[0] if read else self.group.made[node]
        weight = self.graph.constant(one.weight)
        bias = None if one.bias is None else self.graph.constant(one.bias)
        made_from = [] if one.bias is None else [one.bias]
        assert weight is not None
        x: Any = node.args[0]
        if read is not None:
            shift = self._shift(weight, one.read, read[1], x) if takes_constants(one) else None
            if shift is not None:
                shift = shift if bias is None else bias.double() + shift
                bias = shift.to(weight.dtype)
                made_from.append(one.weight)
            weight = self._select(weight, one.read, read[1])
        if node in self.group.made:
            weight = self._select(weight, one.made, self.group.axes[node])
            bias = None if bias is None else self._select(bias, 0, self.group.axes[node])
        given = {x: self.new.get(x, x), one.weight: self._constant(weight, [one.weight])}
        values = [self._replaced(value, given) for value, _ in arguments(node).values()]
        if bias is not None:
            place = list(arguments(node)).index("bias")
            same = one.bias is not None and bias is self.graph.constant(one.bias)
            values[place] = one.bias if same else self._constant(bias, made_from)
        return self.rewriter.call(node.target, *values)  # type: ignore[arg-type]

    def _shift(self, weight: torch.Tensor, dim: int, axis: Axis, source: fx.Node) -> torch.Tensor | None:
        """What the removed channels add to every output: (outputs,) float64; None for nothing."""
        removed = torch.ones(self.group.units, dtype=torch.bool)
        removed[self.kept] = False
        value = self.values[source] * removed[:, None]
        value = torch.where(value.isfinite(), value, 0.0).flatten()
        if not value.any():
            return None
        per_channel = weight.double().flatten(2).sum(2) if weight.dim() > 2 else weight.double()
        return per_channel.movedim(dim, -1) @ value.to(weight.device)

    def _depthwise(self, node: fx.Node) -> fx.Node:
        axis = self.group.axes[node]
        given = {x: self.new.get(x, x) for x in node.all_input_nodes}
        for name in ("weight", "bias"):
            if argument(node, name) is not None:
                given[argument(node, name)] = self._narrowed(argument(node, name), axis.moved(0))
        values = {name: self._replaced(value, given) for name, (value, _) in arguments(node).items()}
        values["groups"] = values["groups"] * len(self.kept) // self.group.units
        return self.rewriter.call(node.target, *values.values())  # type: ignore[arg-type]

    def _between(self, node: fx.Node) -> fx.Node:
        """The same operation on narrower values; literal sizes become smaller."""
        given = {x: self.new.get(x, x) for x in node.all_input_nodes}
        axis = self.group.axes.get(node)
        if axis is None:  # the size of a dimension that is not narrowed
            return self.rewriter.call(node.target, *(self._replaced(arg, given) for arg in node.args))  # type: ignore[arg-type]
        known = rule(node)
        behind = known.behind(node, axis, self.group.units) if known else {}
        assert isinstance(behind, dict)
        for source, at in behind.items():
            if source.op == "get_attr":
                given[source] = self._narrowed(source, at)
        args = [self._replaced(arg, given) for arg in self._sized(node, axis)]
        kwargs = {name: self._replaced(value, given) for name, value in node.kwargs.items()}
        return self.rewriter.call(node.target, *args, **kwargs)  # type: ignore[arg-type]

    def _sized(self, node: fx.Node, axis: Axis) -> list[Any]:
        """The call's arguments with the size of the narrowed dimension brought up to date."""
        args, size = list(node.args), axis.outer * len(self.kept) * axis.inner
        if node.target in (aten.reshape.default, aten.expand.default):
            given: Any = args[1]
            sizes = list(given)
            sizes[axis.dim] = size
            args[1] = sizes
        elif node.target in (aten.split.Tensor, aten.split_with_sizes.default):
            parts = len(node.meta["val"])
            if argument(node, "dim") % len(shape(node)) - len(shape(node)) == axis.dim:
                args[1] = size // parts if node.target is aten.split.Tensor else [size // parts] * parts
        return args

    def _narrowed(self, constant: fx.Node, axis: Axis) -> fx.Node:
        value = self.graph.constant(constant)
        assert value is not None
        return self._constant(self._select(value, axis.dim, axis), [constant])

    def _select(self, value: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
        index = torch.arange(value.shape[dim], device=value.device)
        index = index.reshape(axis.outer, self.group.units, axis.inner)[:, self.kept].flatten()
        return value.index_select(dim, index)

    def _constant(self, value: torch.Tensor, made_from: list[fx.Node]) -> fx.Node:
        return self.rewriter.constant(value, made_from, self.how)

    def _replaced(self, value: Any, given: dict[fx.Node, fx.Node]) -> Any:
        return fx.map_arg(value, lambda node: given.get(node, node))
