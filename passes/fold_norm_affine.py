"""linear(layer_norm(x, g, b), w, c) -> linear(layer_norm(x), w * g, c + w b), and rms_norm's weight alike.

All readers must be projections. Level 3: each gets weights of its own, so the model holds a copy of them, and
the norm, which reads its few weights from cache, gains next to nothing; ONNX's norms want a weight anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument, arguments
from graphopt.kernels.rms_norm import OP as RMS_NORM
from graphopt.passes._absorb import Site, fold, readers, refusal
from graphopt.passes._affine import Affine
from graphopt.passes._layers import with_arguments

aten = torch.ops.aten

_NORMS = (aten.layer_norm.default, aten.rms_norm.default, RMS_NORM.overload)


def pattern(graph: Graph) -> Iterator[Match]:
    """Every norm of the last dimension that has weights and that a projection reads."""
    for target in _NORMS:
        for node in graph.fx.find_nodes(op="call_function", target=target):
            if node._erased or not _has_weights(node):
                continue
            paths = readers(graph, node)
            layers = [(layer, moves) for layer, moves in paths if layer and layer.kind == "projection"]
            if layers:
                nodes = sorted({node, *(n for layer, moves in layers for n in (layer.node, *moves))})
                bound = {"norm": node, "layers": tuple(layers), "others": len(paths) - len(layers)}
                yield Match(graph, nodes[-1], tuple(nodes), bound)


def check(match: Match) -> str | None:
    """Weights must be constants, and the norm must be read by projections only."""
    if match["others"]:
        return f"{match['norm'].name} is also read by what is no projection"
    for name in ("weight", "bias"):
        weight = _weight(match["norm"], name)
        if weight is not None and match.graph.constant(weight) is None:
            return f"the norm's {name} is not a constant"
    return refusal(_site(match))


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Normalise only; the projections do the rest."""
    changes = {name: None for name in ("weight", "bias") if name in arguments(match["norm"])}
    bare = with_arguments(rewriter, match["norm"], **changes)
    site = _site(match)
    assert isinstance(site.affine, Affine)
    affine = replace(site.affine, source=bare)
    bound = Match(match.graph, match.root, match.nodes, {"site": replace(site, affine=affine)})
    fold(rewriter, bound, "norm's weights folded")


def _weight(norm: fx.Node, name: str) -> Any:
    return arguments(norm).get(name, (None, None))[0]


def _has_weights(norm: fx.Node) -> bool:
    over = arguments(norm).get("normalized_shape", ([0], None))[0]
    return len(over) == 1 and any(_weight(norm, name) is not None for name in ("weight", "bias"))


def _site(match: Match) -> Site:
    """The norm's weights as a step in front of its readers."""
    norm, rank = match["norm"], match["norm"].meta["val"].dim()
    values = {name: match.graph.constant(_weight(norm, name)) for name in ("weight", "bias")}
    size = int(argument(norm, "x" if norm.target is RMS_NORM.overload else "input").meta["val"].shape[-1])
    wide = {n: None if v is None else v.double().reshape(*[1] * (rank - 1), size) for n, v in values.items()}
    scale = wide["weight"]
    if scale is None:
        scale = torch.ones([1] * rank, dtype=torch.float64, device=norm.meta["val"].device)
    constants = tuple(_weight(norm, name) for name, value in values.items() if value is not None)
    return Site(Affine(norm, scale, wide["bias"], constants), norm, match["layers"], behind=False)


PASS = register(Pass("fold_norm_affine", "fold", pattern, rewrite, check, level=3))
