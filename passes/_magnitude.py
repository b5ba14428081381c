"""Which channels or heads to give up first: those of the smallest weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._channels import Group, blocks


def weakest(graph: Graph, groups: Iterable[Group], share: float) -> Iterator[Match]:
    """The weakest units of every group, the groups in ascending order of the damage expected.

    The damage is the part of the group's weights, in squared norm, that goes. Behind each match come those
    that give up half as many units, down to one, for when the loss is too much; ``step`` says how many.

    Args:
        graph: the graph.
        groups: its groups; those that cannot be narrowed are passed over.
        share: of a group's units, how many to give up at once; at least one goes, and at least one stays.
    """
    found = []
    for group in groups:
        if group.refusal is None and group.units > 1:
            strength = _strength(group)
            order = strength.argsort()
            parts = strength[order].cumsum(0) / strength.sum().clamp_min(1e-300)
            found.append((parts, max(1, int(group.units * share)), order, group))
    for parts, step, order, group in sorted(found, key=lambda one: float(one[0][one[1] - 1])):
        nodes = group.nodes
        while step:
            bound = {"group": group, "kept": sorted(order[step:].tolist()), "step": step}
            yield Match(graph, nodes[-1], nodes, {**bound, "damage": float(parts[step - 1])})
            step //= 2


def _strength(group: Group) -> torch.Tensor:
    """(units,) float64: the squared norm of each unit's weights, every layer counted alike."""
    total = torch.zeros(group.units).double()
    layers = [(one.weight, one.made, group.axes[node]) for node, one in group.made.items()]
    layers += [(one.weight, one.read, axis) for one, axis in group.read.values()]
    for weight, dim, axis in layers:
        size = blocks(group.graph, weight, dim, axis, group.units).double().square().sum((0, 2, 3)).cpu()
        total += size / size.sum().clamp_min(1e-300)
    return total
