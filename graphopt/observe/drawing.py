"""A graph as an SVG drawing, each node coloured by the kind of its op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from graphopt.observe.layout import HEIGHT, Edge, layered
from graphopt.observe.summary import short_source

if TYPE_CHECKING:
    from graphopt.observe.report import GraphNode

KINDS = {
    "fused": "fused by graphopt",
    "product": "matrix products, attention",
    "math": "element by element, norms",
    "lookup": "lookups, constants",
    "shape": "views, copies, casts",
    "end": "inputs, outputs",
}
_OPS = {
    "product": """linear matmul mm bmm addmm baddbmm mv einsum scaled_dot_product_attention convolution conv1d
        conv2d conv3d conv_transpose2d""",
    "lookup": """embedding gather index index_select select_scatter index_put scatter one_hot arange full
        full_like zeros zeros_like new_zeros ones ones_like new_ones scalar_tensor tril triu""",
    "shape": """view reshape _unsafe_view flatten unflatten transpose permute t expand expand_as repeat
        unsqueeze squeeze slice select split split_with_sizes chunk unbind cat stack concat contiguous clone
        to _to_copy alias detach getitem narrow pad constant_pad_nd roll flip as_strided movedim sym_size""",
}
_KIND_OF = {op: kind for kind, ops in _OPS.items() for op in ops.split()}
_CHARACTER, _SMALL_CHARACTER, _PADDING = 7.8, 5.8, 16.0  # widths in pixels, of the fonts in the page's style
_MAX_LABEL, _MAX_SHAPE = 30, 34


def kind_of(op: str) -> str:
    """The key of ``KINDS`` that an op belongs to: ``aten.linear`` is a ``product``."""
    namespace, _, name = op.rpartition(".")
    if namespace == "graphopt":
        return "fused"
    if op in ("input", "output"):
        return "end"
    return _KIND_OF.get(name, "math")


def label_of(node: GraphNode) -> str:
    """What is written in a node: its op, or what the user calls an input."""
    return node.label or node.op.removeprefix("aten.")


def draw(nodes: Sequence[GraphNode], title: str) -> Markup:
    """The drawing of a graph: self-contained, and whole without a script.

    Nodes carry ``data-node`` and edges ``data-from`` and ``data-to``: indices into ``nodes``.

    Args:
        nodes: the graph.
        title: what a screen reader calls it.
    """
    index = {node.name: number for number, node in enumerate(nodes)}
    widths = {node.name: _width(node) for node in nodes}
    layout = layered({node.name: node.inputs for node in nodes}, widths)
    edges = [_edge(edge, index) for edge in layout.edges]
    boxes = [_box(n, i, *layout.places[n.name], widths[n.name]) for i, n in enumerate(nodes)]
    return Markup(
        '<svg class="graph" role="application" tabindex="0" aria-label="{}" data-width="{}" data-height="{}">'
        '<g class="scene"><g class="edges">{}</g><g class="nodes">{}</g></g></svg>'
    ).format(
        title, round(layout.width), round(layout.height), Markup("").join(edges), Markup("\n").join(boxes)
    )


def tooltip(node: GraphNode) -> str:
    """What hovering over a node says."""
    lines = [f"{node.name}: {node.op}", node.shape, node.module, short_source(node.source)]
    if node.origins and node.origins != (node.name,):
        lines.append(f"made from {', '.join(node.origins)}")
    return "\n".join(line for line in lines if line)


def _width(node: GraphNode) -> float:
    label = _CHARACTER * len(_clip(label_of(node), _MAX_LABEL))
    return _PADDING + max(label, _SMALL_CHARACTER * len(_clip(node.shape, _MAX_SHAPE)), 34.0)


def _box(node: GraphNode, index: int, x: float, y: float, width: float) -> Markup:
    return Markup(
        '<g class="node {}" data-node="{}" transform="translate({:.0f},{:.0f})"><title>{}</title>'
        '<rect x="{:.0f}" width="{:.0f}" height="{:.0f}" rx="{}"/>'
        '<text class="op" y="16">{}</text><text class="shape" y="30">{}</text></g>'
    ).format(
        kind_of(node.op),
        index,
        x,
        y,
        tooltip(node),
        -width / 2,
        width,
        HEIGHT,
        19 if kind_of(node.op) == "end" else 5,
        _clip(label_of(node), _MAX_LABEL),
        _clip(node.shape, _MAX_SHAPE),
    )


def _edge(edge: Edge, index: dict[str, int]) -> Markup:
    """Straight down beside the nodes of a layer, and a curve from layer to layer."""
    (x, y), *rest = edge.points
    path = [f"M{x:.0f} {y:.0f}"]
    for number, (to_x, to_y) in enumerate(rest):
        middle = (y + to_y) / 2
        beside = number % 2 == 1
        path.append(
            f"V{to_y:.0f}"
            if beside
            else f"C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y:.0f}"
        )
        x, y = to_x, to_y
    return Markup('<path data-from="{}" data-to="{}" d="{}"/>').format(
        index[edge.source], index[edge.target], " ".join(path)
    )


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
