"""A region: a part of a Graph that one executor compiles, as a Graph of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.utils._pytree as pytree
from torch import fx

from graphopt.ir.graph import Graph, is_symbolic


@dataclass(frozen=True)
class Region:
    """What one step computes.

    Args:
        name: unique in the plan.
        graph: the region as a graph; its placeholders and outputs are named as in the whole graph.
        reads: names of the values that it takes, in placeholder order.
        writes: names of the values that it gives, in output order.
    """

    name: str
    graph: Graph
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def static(self) -> bool:
        """True when every value at the border has a fixed shape."""
        border = [*self.graph.placeholders, *self.results]
        return all(isinstance(size, int) for node in border for size in node.meta["val"].shape)

    @property
    def results(self) -> list[fx.Node]:
        """The output nodes."""
        return list(self.graph.output.args[0])  # type: ignore[arg-type]


def extract(graph: Graph, nodes: Sequence[fx.Node], name: str) -> Region:
    """Cut nodes out of a graph, which stays as it is.

    Sizes that the nodes need are computed again inside, from the tensors they are sizes of, so that only
    tensors cross the border.

    Args:
        graph: the whole graph.
        nodes: the calls of the region, in topological order.
        name: of the region.
    """
    inside = _with_sizes(nodes)
    writes = [
        node
        for node in inside
        if any(user not in inside or user.op == "output" for user in node.users)
        and (not is_symbolic(node) or graph.output in node.users)
        and node in set(nodes)
    ]
    part, made, reads = fx.Graph(), {}, []
    for node in sorted({source for n in inside for source in n.all_input_nodes if source not in inside}):
        if node.op == "get_attr":
            made[node] = part.get_attr(node.target)  # type: ignore[arg-type]
        else:
            made[node] = part.placeholder(node.name)
            reads.append(node.name)
        made[node].meta = dict(node.meta)
    for node in inside:
        made[node] = part.node_copy(node, made.__getitem__)
        made[node].meta = dict(node.meta)
    part.output(tuple(made[node] for node in writes))
    constants = {str(n.target): graph.constants[str(n.target)] for n in made if n.op == "get_attr"}
    module = fx.GraphModule({key: c.tensor for key, c in constants.items()}, part)
    spec = pytree.tree_structure((tuple(range(len(reads))), {}))
    out = pytree.tree_structure(tuple(range(len(writes))))
    region = Graph(module, constants, (), spec, out, graph.fake_mode)
    return Region(name, region, tuple(reads), tuple(node.name for node in writes))


def _with_sizes(nodes: Sequence[fx.Node]) -> dict[fx.Node, None]:
    """The nodes, with the symbolic sizes that they need, in topological order."""
    inside = set(nodes)
    work = list(nodes)
    while work:
        for source in work.pop().all_input_nodes:
            if source not in inside and source.op == "call_function" and is_symbolic(source):
                inside.add(source)
                work.append(source)
    return dict.fromkeys(sorted(inside))
