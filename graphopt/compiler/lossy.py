"""Passes that lose something: run on request, within a loss that the user allows, and measured as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.compiler.cost import milliseconds, node_cost, node_dtype
from graphopt.compiler.device import Limits
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
    """The default loss: ``|found - original| / |original|`` in the 2-norm, of the worst floating output.

    Infinite and undefined numbers are no difference where both have them, and an infinite one where not.
    """
    worst = 0.0
    for before, after in zip(original, found, strict=True):
        if isinstance(before, torch.Tensor) and before.is_floating_point():
            wide, other = before.double(), after.double()
            same = (other == wide) | (other.isnan() & wide.isnan())
            distance = float((other - wide).masked_fill(same, 0.0).norm())
            size = float(wide[wide.isfinite()].norm())
            if not math.isfinite(distance):
                return math.inf
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

    def allows(self, loss: float) -> bool:
        """True when a loss is within the budget; NaN is no loss that anybody allowed."""
        return loss <= self.max_loss


def _step(match: Match) -> int:
    """How much of its site a match gives up: 1 where the pass knows no smaller step."""
    return int(match.get("step", 1))


def _is_open(match: Match, failed: dict[str, int]) -> bool:
    return match.root.name not in failed or _step(match) < failed[match.root.name]


class LossyManager:
    """Applies passes that are not exact as long as the loss stays within the budget.

    A pass goes site by site, the whole measured after each. One of the kind ``cast`` rewrites all its sites
    and measures them together. Where that loses too much, each site is measured alone, and in ascending order
    of what they lose so many are rewritten as the budget holds, found by halving.

    Args:
        passes: in order; each yields its matches in ascending order of damage. A match may bind ``step``, how
            much it gives up, and smaller steps of the same site may follow it: they are tried where it fails.
        remarks: where the loss of each step goes.
        budget: how much may be lost in all.
        limits: of the target, for the price of what was left as it was; None leaves the price out.
    """

    def __init__(
        self, passes: Sequence[Pass], remarks: Remarks, budget: Budget, limits: Limits | None = None
    ) -> None:
        self.passes = passes
        self.remarks = remarks
        self.budget = budget
        self.limits = limits

    def run(
        self, graph: Graph, inputs: Sequence[torch.Tensor], original: Sequence[Any] | None = None
    ) -> tuple[Outcome, float]:
        """Rewrite a graph in place.

        Args:
            graph: the graph.
            inputs: example inputs: flat tensors in placeholder order.
            original: the outputs that the loss is measured against; those of the graph by default.

        Returns:
            Every rewrite tried, with the loss of the whole graph after it as ``error_after``; and the loss
            reached in the end.
        """
        outcome, loss = Outcome(graph), 0.0
        if original is None:
            original = outputs(graph, inputs)
        else:
            loss = self.budget.metric(original, outputs(graph, inputs))
        for rule in self.passes:
            if rule.kind == "cast":
                loss = _AtOnce(self, rule, graph, inputs, original).run(loss, outcome)
            else:
                loss = self._by_site(rule, graph, inputs, original, loss, outcome)
            self.remarks.add(
                "analysis",
                rule.name,
                None,
                f"the loss is {loss:.3g} of the {self.budget.max_loss:.3g} allowed",
            )
        graph.drop_unused_constants()
        graph.module.recompile()
        return outcome, loss

    def _by_site(
        self,
        rule: Pass,
        graph: Graph,
        inputs: Sequence[torch.Tensor],
        original: Sequence[Any],
        loss: float,
        outcome: Outcome,
    ) -> float:
        """Site by site, until a round keeps nothing; returns the loss."""
        failed: dict[str, int] = {}
        for _ in range(_MAX_ROUNDS):
            found = self._round(rule, graph, inputs, original, loss, failed, outcome)
            if found is None:
                break
            loss = found
        return loss

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
            if not self.budget.allows(loss):
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


@dataclass(frozen=True)
class _Site:
    """A place that a pass could rewrite, as it was: the node itself goes when the graph is restored.

    Args:
        root: of the match.
        words: the root in words.
        ms: roofline of the root, in milliseconds.
    """

    root: fx.Node
    words: str
    ms: float


class _AtOnce:
    """A pass whose sites are rewritten together."""

    def __init__(
        self,
        manager: LossyManager,
        rule: Pass,
        graph: Graph,
        inputs: Sequence[torch.Tensor],
        original: Sequence[Any],
    ) -> None:
        self._manager = manager
        self._rule = rule
        self._graph = graph
        self._inputs = inputs
        self._original = original
        self._failed: dict[str, str] = {}  # by site: why it cannot be rewritten
        self._start = graph.snapshot()

    def run(self, before: float, outcome: Outcome) -> float:
        """Rewrite as many sites as the budget allows; returns the loss."""
        sites = self._sites()
        if not sites:
            return before
        budget = self._manager.budget
        loss, alone = self._loss_with(sites), dict[str, float]()
        kept: Collection[str] = sites
        if not budget.allows(loss):
            alone = {name: self._loss_with([name]) for name in sites if name not in self._failed}
            order = sorted(alone, key=lambda name: (math.isnan(alone[name]), alone[name]))
            kept = order[: self._most(order)]
            loss = self._loss_with(kept) if kept else before
            if not kept:
                self._restore()
        for name, site in sites.items():
            reason = self._reason(name, name in kept, alone)
            outcome.rewrites.append(self._row(site, before, alone.get(name, loss), loss, reason))
        return loss

    def _most(self, order: Sequence[str]) -> int:
        """How many of the sites, the least damaging first, may be rewritten."""
        low, high = 0, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            if self._manager.budget.allows(self._loss_with(order[:middle])):
                low = middle
            else:
                high = middle - 1
        return low

    def _sites(self) -> dict[str, _Site]:
        found = {}
        for match in self._rule.matches(self._graph):
            reason, root, limits = self._rule.check(match), match.root, self._manager.limits
            ms = 0.0 if limits is None else milliseconds(node_cost(root), limits, node_dtype(root))
            if reason is not None:
                self._manager.remarks.add("missed", self._rule.name, root, reason, ms=ms)
            else:
                found[root.name] = _Site(root, describe(root), ms)
        return found

    def _restore(self) -> None:
        self._graph.restore(self._start)
        self._start = self._graph.snapshot()

    def _loss_with(self, names: Collection[str]) -> float:
        """The loss with these sites rewritten, and no others; the graph is left so."""
        self._restore()
        graph, wanted = self._graph, set(names) - self._failed.keys()
        for match in list(self._rule.matches(graph)):
            name = match.root.name
            if name not in wanted:
                continue
            rewriter = Rewriter(match, self._rule.name)
            try:
                self._rule.rewrite(rewriter, match)
            except Exception as error:
                rewriter.revert()
                self._failed[name] = said(error)
                continue
            rewriter.commit()
        try:
            graph.check()
            return self._manager.budget.metric(self._original, outputs(graph, self._inputs))
        except Exception as error:
            if len(wanted) == 1:
                self._failed[min(wanted)] = said(error)
            return math.inf

    def _reason(self, name: str, kept: bool, alone: dict[str, float]) -> str:
        """Why a site stays as it was; "" for one that was rewritten."""
        if name in self._failed:
            return self._failed[name]
        if kept:
            return ""
        budget = self._manager.budget
        own = f"alone it loses {alone[name]:.3g}"
        if not budget.allows(alone[name]):
            return f"{own}, above the {budget.max_loss:.3g} allowed"
        return f"{own}; with those that lose less it would be above the {budget.max_loss:.3g} allowed"

    def _row(self, site: _Site, before: float, alone: float, loss: float, reason: str) -> Rewrite:
        rule, root, remarks = self._rule, site.root, self._manager.remarks
        place = provenance.of(root)
        if reason:
            remarks.add("missed", rule.name, root, f"kept as it was: {reason}", ms=site.ms)
        else:
            remarks.add("passed", rule.name, root, f"{site.words}: the loss of all is {loss:.3g}")
        after = alone if reason else loss
        return Rewrite(
            rule.name, rule.kind, root.name, place.source, place.module, before, after, not reason, reason
        )
