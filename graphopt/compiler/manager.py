"""The pass manager: finds, checks, stages, verifies, commits or reverts, and says what it did."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from graphopt.compiler.cost import milliseconds, node_cost
from graphopt.compiler.device import Limits
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.remarks import Remarks, Rewrite
from graphopt.compiler.rewriter import Rewriter
from graphopt.compiler.verify import Verifier
from graphopt.errors import PassError
from graphopt.ir import provenance
from graphopt.ir.graph import Graph, tensor_bytes
from graphopt.ir.pattern import Match, NearMiss, describe

BISECT_LIMIT = "GRAPHOPT_BISECT_LIMIT"
_MAX_ROUNDS = 20  # a pass that still finds work after this many rounds does not converge


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
    ) -> None:
        self.passes = passes
        self.remarks = remarks
        self.limits = limits
        self.on_pass = on_pass
        self.share = share
        self.limit = limit if limit is not None else _limit_from_environment()

    def run(self, graph: Graph, inputs: Sequence[torch.Tensor]) -> Outcome:
        """Run the pipeline on a graph, in place.

        Args:
            graph: the graph.
            inputs: example inputs: flat tensors in placeholder order.

        Returns:
            The graph, and every rewrite tried. A pass that raises or leaves a malformed graph is undone,
            reported in the remarks, and the others go on.
        """
        outcome = Outcome(graph)
        verifier = Verifier(graph, inputs, share=self.share)
        for index, rule in enumerate(self.passes):
            if self.on_pass is not None:
                self.on_pass(rule.name, index, len(self.passes))
            before, done, said = outcome.graph.clone(), len(outcome.rewrites), len(self.remarks.rows)
            try:
                self._run_pass(rule, verifier, outcome)
                outcome.graph.check()
            except Exception as error:
                outcome.graph, outcome.rewrites = before, outcome.rewrites[:done]
                verifier = Verifier(before, inputs, share=self.share)
                self.remarks.rollback(said)
                self.remarks.add("missed", rule.name, None, f"undone: {type(error).__name__}: {error}")
        outcome.graph.drop_unused_constants()
        outcome.graph.module.recompile()
        return outcome

    def _run_pass(self, rule: Pass, verifier: Verifier, outcome: Outcome) -> None:
        refused: dict[str, tuple[Match, str]] = {}
        reverted: set[str] = set()
        for _ in range(_MAX_ROUNDS):
            kept_before = len(outcome.kept)
            for match in rule.matches(outcome.graph, NearMiss()):
                if match.root.name in reverted or any(node._erased for node in match.nodes):
                    continue
                if self.limit is not None and len(outcome.kept) >= self.limit:
                    return
                reason = _refusal(rule, match)
                if reason is not None:
                    refused[match.root.name] = (match, reason)
                    continue
                rewrite = self._try(rule, match, verifier)
                outcome.rewrites.append(rewrite)
                if not rewrite.kept:
                    reverted.add(match.root.name)
            if len(outcome.kept) == kept_before:
                break
        else:
            self.remarks.add("analysis", rule.name, None, f"still finds work after {_MAX_ROUNDS} rounds")
        for match, reason in refused.values():
            if not match.root._erased:
                self._price("missed", rule, match, reason)

    def _try(self, rule: Pass, match: Match, verifier: Verifier) -> Rewrite:
        """Stage one rewrite, verify it, and keep or revert it."""
        place = provenance.of(match.root)
        rewriter = Rewriter(match, rule.name)
        site = match.root.name
        try:
            rule.rewrite(rewriter, match)
            verdict, shared = verifier.verify(rewriter)
        except Exception as error:
            rewriter.revert()
            reason = f"{type(error).__name__}: {error}"
            self.remarks.add("missed", rule.name, match.root, f"reverted: {reason}")
            return Rewrite(
                rule.name, rule.kind, site, place.source, place.module, 0.0, float("inf"), False, reason
            )
        if verdict.ok:
            self._price("passed", rule, match, _summary(match, rewriter))
            rewriter.commit()
        else:
            rewriter.revert()
            self._price("missed", rule, match, f"reverted: {verdict.reason}")
        return Rewrite(
            rule.name,
            rule.kind,
            site,
            place.source,
            place.module,
            verdict.error_before,
            verdict.error_after,
            verdict.ok,
            verdict.reason,
            shared,
        )

    def _price(self, kind: str, rule: Pass, match: Match, reason: str) -> None:
        """A remark with the traffic of the values inside the region, which one kernel would not move."""
        inside = [node for node in match.nodes if node is not match.root]
        moved = 2.0 * sum(tensor_bytes(n.meta.get("val")) for n in inside if node_cost(n).bytes)
        flops = sum(node_cost(node).flops for node in inside) if rule.kind != "fuse" else 0.0
        ms = milliseconds(type(node_cost(match.root))(flops, moved), self.limits)
        self.remarks.add(kind, rule.name, match.root, reason, bytes=moved, flops=flops, ms=ms)  # type: ignore[arg-type]


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
        return f"its check failed: {type(error).__name__}: {error}"


def _summary(match: Match, rewriter: Rewriter) -> str:
    new = [describe(node) for node in rewriter.staged if node.op == "call_function"]
    count = f"{len(match.nodes)} nodes" if len(match.nodes) > 1 else describe(match.root)
    return f"{count} -> {', '.join(new) or 'nothing new'}"
