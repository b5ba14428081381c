"""The report: what an optimization did, measured and remarked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from graphopt.compiler.remarks import Remark, Rewrite
from graphopt.observe import report_html, report_table
from graphopt.observe.files import write_text
from graphopt.observe.summary import error, jsonable, speed_ratio
from graphopt.runtime.profile import NodeTime

SCHEMA = 1  # of to_dict(): counted up when a key changes its meaning or goes
BASELINE = "eager (captured graph)"  # the candidate that everything is compared with


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
        """The candidate, its name under ``executor``."""
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
        label: what the user calls an input: "input_ids", "args[0]['x']"; "" for all others.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: str
    source: str
    module: str
    origins: tuple[str, ...]
    label: str = ""


@dataclass(repr=False)
class Report:
    """Everything that an optimization found out.

    ``print(report)`` shows it as tables; a notebook or a build server reads ``to_dict()``.

    Args:
        model: class name of the model.
        ops_before: calls by op, as captured.
        ops_after: calls by op, as rewritten.
        rewrites: every rewrite tried, kept or reverted.
        remarks: passed, missed and analysis remarks.
        candidates: what could run the model, with times and errors.
        plan: a row a step.
        node_times: a row a node of the plan that runs, slowest first.
        memory: bytes, of the model ``before`` and ``after``, and of the process: see ``memory_of``.
        versions: of graphopt, Python, PyTorch and the executors.
        seconds: of each stage of the optimization.
        graph_before: the captured graph, to be drawn.
        graph_after: the rewritten graph, to be drawn.
        loss: what lossy passes lost on the example inputs, in the user's metric; None when none ran.
        precision: of what runs: "exact", or the narrower numbers that were asked for and turned out faster.
    """

    model: str
    ops_before: dict[str, int]
    ops_after: dict[str, int]
    rewrites: Sequence[Rewrite]
    remarks: Sequence[Remark]
    candidates: Sequence[Candidate]
    plan: Sequence[dict[str, Any]]
    node_times: Sequence[NodeTime]
    memory: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)
    graph_before: Sequence[GraphNode] = ()
    graph_after: Sequence[GraphNode] = ()
    loss: float | None = None
    precision: str = "exact"

    @property
    def chosen(self) -> Candidate:
        """The candidate that runs."""
        return next(candidate for candidate in self.candidates if candidate.chosen)

    @property
    def baseline(self) -> Candidate | None:
        """The captured graph in PyTorch, which all are compared with; None when it was no candidate."""
        return next((candidate for candidate in self.candidates if candidate.name == BASELINE), None)

    @property
    def speedup(self) -> float | None:
        """How many times faster than the captured graph in PyTorch; None when it was not measured."""
        return speed_ratio(self.chosen, self.baseline)

    @property
    def cuda_graphs(self) -> dict[str, float] | None:
        """The CUDA graphs as the optimization left them; None where all of the plan runs on the CPU.

        ``coverage`` is the share of the nodes on a GPU that they hold, ``count`` how many there are (one a
        shape and step), ``bytes`` what their memory pools hold.
        """
        rows = [row for row in self.plan if str(row["device"]).startswith("cuda")]
        if not rows:
            return None
        nodes = sum(row["nodes"] for row in rows)
        return {
            "coverage": sum(row.get("graphed_nodes", 0) for row in rows) / max(nodes, 1),
            "count": sum(row.get("cuda_graphs", 0) for row in rows),
            "bytes": sum(row.get("cuda_graph_bytes", 0) for row in rows),
        }

    @property
    def verified(self) -> bool:
        """False when the rewritten model differed as a whole, so that every rewrite was reverted."""
        return not any(remark.pass_name == "verify" and remark.kind == "missed" for remark in self.remarks)

    @property
    def verdict(self) -> str:
        """What the verification found, in one sentence."""
        if not self.verified:
            return "not the same end to end: every rewrite was reverted, and the captured graph runs"
        kept = sum(rewrite.kept for rewrite in self.rewrites)
        rewritten = f"{kept} of {len(self.rewrites)} rewrites kept" if self.rewrites else "nothing rewritten"
        within = f"verified: {rewritten}, outputs within {error(self.chosen.error)} of float64"
        if self.loss is None:
            return within
        if self.precision != "exact":
            return f"{within}: the model in {self.precision}, at a loss of {self.loss:.3g}"
        return f"{within} of the model that was pruned at a loss of {self.loss:.3g}"

    def rewrites_by_pass(self) -> dict[str, int]:
        """How many rewrites each pass made and kept."""
        return dict(Counter(rewrite.pass_name for rewrite in self.rewrites if rewrite.kept))

    def print(self, console: Console | None = None) -> None:
        """Show the report as tables.

        Args:
            console: where; stdout by default.
        """
        report_table.show(self, console)

    def to_dict(self) -> dict[str, Any]:
        """The report as values that strict JSON can hold.

        An infinite or undefined error (a rewrite that failed to run has one) is the text ``"inf"`` or
        ``"nan"``, which Python's ``float`` reads; what was not measured is None.
        """
        found: dict[str, Any] = jsonable(
            {
                "schema": SCHEMA,
                "model": self.model,
                "verdict": self.verdict,
                "speedup": self.speedup,
                "loss": self.loss,
                "precision": self.precision,
                "ops": {"before": self.ops_before, "after": self.ops_after},
                "rewrites": [rewrite.to_dict() for rewrite in self.rewrites],
                "remarks": [remark.to_dict() for remark in self.remarks],
                "candidates": [candidate.to_dict() for candidate in self.candidates],
                "plan": list(self.plan),
                "cuda_graphs": self.cuda_graphs,
                "node_times": [asdict(row) for row in self.node_times],
                "memory": self.memory,
                "versions": self.versions,
                "seconds": self.seconds,
                "graphs": {
                    "before": [asdict(node) for node in self.graph_before],
                    "after": [asdict(node) for node in self.graph_after],
                },
            }
        )
        return found

    def dumps(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def to_json(self, path: str | Path) -> None:
        """Write the report as JSON.

        Raises:
            OutputError: the file cannot be written.
        """
        write_text(path, self.dumps())

    def to_html(self, path: str | Path) -> None:
        """Write the report as one page that needs nothing else: no network, no other file.

        Raises:
            OutputError: the file cannot be written.
        """
        write_text(path, report_html.render(self))

    def __str__(self) -> str:
        return report_table.text(self)

    def __repr__(self) -> str:
        before, after = sum(self.ops_before.values()), sum(self.ops_after.values())
        return f"Report({self.model}: {before} ops -> {after}, runs on {self.chosen.name})"
