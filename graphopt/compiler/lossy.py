"""Passes that lose something: run on request, within a loss that the user allows, and measured as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.compiler.evaluate import outputs
from graphopt.compiler.manager import Outcome
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.remarks import Remarks, Rewrite
from graphopt.compiler.rewriter import Rewriter
from graphopt.errors import said
from graphopt.ir import provenance
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, describe

Metric = Callable[[Sequence[Any], Sequence[Any]], float]
_MAX_ROUNDS = 64
_PATIENCE = 8  # sites in a row that cost too much: matches come in order of damage, so the rest does too


def relative_distance(original: Sequence[Any], found: Sequence[Any]) -> float:
    """The default loss: ``|found - original| / |original|`` in the 2-norm, of the worst floating output."""
    worst = 0.0
    for before, after in zip(original, found, strict=True):
        if isinstance(before, torch.Tensor) and before.is_floating_point():
            wide = before.double()
            distance = float((after.double() - wide).norm())
            size = float(wide.norm())
            worst = max(worst, distance / size if size else (math.inf if distance else 0.0))
    return worst


@dataclass(frozen=True)
class Budget:
    """How much may be lost.

    Args:
        max_loss: the most that the metric may give; 0 or above.
        metric: called with the original's flat outputs and the rewritten graph's, on the example inputs;
            returns the loss, 0 for none.
    """

    max_loss: float
    metric: Metric = relative_distance


def _step(match: Match) -> int:
    """How much of its site a match gives up: 1 where the pass knows no smaller step."""
    return int(match.get("step", 1))


def _is_open(match: Match, failed: dict[str, int]) -> bool:
    return match.root.name not in failed or _step(match) < failed[match.root.name]


class LossyManager:
    """Applies passes that are not exact, site by site, as long as the loss stays within the budget.

    Args:
        passes: in order; each yields its matches in ascending order of damage. A match may bind ``step``, how
            much it gives up, and smaller steps of the same site may follow it: they are tried where it fails.
        remarks: where the loss of each step goes.
        budget: how much may be lost in all.
    """

    def __init__(self, passes: Sequence[Pass], remarks: Remarks, budget: Budget) -> None:
        self.passes = passes
        self.remarks = remarks
        self.budget = budget

    def run(self, graph: Graph, inputs: Sequence[torch.Tensor]) -> tuple[Outcome, float]:
        """Rewrite a graph in place.

        Args:
            graph: the graph.
            inputs: example inputs: flat tensors in placeholder order.

        Returns:
            Every rewrite tried, with the loss of the whole graph after it as ``error_after``; and the loss
            reached in the end.
        """
        outcome, original, loss = Outcome(graph), outputs(graph, inputs), 0.0
        for rule in self.passes:
            failed: dict[str, int] = {}
            for _ in range(_MAX_ROUNDS):
                found = self._round(rule, graph, inputs, original, loss, failed, outcome)
                if found is None:
                    break
                loss = found
            self.remarks.add(
                "analysis",
                rule.name,
                None,
                f"the loss is {loss:.3g} of the {self.budget.max_loss:.3g} allowed",
            )
        graph.drop_unused_constants()
        graph.module.recompile()
        return outcome, loss

    def _round(
        self,
        rule: Pass,
        graph: Graph,
        inputs: Sequence[torch.Tensor],
        original: Sequence[Any],
        loss: float,
        failed: dict[str, int],
        outcome: Outcome,
    ) -> float | None:
        """Try the matches that there are now; the new loss, or None when none was kept.

        Where a step cost too much, smaller ones of the same site are tried next: ``failed`` has the smallest
        that did, by site.
        """
        kept, failures, done = False, 0, set[str]()
        while failures < _PATIENCE:
            match = next(
                (m for m in rule.matches(graph) if m.root.name not in done and _is_open(m, failed)), None
            )
            if match is None:
                break
            site = match.root.name
            reason = rule.check(match)
            if reason is not None:
                done.add(site)
                self.remarks.add("missed", rule.name, match.root, reason)
                continue
            snapshot = graph.snapshot()
            rewrite = self._try(rule, match, inputs, original, loss)
            outcome.rewrites.append(rewrite)
            if rewrite.kept:
                done.add(site)  # once a round
                kept, failures, loss = True, 0, rewrite.error_after
            else:
                graph.restore(snapshot)
                failed[site] = _step(match)
                failures += failed[site] == 1
        return loss if kept else None

    def _try(
        self,
        rule: Pass,
        match: Match,
        inputs: Sequence[torch.Tensor],
        original: Sequence[Any],
        before: float,
    ) -> Rewrite:
        """Rewrite one site and measure the whole; the caller goes back when it is not kept."""
        place, site, graph = provenance.of(match.root), match.root.name, match.graph
        reason, loss = "", math.inf
        try:
            rewriter = Rewriter(match, rule.name)
            rule.rewrite(rewriter, match)
            rewriter.commit()
            graph.check()
            loss = self.budget.metric(original, outputs(graph, inputs))
            if not loss <= self.budget.max_loss:  # NaN is no loss that anybody allowed
                reason = f"the loss would be {loss:.3g}, above the {self.budget.max_loss:.3g} allowed"
        except Exception as error:
            reason = said(error)
        if reason:
            self.remarks.add("missed", rule.name, match.root, f"reverted: {reason}")
        else:
            self.remarks.add(
                "passed", rule.name, match.root, f"{describe(match.root)}: the loss is now {loss:.3g}"
            )
        return Rewrite(
            rule.name, rule.kind, site, place.source, place.module, before, loss, not reason, reason
        )
