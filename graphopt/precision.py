"""``precision=``: the model in narrower numbers, where that is faster and within the loss allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import fx

from graphopt.compiler import cpu
from graphopt.compiler.calibration import keep, observe
from graphopt.compiler.compare import Comparison, worst_error
from graphopt.compiler.evaluate import outputs
from graphopt.compiler.lossy import Budget, LossyManager, relative_distance
from graphopt.compiler.manager import Outcome, PassManager
from graphopt.compiler.pass_ import Pass, find
from graphopt.compiler.reference import Reference
from graphopt.compiler.remarks import Remarks, Rewrite
from graphopt.compiler.tolerance import FACTOR, MODEL_FLOOR_ULPS
from graphopt.errors import InputError, TargetError
from graphopt.ir.graph import Graph
from graphopt.passes import quantize_conv_int8
from graphopt.passes._projections import matches, source
from graphopt.passes.default import CALIBRATING
from graphopt.runtime.calling import CallingConvention
from graphopt.runtime.candidates import Candidate
from graphopt.runtime.target import Target
from graphopt.runtime.ways import hinted_candidates, narrowed_candidates


@dataclass(frozen=True)
class Precision:
    """A precision that can be asked for.

    Args:
        casts: the passes that rewrite into it, in order.
        max_loss: the loss allowed where none is given, as a relative distance of the outputs.
        calibrated: its steps are found beforehand, from ranges observed on the user's inputs.
    """

    casts: tuple[str, ...]
    max_loss: float
    calibrated: bool = False


# A relative distance of d is a cosine of about 1 - d * d / 2: 0.04 of the one is 0.999 of the other.
PRECISIONS: dict[str, Precision] = {
    "bf16": Precision(("cast_to_bfloat16",), 0.03),
    "fp16": Precision(("cast_to_float16",), 0.01),
    "int8": Precision(("quantize_linear_int8",), 0.04),
    "int8-static": Precision(("quantize_linear_int8_static", "quantize_conv_int8"), 0.04, calibrated=True),
    "int8-weights": Precision(("quantize_linear_int8_weights",), 0.02),
    "int4": Precision(("quantize_linear_int4",), 0.1),  # each product is 8 % off: 16 codes hold no more
}
EXACT, _GPUS_ONLY = "exact", ("fp8",)
# The share of the budget that the search for layers uses up: executors round in other places, and of a search
# that went up to 0.0449 of 0.045 on the trained MiniLM they made 0.0451 and 0.0456, and were dropped.
_MARGIN = 0.9
# Between what a model loses in float32, 1e-6 or so, and in bfloat16, 1e-3 and more, as a relative distance.
_NARROW = 1e-4
# Exact, and run again behind the casts: neighbours in the same type cast there and back in between.
_BEHIND = ("merge_casts", "remove_noops", "merge_common_subexpressions", "merge_casts", "remove_dead_code")


def passes_of(precision: str) -> tuple[str, ...]:
    """The passes that a precision turns on, by name.

    Raises:
        InputError: the precision is unknown.
    """
    if precision == EXACT:
        return ()
    if precision not in PRECISIONS and precision not in _GPUS_ONLY:
        known = ", ".join((EXACT, *PRECISIONS, *_GPUS_ONLY))
        raise InputError(f"precision={precision!r} is unknown", hint=f"one of: {known}")
    return () if precision in _GPUS_ONLY else PRECISIONS[precision].casts


def require_possible(precision: str, target: Target) -> None:
    """Refuse a precision that nothing on the target computes in.

    Raises:
        TargetError: there is none.
    """
    on_gpu = target.device.type == "cuda"
    if precision in _GPUS_ONLY:
        what = "is not there yet" if on_gpu else "is for GPUs"
        hint = "precision='bf16'" if on_gpu else "precision='int8' or 'bf16' on a CPU"
        raise TargetError(f"precision={precision!r} {what}, and the target is {target}", hint=hint)
    if on_gpu and precision.startswith("int"):
        raise TargetError(
            f"precision={precision!r} is for CPUs, and the target is {target}",
            hint="precision='bf16' or 'fp16'",
        )


def default_max_loss(precision: str, metric: Any) -> float | None:
    """What may be lost where the user does not say; None where a metric has its own unit."""
    return PRECISIONS[precision].max_loss if precision in PRECISIONS and metric is None else None


def calibration_calls(
    captured: Graph,
    forward: Callable[..., Any],
    given: Iterable[Any],
    precision: str,
) -> list[list[torch.Tensor]]:
    """The user's calibration inputs as flat tensors, a list a call.

    Args:
        captured: the model as captured: further inputs must fit it as later calls must.
        forward: of the original.
        given: tuples of positional arguments, or mappings of keyword arguments.
        precision: that they are for.

    Raises:
        InputError: the precision has no use for them, or one does not fit the model.
    """
    calling, calls = CallingConvention(captured, forward), []
    for index, call in enumerate(given):
        if not isinstance(call, (tuple, Mapping)):
            raise InputError(
                f"calibration input {index} is a {type(call).__name__}",
                hint="each is a tuple of positional arguments, or a mapping of keyword arguments",
            )
        args, kwargs = (call, {}) if isinstance(call, tuple) else ((), dict(call))
        try:
            calls.append(calling.flatten(args, kwargs))
        except InputError as error:
            raise InputError(f"calibration input {index}: {error.message}", hint=error.hint) from error
    if calls and not (precision in PRECISIONS and PRECISIONS[precision].calibrated):
        raise InputError(
            f"calibration inputs are given, and precision={precision!r} has no ranges to calibrate",
            hint="precision='int8-static'",
        )
    return calls


class Allowance:
    """What a narrowed candidate is held against: the budget.

    Args:
        graph: that the candidate runs.
        budget: what may be lost.
        original: the outputs of the captured model.
        reference: the same in float64, for the errors that the report shows.

    Attributes:
        loss: of what was compared last.
    """

    def __init__(self, graph: Graph, budget: Budget, original: Sequence[Any], reference: Reference) -> None:
        self._ends: Any = graph.output.args[0]
        self._budget = budget
        self._original = original
        self._float64 = reference.float64
        self.loss = 0.0

    def compare(self, after: Sequence[Any]) -> Comparison:
        """Judge what a candidate computes of what the graph returns."""
        given = iter(after)
        found = [next(given) if isinstance(end, fx.Node) else end for end in self._ends]
        error = worst_error(after, self._float64)
        self.loss = self._budget.metric(self._original, found)
        if self._budget.allows(self.loss):
            reason = self._refused(found)
        else:
            reason = f"the loss is {self.loss:.3g}, above the {self._budget.max_loss:.3g} allowed"
        return Comparison(0.0, error, not reason, reason)

    def _refused(self, found: Sequence[Any]) -> str:
        """Why outputs within the budget do not count; "" where they do."""
        raise NotImplementedError


class OfRewritten(Allowance):
    """Of an executor that runs the narrow graph: also held against the graph's own results.

    It may round in other places than the graph's evaluation did, and so differ from it; but not by more than
    twice what the rewriting itself changed, as for the rounding of anything else.

    Args:
        graph: the rewritten graph.
        budget: what may be lost.
        original: the outputs of the captured model.
        reference: the same in float64.
        inputs: example inputs: flat tensors.
    """

    def __init__(
        self,
        graph: Graph,
        budget: Budget,
        original: Sequence[Any],
        reference: Reference,
        inputs: Sequence[torch.Tensor],
    ) -> None:
        super().__init__(graph, budget, original, reference)
        self._own = outputs(graph, inputs)
        floor = MODEL_FLOOR_ULPS * torch.finfo(torch.float32).eps
        self._apart = max(FACTOR * relative_distance(original, self._own), floor)

    def _refused(self, found: Sequence[Any]) -> str:
        apart = relative_distance(self._own, found)
        if apart <= self._apart:
            return ""
        return f"it is {apart:.2e} from the rewritten graph, where {self._apart:.2e} would be rounding"


class OfHinted(Allowance):
    """Of an executor that is handed the exact graph, and narrows it by itself: that it does is checked."""

    def _refused(self, found: Sequence[Any]) -> str:
        if relative_distance(self._original, found) > _NARROW:
            return ""
        return "it computes as exactly as in float32: it has no such numbers on this processor"


@dataclass(frozen=True)
class Narrowed:
    """A model after passes that change its number format, until it is known whether that is what runs.

    Args:
        name: of the precision.
        exact: the graph before them.
        graph: the rewritten graph.
        rewrites: every site tried, and what was tidied up behind.
        remarks: what there is to say of them.
        loss: of the graph, against the captured model.
        budget: what may be lost.
        inputs: example inputs: flat tensors.
        original: the outputs of the captured model.
    """

    name: str
    exact: Graph
    graph: Graph
    rewrites: list[Rewrite]
    remarks: Remarks
    loss: float
    budget: Budget
    inputs: Sequence[torch.Tensor]
    original: Sequence[Any]

    def candidates(
        self, reference: Reference, executors: Sequence[str] | None, target: Target, effort: str
    ) -> list[Candidate]:
        """The ways to run it, each held against the budget by itself; none where no site was rewritten."""
        if not any(rewrite.kept for rewrite in self.rewrites):
            return []

        def judge() -> Allowance:
            return OfRewritten(self.graph, self.budget, self.original, reference, self.inputs)

        found = narrowed_candidates(self.graph, self.name, judge, executors, target, self.remarks, effort)
        hinted = OfHinted(self.exact, self.budget, self.original, reference)
        by_hint = hinted_candidates(self.exact, self.name, hinted, executors, target, self.remarks, effort)
        return [*found, *by_hint] if executors is None else [*by_hint, *found]

    def runs(self, best: Candidate) -> bool:
        """True when this is what was chosen."""
        return isinstance(best.judge, Allowance)

    def settle(self, best: Candidate, outcome: Outcome, loss: float | None, remarks: Remarks) -> float | None:
        """Report what was done if that is what runs, and else that it was not worth it; returns the loss."""
        if isinstance(best.judge, OfHinted):
            casts = {rewrite.pass_name for rewrite in self.rewrites}
            remarks.extend(row for row in self.remarks.rows if row.pass_name not in casts)
            reason = f"{best.name} runs the graph as it was, and narrows all of it by itself"
            remarks.add("analysis", "precision", None, reason)
            return best.judge.loss
        if isinstance(best.judge, Allowance):
            remarks.extend(self.remarks.rows)
            outcome.rewrites += self.rewrites
            return best.judge.loss
        remarks.extend(row for row in self.remarks.rows if row.kind != "passed")
        if any(rewrite.kept for rewrite in self.rewrites):
            reason = f"{self.name} loses {self.loss:.3g} and is no faster here: {best.name} runs"
            remarks.add("missed", "precision", None, reason)
        return loss


def narrowed(
    graph: Graph,
    passes: Sequence[Pass],
    name: str,
    budget: Budget | None,
    inputs: Sequence[torch.Tensor],
    captured: Graph,
    target: Target,
    calibration: Sequence[Sequence[torch.Tensor]] = (),
) -> Narrowed | None:
    """A copy of a graph in narrower numbers, as far as the budget allows; None where nobody asked for it.

    Args:
        graph: the graph after all other passes; it stays as it is.
        passes: all that run; those of the kind ``cast`` are taken.
        name: of the precision.
        budget: what may be lost, against the captured model; a tenth is left for what executors round.
        inputs: example inputs: flat tensors.
        captured: the model as captured.
        target: where it will run.
        calibration: further inputs on which ranges are observed: flat tensors, a list a call.
    """
    casts = [rule for rule in passes if rule.kind == "cast"]
    if budget is None or not casts:
        return None
    remarks, copy, original = Remarks(), graph.clone(), outputs(captured, inputs)
    if target.device.type == "cpu":
        found = f"the processor's instructions for narrow numbers: {cpu.features()}"
        remarks.add("analysis", "precision", None, found)
    within = Budget(_MARGIN * budget.max_loss, budget.metric)
    exposed: list[Rewrite] = []
    if any(rule.name in PRECISIONS["int8-static"].casts for rule in casts):
        exposed = _calibrate(copy, [inputs, *calibration], remarks, target)
    outcome, loss = LossyManager(casts, remarks, within, target.limits).run(copy, inputs, original)
    if outcome.kept:
        outcome.rewrites[:0] = exposed
        tidied = PassManager([find(rule) for rule in _BEHIND], Remarks(), target.limits).run(copy, inputs)
        outcome.rewrites += tidied.rewrites
    label = name if name != EXACT else " + ".join(rule.name for rule in casts)
    return Narrowed(label, graph, copy, outcome.rewrites, remarks, loss, budget, inputs, original)


def _calibrate(
    graph: Graph, calls: Sequence[Sequence[torch.Tensor]], remarks: Remarks, target: Target
) -> list[Rewrite]:
    """Observe the ranges that fixed steps are made of: what products read, and what convolutions give.

    Returns:
        What had to be rewritten for it.
    """
    exposed = PassManager([entry.rule for entry in CALIBRATING], Remarks(), target.limits)
    rewrites = exposed.run(graph, calls[0]).rewrites
    products = {match.root: (source(match.root), -1) for match in matches(graph)}
    convolutions = [match.root for match in quantize_conv_int8.pattern(graph)]
    images = {node: ((quantize_conv_int8.source(node), 1), (node, 1)) for node in convolutions}
    found = observe(graph, {*products.values(), *chain.from_iterable(images.values())}, calls)
    for node, read in products.items():
        keep(node, x=found.get(read))
    for node, (read, given) in images.items():
        keep(node, x=found.get(read), out=found.get(given))
    seen = f"ranges of {len(found)} values were observed on {len(calls)} inputs, the example's among them"
    remarks.add("analysis", "precision", None, seen)
    return rewrites
