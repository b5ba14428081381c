"""The report: what an optimization did, measured and remarked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from graphopt.compiler.remarks import Remark, Rewrite
from graphopt.runtime.profile import NodeTime


@dataclass(frozen=True)
class Candidate:
    """One way to run the model that was tried.

    Args:
        name: executors and graph, such as "ort" or "eager (captured graph)".
        ms: median time of one call on the example inputs, in milliseconds; None when it was not timed.
        spread_ms: half the distance between the quartiles, in milliseconds.
        error: largest error of its outputs relative to float64 (see ``compiler/tolerance.py``).
        chosen: it is what runs.
        reason: why it was dropped, if it was.
    """

    name: str
    ms: float | None
    spread_ms: float | None
    error: float | None
    chosen: bool = False
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the name under ``executor``."""
        row = asdict(self)
        return {("executor" if key == "name" else key): value for key, value in row.items()}


@dataclass(frozen=True)
class GraphNode:
    """A node as the report draws it.

    Args:
        name: unique in its graph.
        op: what it calls, or ``input``, ``output``.
        inputs: names of the nodes that it reads (weights are left out).
        shape: of its value, as text: "float32 [1, 128, 768]".
        source: the user's ``file:line``.
        module: the ``nn.Module`` path.
        origins: names of the captured nodes that it was made from.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: str
    source: str
    module: str
    origins: tuple[str, ...]


@dataclass
class Report:
    """Everything that an optimization found out.

    Args:
        model: class name of the model.
        ops_before: calls by op, as captured.
        ops_after: calls by op, as rewritten.
        rewrites: every rewrite tried, kept or reverted.
        remarks: passed, missed and analysis remarks.
        candidates: what could run the model, with times and errors.
        plan: a row a step.
        node_times: a row a node of the plan that runs, slowest first.
        memory: bytes: ``weights``, ``folded`` (constants made at compile time), ``peak_rss``.
        versions: of graphopt, Python, PyTorch and the executors.
        seconds: of each stage of the optimization.
        graph_before: the captured graph, to be drawn.
        graph_after: the rewritten graph, to be drawn.
    """

    model: str
    ops_before: dict[str, int]
    ops_after: dict[str, int]
    rewrites: Sequence[Rewrite]
    remarks: Sequence[Remark]
    candidates: Sequence[Candidate]
    plan: Sequence[dict[str, Any]]
    node_times: Sequence[NodeTime]
    memory: dict[str, int]
    versions: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)
    graph_before: Sequence[GraphNode] = ()
    graph_after: Sequence[GraphNode] = ()

    @property
    def chosen(self) -> Candidate:
        """The candidate that runs."""
        return next(candidate for candidate in self.candidates if candidate.chosen)

    def rewrites_by_pass(self) -> dict[str, int]:
        """How many rewrites each pass made and kept."""
        return dict(Counter(rewrite.pass_name for rewrite in self.rewrites if rewrite.kept))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {
            "model": self.model,
            "ops": {"before": self.ops_before, "after": self.ops_after},
            "rewrites": [rewrite.to_dict() for rewrite in self.rewrites],
            "remarks": [remark.to_dict() for remark in self.remarks],
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "plan": list(self.plan),
            "node_times": [asdict(row) for row in self.node_times],
            "memory": self.memory,
            "versions": self.versions,
            "seconds": self.seconds,
            "graphs": {
                "before": [asdict(node) for node in self.graph_before],
                "after": [asdict(node) for node in self.graph_after],
            },
        }

    def to_json(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False, default=str) + "\n")
