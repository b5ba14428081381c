"""The catalogue: what the passes find in every architecture, beside what is there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.utils._pytree as pytree
from torch import fx

import graphopt.kernels  # noqa: F401  (registers the ops)
from bench.markdown import table
from graphopt.capture.export import capture
from graphopt.compiler.compare import compare
from graphopt.compiler.device import Limits
from graphopt.compiler.evaluate import outputs
from graphopt.compiler.manager import PassManager
from graphopt.compiler.remarks import Remark, Remarks
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.ir import provenance
from graphopt.ir.graph import Graph, op_name
from graphopt.observe.snapshot import versions
from graphopt.passes.default import pipeline
from tests._architectures import ARCHITECTURES, Contents

PAGE = Path(__file__).parent.parent / "docs" / "catalogue.md"
LIMITS = Limits("catalogue", flops_per_s=1e12, bytes_per_s=1e11)
KINDS = {
    "norms": "norms",
    "residual_norms": "sum + norm in one",
    "norm_sums": "norm + sum in one",
    "attentions": "attention",
    "projections": "Q, K, V in one product",
    "ropes": "rotary embeddings",
    "gated_mlps": "gated MLPs",
    "activations": "activations",
    "conv_norms": "conv + batch norm",
}
COMPLETE = ("norms", "attentions", "ropes", "gated_mlps")  # every one must be found
_PRODUCT = re.compile(r"linear|addmm|^aten\.mm$|matmul|bmm|conv")


@dataclass
class Row:
    """What the passes made of one architecture.

    Args:
        name: of the architecture.
        attention: the implementation that transformers was asked for; "" where it has none.
        nodes: calls before and after.
        rewrites: kept, by pass.
        reverted: rewrites that were not kept, and passes that were undone, in words.
        found: by kind.
        expected: by kind.
        missing: for each kind that falls short, what was left where, and what was said about it.
        wrong: in what the outputs differ; "" where they do not.
    """

    name: str
    attention: str
    nodes: tuple[int, int]
    rewrites: dict[str, int]
    reverted: list[str]
    found: dict[str, int]
    expected: dict[str, int]
    missing: dict[str, list[str]] = field(default_factory=dict)
    wrong: str = ""


def cases() -> Iterator[tuple[str, str]]:
    """Every architecture with every attention implementation that it has."""
    for name, architecture in ARCHITECTURES.items():
        for attention in architecture.attention:
            yield name, attention


def measure(name: str, attention: str) -> Row:
    """Capture an architecture, run the passes over it with verification, and count."""
    architecture = ARCHITECTURES[name]
    example = architecture.make(attention)
    captured = capture(example.model, example.args, example.kwargs)
    leaves = pytree.tree_leaves((example.args, example.kwargs))
    inputs = [leaf for spec, leaf in zip(captured.inputs, leaves, strict=True) if spec.node is not None]
    remarks = Remarks()
    outcome = PassManager(pipeline(), remarks, LIMITS).run(captured.clone(), inputs)
    contents = architecture.contents
    expected = {kind: getattr(contents, kind) for kind in KINDS}
    found = {kind: count(outcome.graph, contents) for kind, count in _COUNTS.items()}
    undone = [row for row in remarks.of_kind("missed") if row.reason.startswith("undone")]
    return Row(
        name,
        attention,
        (len(captured.calls), len(outcome.graph.calls)),
        dict(Counter(rewrite.pass_name for rewrite in outcome.kept)),
        [f"{r.pass_name} at {r.site}: {r.reason}" for r in outcome.rewrites if not r.kept]
        + [f"{row.pass_name}: {row.reason}" for row in undone],
        found,
        expected,
        {
            kind: _missing(kind, outcome.graph, remarks.of_kind("missed"))
            for kind in KINDS
            if found[kind] < expected[kind]
        },
        _difference(captured, outcome.graph, inputs),
    )


def _difference(captured: Graph, graph: Graph, inputs: Sequence[torch.Tensor]) -> str:
    reference = outputs(captured, inputs, float64=True)
    found = compare(outputs(captured, inputs), outputs(graph, inputs), reference, MODEL_FLOOR_ULPS)
    return found.reason


# Counting


def _ops(pattern: str) -> Callable[[Graph, Contents], int]:
    wanted = re.compile(pattern)
    return lambda graph, contents: sum(bool(wanted.search(op_name(node))) for node in graph.calls)


def _projections(graph: Graph, contents: Contents) -> int:
    """Attentions that read one product for each value that is projected."""
    count = 0
    for node in graph.calls:
        if re.search(r"^graphopt\..*attention", op_name(node)):
            products = {product for arg in node.args[:3] if (product := _product(arg)) is not None}
            count += bool(products) and len({p.args[0] for p in products}) == len(products)
    return count


def _product(node: object) -> fx.Node | None:
    """The projection that a value comes from, past views, rotations and norms."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if _PRODUCT.search(op_name(node)):
            return node
        node = next((source for source in node.all_input_nodes if source.op != "get_attr"), None)
    return None


def _is_activation(node: fx.Node, contents: Contents) -> bool:
    said = [op_name(node), *(arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, str))]
    return any(name in word for name in contents.named for word in said)


def _activations(graph: Graph, contents: Contents) -> int:
    return sum(_is_activation(node, contents) for node in graph.calls)


def _norms(graph: Graph, contents: Contents) -> int:
    """Every norm; a sandwich has two."""
    return sum(_ops(pattern)(graph, contents) for pattern in ("(layer|rms|group|instance)_norm", "sandwich"))


def _folded_batch_norms(graph: Graph, contents: Contents) -> int:
    return contents.conv_norms - _ops("batch_norm")(graph, contents)


_COUNTS: dict[str, Callable[[Graph, Contents], int]] = {
    "norms": _norms,
    "residual_norms": _ops(r"^graphopt\.(add_|sandwich_).*norm"),
    "norm_sums": _ops(r"^graphopt\.(.*_norm_add|sandwich_.*norm)"),
    "attentions": _ops(r"^graphopt\..*attention"),
    "projections": _projections,
    "ropes": _ops(r"^graphopt\..*rope"),
    "gated_mlps": _ops(r"^graphopt\..*gated_mlp"),
    "activations": _activations,
    "conv_norms": _folded_batch_norms,
}

# What stays behind where one is not found, and the passes that speak of it.
_LEFT = {
    "norms": (r"\.(rsqrt|sqrt|var|var_mean|std|linalg_vector_norm)$", "norm"),
    "residual_norms": (r"\.(layer|rms)_norm$", "add_.*norm"),
    "norm_sums": (r"\.(layer|rms)_norm$", "norm_add|sandwich"),
    "attentions": (r"\.(_?softmax|scaled_dot_product_attention)$", "attention"),
    "projections": (r"\.(linear|addmm)$", "linears"),
    "ropes": (r"\.(neg|view_as_complex|stack)$", "rope"),
    "gated_mlps": (r"\.(silu|gelu|relu|sigmoid)$", "gated_mlp"),
    "activations": (r"\.(erf|tanh|sigmoid|clamp|hardtanh)$", "gelu|activation"),
    "conv_norms": (r"batch_norm", "batch_norm"),
}


def _missing(kind: str, graph: Graph, missed: list[Remark]) -> list[str]:
    left, speaks = _LEFT[kind]
    nodes = [node for node in graph.calls if re.search(left, op_name(node))]
    remarks = [row for row in missed if re.search(speaks, row.pass_name)]
    return [
        *(f"left: {node.name} = {op_name(node)} {_place(provenance.of(node))}" for node in nodes),
        *(f"said: {row.pass_name} at {row.node} in {row.module}: {row.reason}" for row in remarks),
    ]


def _place(place: provenance.Provenance) -> str:
    return f"in {place.module} at {Path(place.source).name}"


# The page


def update_page(rows: Sequence[Row]) -> None:
    """Write the page."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(rows))


def page(rows: Sequence[Row]) -> str:
    """The catalogue as Markdown."""
    head = ["architecture", "attention", "nodes", *KINDS.values(), "reverted", "outputs"]
    found, rewrites = [], []
    for row in rows:
        counts = [_count(row.found[kind], row.expected[kind]) for kind in KINDS]
        nodes = f"{row.nodes[0]} → {row.nodes[1]}"
        right = "wrong" if row.wrong else "right"
        found.append([row.name, row.attention or "–", nodes, *counts, str(len(row.reverted)), right])
        made = ", ".join(f"{name} {count}" for name, count in sorted(row.rewrites.items()))
        rewrites.append([row.name, row.attention or "–", made])
    by_pass = table(["architecture", "attention", "rewrites"], rewrites)
    parts = _INTRODUCTION, *table(head, found), "", "## Rewrites by pass", "", *by_pass, "", _versions(), ""
    return "\n".join(parts)


_INTRODUCTION = """# What is found where

Every architecture, tiny and with random weights, goes through capture, the default passes with verification,
and a comparison with float64. Each cell is what was found of what is there; what is there is counted by hand
from the architecture's configuration, in `tests/_architectures.py`. `tests/test_catalogue.py` fails when a
norm, an attention, a rotary embedding or a gated MLP is missed, when a rewrite is reverted, or when this page
is out of date.

Generated by `python -m bench catalogue`.
"""


def _count(found: int, expected: int) -> str:
    if not found and not expected:
        return ""
    return f"{found}/{expected}" if found == expected else f"**{found}/{expected}**"


def _versions() -> str:
    said = versions()
    return "With " + ", ".join(f"{name} {said[name]}" for name in ("torch", "transformers")) + "."
