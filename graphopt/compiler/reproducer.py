"""A script that shows one rewrite at work on its own, without the user's model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import fx

from graphopt.compiler.evaluate import Activations
from graphopt.compiler.rewriter import Rewriter
from graphopt.compiler.tolerance import REGION_FLOOR_ULPS
from graphopt.compiler.verify import frontier
from graphopt.ir import provenance

_SCRIPT = '''"""{title}

Found at {source} ({module}). Needs torch and graphopt, and the values in {values} beside it.
Exit code 0: the rewrite is as exact as the original; 1: it is not.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import device, inf, nan

import graphopt.kernels  # defines graphopt's operations
from graphopt.compiler.compare import compare
from graphopt.compiler.evaluate import widen


def before({arguments}):
{before}


def after({arguments}):
{after}


def float64({arguments}):
{float64}


stored = load_file(Path(__file__).with_name({values!r}))
values = [{given}]
with torch.no_grad():
    found = compare(before(*values), after(*values), float64(*map(widen, values)), {floor})
print(f"error before: {{found.error_before:.3e}}, after: {{found.error_after:.3e}}")
print(found.reason or "the rewrite is as exact as the original")
sys.exit(not found.ok)
'''


def write_reproducer(folder: Path, rewriter: Rewriter, activations: Activations) -> Path:
    """Write a staged rewrite as a script beside the values that it needs.

    Args:
        folder: where; made if it is missing.
        rewriter: the rewrite, staged.
        activations: the values that the example inputs give in the graph.

    Returns:
        The script's path: ``<pass>-<node>.py``; its values are in ``<pass>-<node>.safetensors``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place, root = provenance.of(rewriter.match.root), rewriter.match.root
    stem = re.sub(r"\W", "_", f"{rewriter.pass_name}-{root.name}")
    old, new = list(rewriter.replaced), list(rewriter.replaced.values())
    sources = [node for node in frontier(rewriter) if node.op != "get_attr"]
    values = dict(zip(sources, activations.values(sources), strict=True))
    for constant in _between([*old, *new], sources):
        if constant.op == "get_attr":
            values[constant] = rewriter.graph.constant(constant)
    sources = list(values)
    tensors = {node.name: v for node, v in values.items() if isinstance(v, torch.Tensor)}
    stored = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(stored, folder / f"{stem}.safetensors")
    given = [f'stored["{node.name}"]' if node.name in tensors else repr(values[node]) for node in sources]
    before = _code(rewriter, sources, old)
    script = _SCRIPT.format(
        title=f"{rewriter.pass_name} rewrote {root.name}: is it right?",
        source=place.source or "an unknown place",
        module=place.module or "the model itself",
        values=f"{stem}.safetensors",
        arguments=", ".join(node.name for node in sources),
        before=before,
        after=_code(rewriter, sources, new),
        float64=re.sub(r"torch\.(float32|float16|bfloat16)", "torch.float64", before),
        given=", ".join(given),
        floor=REGION_FLOOR_ULPS,
    )
    path = folder / f"{stem}.py"
    path.write_text(script, encoding="utf-8")
    return path


def _between(wanted: Sequence[fx.Node], sources: Sequence[fx.Node]) -> list[fx.Node]:
    found: set[fx.Node] = set()
    work = [node for node in wanted if node not in sources]
    while work:
        node = work.pop()
        if node not in found:
            found.add(node)
            work.extend(source for source in node.all_input_nodes if source not in sources)
    return sorted(found)


def _code(rewriter: Rewriter, sources: Sequence[fx.Node], wanted: Sequence[fx.Node]) -> str:
    """The body of a function from the sources to the wanted values."""
    copied = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for source in sources:
        known[source] = copied.create_node("placeholder", source.name, name=source.name)
    for node in _between(wanted, sources):
        known[node] = copied.node_copy(node, lambda source: known[source])
    copied.output([known[node] for node in wanted])
    text: Any = copied.python_code("self").src
    body = text[text.index(":\n", text.index("def forward")) + 2 :]
    return re.sub(r";\s*\w+ = None(\s*#.*)?", "", body).rstrip()
