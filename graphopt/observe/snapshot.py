"""What the report keeps of graphs and versions, once the graphs themselves are gone."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.utils._pytree as pytree
from torch import fx

from graphopt.ir import provenance
from graphopt.ir.graph import Graph, op_name
from graphopt.observe.report import GraphNode


def snapshot(graph: Graph) -> tuple[GraphNode, ...]:
    """A graph as the report draws it: inputs, calls and output; weights are left out."""
    paths = {spec.node: spec.path for spec in graph.inputs}
    return tuple(_row(node, paths.get(node.name, "")) for node in graph.nodes if node.op != "get_attr")


def _row(node: fx.Node, label: str) -> GraphNode:
    place = provenance.of(node)
    kinds = {"placeholder": "input", "output": "output"}
    reads = tuple(source.name for source in node.all_input_nodes if source.op != "get_attr")
    op = kinds.get(node.op) or op_name(node)
    return GraphNode(node.name, op, reads, tensors_of(node), place.source, place.module, place.origins, label)


def tensors_of(node: fx.Node) -> str:
    """A node's tensors in words: ``float32 [2, 8], int64 [2]``."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    tensors = [val for val in leaves if isinstance(val, torch.Tensor)]
    return ", ".join(f"{str(val.dtype)[6:]} {list(map(str, val.shape))}".replace("'", "") for val in tensors)


def versions(*others: str) -> dict[str, str]:
    """Versions of Python, graphopt, what it stands on, and other packages that are installed."""
    found = {"python": platform.python_version()}
    for package in (
        "graphopt",
        "torch",
        "onnx",
        "onnxscript",
        "onnxruntime-gpu",
        "onnxruntime",
        "transformers",
        *others,
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
