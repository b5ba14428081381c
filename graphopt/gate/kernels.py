"""The kernels that a graph needs on a GPU which is not here: counted, and compiled where there are any."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import fx

from graphopt.compiler.cost import VIEWS
from graphopt.compiler.device import Limits
from graphopt.ir.graph import is_getitem, is_symbolic, op_name
from graphopt.ir.op import op_of


def on_gpu(calls: Iterable[fx.Node], limits: Limits) -> dict[str, Any]:
    """What a graph launches on a GPU: a fused op is one kernel, any other op at least one, a view none.

    Args:
        calls: of the rewritten graph.
        limits: of the GPU.

    Returns:
        ``launches`` (at least so many), ``fused`` (fused ops by name), ``without_kernel`` (those of them that
        have no Triton face, which run as PyTorch spells them), and ``compiled``: see ``compiled_for``.
    """
    launched = [node for node in calls if not (node.target in VIEWS or is_getitem(node) or is_symbolic(node))]
    ours = [node for node in launched if op_of(node.target) is not None]
    bare = [node for node in ours if getattr(op_of(node.target), "triton", None) is None]
    return {
        "launches": len(launched),
        "fused": dict(Counter(map(op_name, ours))),
        "without_kernel": dict(Counter(map(op_name, bare))),
        "compiled": compiled_for([node for node in ours if node not in bare], limits),
    }


def compiled_for(nodes: Iterable[fx.Node], limits: Limits) -> dict[str, str]:
    """Compile the Triton kernels of fused calls for a GPU that need not be here.

    Returns:
        By op: ``"compiled"``, or why it is not; empty where no op has a kernel.
    """
    found: dict[str, str] = {}
    for node in nodes:
        if op_name(node) not in found:
            found[op_name(node)] = _compile(node, limits)
    return found


def _compile(node: fx.Node, limits: Limits) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed here"
    return f"its launcher is not compiled ahead for {limits.name}"
