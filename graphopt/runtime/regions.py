"""How a graph is cut: in which order executors take turns, and what a turn more is worth.

Nothing here knows of executors, only of their names: units of nodes go in, with who can take each, and groups
come out that can run one after the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from graphopt.ir.graph import Graph, is_getitem, is_symbolic

Group = tuple[str, list[int]]


@dataclass(frozen=True)
class Unit:
    """A call, and the nodes that take its outputs apart: only together can they be on one side of a border.

    Args:
        nodes: the call first.
        needs: indices of the units whose values it reads.
    """

    nodes: tuple[fx.Node, ...]
    needs: frozenset[int]


def whole_units(graph: Graph) -> list[Unit]:
    """The calls of a graph as units, but for sizes: these are computed inside each region that needs them."""
    return units_of(graph, lambda node: is_symbolic(node) and graph.output not in node.users)


def units_of(graph: Graph, left_out: Callable[[fx.Node], bool]) -> list[Unit]:
    """The calls of a graph as units, in topological order.

    Args:
        graph: the graph.
        left_out: tells the calls that belong to no unit, sizes that are computed wherever they are needed;
            who reads one of these needs what it is computed from.
    """
    members: list[list[fx.Node]] = []
    unit_of: dict[fx.Node, int] = {}
    behind: dict[fx.Node, frozenset[int]] = {}  # the units that a node's value needs
    needs: list[frozenset[int]] = []
    for node in graph.calls:
        read = frozenset().union(*(behind.get(source, frozenset()) for source in node.all_input_nodes))
        if left_out(node):
            behind[node] = read
            continue
        if is_getitem(node) and node.all_input_nodes[0] in unit_of:
            index = unit_of[node.all_input_nodes[0]]
            members[index].append(node)
        else:
            index = len(members)
            members.append([node])
            needs.append(read)
        unit_of[node] = index
        behind[node] = frozenset({index})
    return [Unit(tuple(nodes), read) for nodes, read in zip(members, needs, strict=True)]


def take_turns(units: Sequence[Unit], owner: Sequence[str]) -> list[Group]:
    """Groups of units of one owner, in an order in which each can run once those before it have.

    Every turn takes all that is ready, and what becomes ready by it: with two owners no order has fewer
    groups than the better of the two that start with either. With more, the owner of the longest chain of
    changes goes first.

    Args:
        units: in topological order.
        owner: of each unit.

    Returns:
        Owner and indices of units of each group, indices ascending.
    """
    if not units:
        return []
    users: list[list[int]] = [[] for _ in units]
    for index, unit in enumerate(units):
        for source in unit.needs:
            users[source].append(index)
    changes = [0] * len(units)  # the changes of owner on the longest way from a unit on
    for index in reversed(range(len(units))):
        steps = (changes[user] + (owner[user] != owner[index]) for user in users[index])
        changes[index] = max(steps, default=0)
    starts = dict.fromkeys(owner[index] for index, unit in enumerate(units) if not unit.needs)
    orders = [_turns_from(start, units, users, owner, changes) for start in starts]
    return min(orders, key=len)


def _turns_from(
    start: str,
    units: Sequence[Unit],
    users: Sequence[Sequence[int]],
    owner: Sequence[str],
    changes: Sequence[int],
) -> list[Group]:
    waiting = [len(unit.needs) for unit in units]
    ready: dict[str, list[int]] = defaultdict(list)
    for index, count in enumerate(waiting):
        if count == 0:
            ready[owner[index]].append(index)
    groups: list[Group] = []
    turn = start
    while True:
        group, work = [], ready.pop(turn)
        while work:
            index = work.pop()
            group.append(index)
            for user in users[index]:
                waiting[user] -= 1
                if waiting[user] == 0:
                    (work if owner[user] == turn else ready[owner[user]]).append(user)
        groups.append((turn, sorted(group)))
        if not ready:
            return groups
        turn = max(ready, key=lambda name: max(changes[index] for index in ready[name]))


def cheapest(
    order: Sequence[int],
    able: Sequence[Mapping[str, float]],
    change: Callable[[int, str, str | None], float],
) -> dict[int, str]:
    """Who takes each unit of a sequence, at the lowest cost in all; a Viterbi search (Viterbi, 1967).

    Args:
        order: indices of units, in the order in which they run.
        able: by unit, what it costs on each owner that can take it.
        change: what it costs that an owner follows another (or None, at the start) at a place of the order.

    Returns:
        The owner by unit; of equal costs, that which ``able`` names first.
    """
    best: dict[str | None, float] = {None: 0.0}
    choices: list[dict[str, str | None]] = []
    for place, index in enumerate(order):
        costs: dict[str | None, float] = {}
        came_from: dict[str, str | None] = {}
        for name, cost in able[index].items():
            totals = {
                before: total + (0.0 if before == name else change(place, name, before))
                for before, total in best.items()
            }
            before = min(totals, key=lambda key: (totals[key], key != name))
            costs[name], came_from[name] = totals[before] + cost, before
        best = costs
        choices.append(came_from)
    found: dict[int, str] = {}
    last = min(best, key=lambda key: best[key])
    for index, came_from in zip(reversed(order), reversed(choices), strict=True):
        assert last is not None
        found[index] = last
        last = came_from[last]
    return found
