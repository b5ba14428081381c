"""The pass manager: finds, checks, stages, verifies, commits or reverts, and says what it did."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import fx

from graphopt.compiler.contract import Contract, fingerprint
from graphopt.compiler.cost import milliseconds, node_dtype, region_cost
from graphopt.compiler.device import Limits
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.remarks import Kind, Remarks, Rewrite
from graphopt.compiler.reproducer import write_reproducer
from graphopt.compiler.rewriter import Rewriter
from graphopt.compiler.verify import Verifier
from graphopt.errors import PassError, said
from graphopt.ir import provenance
from graphopt.ir.graph import Graph, Snapshot
from graphopt.ir.pattern import Match, NearMiss, describe

BISECT_LIMIT = "GRAPHOPT_BISECT_LIMIT"
REPRODUCERS = "GRAPHOPT_REPRODUCERS"
_MAX_ROUNDS = 20  # a pass, or passes that open each other, that still find work then do not converge


@dataclass
class Outcome:
    """What a run of the pipeline did.

    Args:
        graph: the rewritten graph.
        rewrites: every rewrite tried, kept or reverted.
    """

    graph: Graph
    rewrites: list[Rewrite] = field(default_factory=list)

    @property
    def kept(self) -> list[Rewrite]:
        """The rewrites that stand."""
        return [rewrite for rewrite in self.rewrites if rewrite.kept]


class PassManager:
    """Runs passes over a graph, in order, each rewrite verified or reverted.

    Args:
        passes: in order; a pass may occur more than once.
        remarks: where passed, missed and analysis remarks go.
        limits: of the target, for the price of what was missed.
        on_pass: called with (name, index, count) before each pass.
        limit: apply only so many rewrites; the environment's ``GRAPHOPT_BISECT_LIMIT`` by default.
        share: verify structurally identical rewrites once.
        reproducers: a folder for a script per reverted rewrite; the environment's ``GRAPHOPT_REPRODUCERS`` by
            default, and none where that is not set.
        reproduce: the number of a rewrite that is kept, counted from 1, and a folder for a script of it; the
            script's path is then in ``reproduced``.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        remarks: Remarks,
        limits: Limits,
        *,
        on_pass: Callable[[str, int, int], None] | None = None,
        limit: int | None = None,
        share: bool = True,
        reproducers: Path | None = None,
        reproduce: tuple[int, Path] | None = None,
    ) -> None:
        self.passes = passes
        self.remarks = remarks
        self.limits = limits
        self.on_pass = on_pass
        self.share = share
        self.limit = limit if limit is not None else _limit_from_environment()
        self.reproduce = reproduce
        self.reproduced: Path | None = None
        given = os.environ.get(REPRODUCERS)
        self.reproducers = reproducers or (Path(given) if given else None)

    def run(self, graph: Graph, inputs: Sequence[torch.Tensor]) -> Outcome:
        """Run the pipeline on a graph, in place.

        Args:
            graph: the graph.
            inputs: example inputs: flat tensors in placeholder order.

        Returns:
            The graph, and every rewrite tried. A pass that raises, leaves a malformed graph or breaks what
            the graph's callers rely on is undone, reported in the remarks, and the others go on.
        """
        run = _Run(self, graph, inputs)
        for index in _in_order(self.passes, run):
            rule = self.passes[index]
            if self.on_pass is not None:
                self.on_pass(rule.name, index, len(self.passes))
            run.apply(rule)
        run.leave_misses()
        graph.drop_unused_constants()
        graph.module.recompile()
        return run.outcome


def _in_order(passes: Sequence[Pass], run: _Run) -> Iterable[int]:
    """Indices of the passes to run: each once, and again those that another one opened."""
    due = set(range(len(passes)))
    for _ in range(_MAX_ROUNDS):
        for index in range(len(passes)):
            if index in due:
                due.discard(index)
                before = run.kept
                yield index
                if run.kept > before:
                    due.update(i for i, rule in enumerate(passes) if rule.name in passes[index].opens)
        if not due:
            return
    names = ", ".join(sorted({passes[index].name for index in due}))
    run.manager.remarks.add("analysis", names, None, f"still opened after {_MAX_ROUNDS} rounds")


class _Run:
    """One run of a pipeline over one graph."""

    def __init__(self, manager: PassManager, graph: Graph, inputs: Sequence[torch.Tensor]) -> None:
        self.manager = manager
        self.graph = graph
        self.inputs = inputs
        self.outcome = Outcome(graph)
        self.kept = 0
        self.verifier = Verifier(graph, inputs, share=manager.share)
        self.misses: dict[tuple[str, str, str], tuple[tuple[fx.Node, ...], fx.Node]] = {}
        self._before: tuple[Contract, Snapshot] | None = None  # valid until something is rewritten

    def apply(self, rule: Pass) -> None:
        """Run one pass; what it did is undone as a whole when it raises or breaks the graph."""
        tried, remarked, kept = len(self.outcome.rewrites), len(self.manager.remarks.rows), self.kept
        if self._before is None:
            self._before = Contract(self.graph), self.graph.snapshot()
        contract, snapshot = self._before
        try:
            self._find(rule)
            changed = self.kept > kept
            if not changed and fingerprint(self.graph) != contract.nodes:
                raise PassError("it changed the graph, and not through its rewrite")
            if changed:
                self.graph.check()
                broken = contract.broken_by(self.graph)
                if broken:
                    raise PassError(broken)
                self._before = None
        except Exception as error:
            self.graph.restore(snapshot)
            self.verifier = Verifier(self.graph, self.inputs, share=self.manager.share)
            self._before, self.kept = None, kept
            del self.outcome.rewrites[tried:]
            self.manager.remarks.rollback(remarked)
            self.manager.remarks.add("missed", rule.name, None, f"undone: {said(error)}")

    def _find(self, rule: Pass) -> None:
        reverted: set[str] = set()
        for _ in range(_MAX_ROUNDS):
            before = self.kept
            for match in rule.matches(self.graph, lambda miss: self._near(rule, miss)):
                if match.root.name in reverted or any(node._erased for node in match.nodes):
                    continue
                if self.manager.limit is not None and self.kept >= self.manager.limit:
                    return
                reason = _refusal(rule, match)
                if reason is not None:
                    self._miss(rule, reason, match.nodes, match.root)
                    continue
                rewrite = self._try(rule, match)
                self.outcome.rewrites.append(rewrite)
                self.kept += rewrite.kept
                if not rewrite.kept:
                    reverted.add(match.root.name)
            if self.kept == before:
                return
        self.manager.remarks.add("analysis", rule.name, None, f"still finds work after {_MAX_ROUNDS} rounds")

    def _try(self, rule: Pass, match: Match) -> Rewrite:
        """Stage one rewrite, verify it, and keep or revert it."""
        place, site = provenance.of(match.root), match.root.name
        rewriter = Rewriter(match, rule.name)
        try:
            rule.rewrite(rewriter, match)
            verdict, shared = self.verifier.verify(rewriter)
            reason, errors = verdict.reason, (verdict.error_before, verdict.error_after)
        except Exception as error:
            reason, errors, shared = said(error), (0.0, float("inf")), False
        if reason:
            script = self._reproducer(rewriter)
            rewriter.revert()
            self._say("missed", rule, f"reverted: {reason}{script}", match.nodes, match.root)
        else:
            self._say("passed", rule, _summary(match, rewriter), match.nodes, match.root)
            number, folder = self.manager.reproduce or (0, Path())
            if number == self.kept + 1:
                self.manager.reproduced = write_reproducer(folder, rewriter, self.verifier.activations)
            rewriter.commit()
        return Rewrite(
            rule.name, rule.kind, site, place.source, place.module, *errors, not reason, reason, shared
        )

    def _reproducer(self, rewriter: Rewriter) -> str:
        """Write the script that shows what was reverted; returns where, for the remark."""
        folder = self.manager.reproducers
        if folder is None or not rewriter.replaced:
            return ""
        try:
            path = write_reproducer(folder, rewriter, self.verifier.activations)
        except Exception as error:
            return f" (no reproducer: {said(error)})"
        return f" (see {path})"

    def _near(self, rule: Pass, miss: NearMiss) -> None:
        self._miss(rule, miss.reason, miss.nodes, miss.nodes[0])

    def _miss(self, rule: Pass, reason: str, nodes: tuple[fx.Node, ...], root: fx.Node) -> None:
        self.misses[rule.name, root.name, reason] = nodes, root

    def leave_misses(self) -> None:
        """A remark for each refusal and near miss whose region is still there at the end, once."""
        rules = {rule.name: rule for rule in self.manager.passes}
        for (name, _, reason), (nodes, root) in self.misses.items():
            if not any(node._erased or node.graph is not self.graph.fx for node in nodes):
                self._say("missed", rules[name], reason, nodes, root)

    def _say(self, kind: Kind, rule: Pass, reason: str, nodes: Iterable[fx.Node], root: fx.Node) -> None:
        """A remark with the price of the region: what one kernel in its place would save."""
        cost = region_cost(nodes, root, fused=rule.kind == "fuse")
        ms = milliseconds(cost, self.manager.limits, node_dtype(root))
        self.manager.remarks.add(kind, rule.name, root, reason, bytes=cost.bytes, flops=cost.flops, ms=ms)


def _limit_from_environment() -> int | None:
    given = os.environ.get(BISECT_LIMIT)
    if not given:
        return None
    if not given.isdecimal():
        raise PassError(f"{BISECT_LIMIT}={given!r} is not a number of rewrites", where=BISECT_LIMIT)
    return int(given)


def _refusal(rule: Pass, match: Match) -> str | None:
    try:
        return rule.check(match)
    except Exception as error:
        return f"its check failed: {said(error)}"


def _summary(match: Match, rewriter: Rewriter) -> str:
    new = [describe(node) for node in rewriter.staged if node.op == "call_function"]
    count = f"{len(match.nodes)} nodes" if len(match.nodes) > 1 else describe(match.root)
    return f"{count} -> {', '.join(new) or 'nothing new'}"
