"""What two crossings cost: BERT-base whole on ONNX Runtime, and cut into three regions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.table import Column, Table
from torch.utils._python_dispatch import TorchDispatchMode

from bench.markdown import table as markdown_table
from bench.models import encoder
from graphopt.bench.case import context
from graphopt.capture.export import capture_any
from graphopt.compiler.manager import PassManager
from graphopt.compiler.remarks import Remarks
from graphopt.ir.graph import op_name
from graphopt.passes.default import pipeline
from graphopt.runtime import scheduler
from graphopt.runtime.partition import compiled, cut, find_executors
from graphopt.runtime.plan import Plan
from graphopt.runtime.rounds import clock_of, interleave, noise_floor, quartiles, ratio
from graphopt.runtime.target import Target

CASES = {"BERT-base 1x128": (12, 768, 1, 128), "BERT-base 8x128": (12, 768, 8, 128)}

_COPYING = ("clone", "copy_", "_to_copy")
_TOLERANCE = 1e-4  # between two cuts of one graph; the graph itself is checked elsewhere


class CopyCounter(TorchDispatchMode):
    """Counts the calls in which PyTorch copies a tensor, and their bytes.

    Attributes:
        count: so many.
        bytes: of what they wrote.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _COPYING:
            self.count += 1
            self.bytes += result.numel() * result.element_size()
        return result


def measure(case: str, sizes: Sequence[int], threads: int, rounds: int = 40) -> dict[str, Any]:
    """Time one encoder whole and cut, in turn.

    Args:
        case: what the row is called.
        sizes: layers, width, batch and length.
        threads: of every side.
        rounds: each runs every side twice.

    Returns:
        A JSON-ready row: milliseconds of every side, how many times as long as the whole each takes
        (``again`` is the whole a second time: the noise), what PyTorch copied in a call, and what crosses.
    """
    torch.set_num_threads(threads)
    plans, inputs = cuts(sizes)
    wanted = scheduler.run(plans["whole"], inputs)
    copies = {}
    for name, plan in plans.items():
        with CopyCounter() as counter:
            found = scheduler.run(plan, inputs)
        torch.testing.assert_close(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE)
        copies[name] = counter.count
    sides = {name: _call(plan, inputs) for name, plan in plans.items()}
    sides["again"] = sides["whole"]
    times = interleave(sides, rounds, clock=clock_of(torch.device("cpu")))
    against = {name: ratio(times[name], times["whole"]) for name in sides if name != "whole"}
    return {
        "case": case,
        "ms": {name: quartiles(row) for name, row in times.items()},
        "times_the_whole": against,
        "noise_floor": round(noise_floor(against["again"]), 4),
        "copies": copies,
        "crossing": {
            name: [list(step.region.reads) for step in plan.steps[1:]] for name, plan in plans.items()
        },
        **context(torch.device("cpu")),
    }


def cuts(sizes: Sequence[int]) -> tuple[dict[str, Plan], list[torch.Tensor]]:
    """The plans to compare: whole, in three regions of ONNX Runtime, and with one in PyTorch; their inputs.

    Args:
        sizes: layers, width, batch and length.
    """
    model, args, kwargs = encoder(*sizes)
    captured, inputs = capture_any(model, args, kwargs)
    target = Target(torch.device("cpu"))
    graph = PassManager(pipeline(), Remarks(), target.limits).run(captured, inputs).graph
    found = cut(graph, find_executors(("ort", "eager")), target, Remarks())
    ((_, members),) = found.groups
    norms = [i for i in members if op_name(found.units[i].nodes[0]).endswith("add_layer_norm")]
    middle = norms[len(norms) // 2]
    parts = _around(members, middle)
    ways = {
        "whole": [("ort", members)],
        "three on ort": [("ort", part) for part in parts],
        "ort, eager, ort": list(zip(("ort", "eager", "ort"), parts, strict=True)),
    }
    plans = {
        name: compiled(replace(found, groups=groups), target, Remarks(), "fast")
        for name, groups in ways.items()
    }
    return plans, inputs


def _around(members: Sequence[int], middle: int) -> tuple[list[int], list[int], list[int]]:
    """The units before one, itself, and those after it."""
    before = [index for index in members if index < middle]
    return before, [middle], [index for index in members if index > middle]


def _call(plan: Plan, inputs: Sequence[torch.Tensor]) -> Callable[[], object]:
    return lambda: scheduler.run(plan, inputs)


_SHOWN = "case", "regions", "ms", "times the whole", "95 % interval", "copies"


def cells(row: dict[str, Any]) -> list[list[str]]:
    """What ``_SHOWN`` names, a line for each side of a row."""
    lines = []
    for name, times in row["ms"].items():
        found = row["times_the_whole"].get(name)
        beside = ("", "") if found is None else (f"{found['ratio']}", f"{found['low']} to {found['high']}")
        lines.append([row["case"], name, f"{times['median']}", *beside, str(row["copies"].get(name, ""))])
    return lines


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a table: a line a side, with its time beside the whole's."""
    made = Table(Column("case", no_wrap=True), *_SHOWN[1:])
    for row in rows:
        for line in cells(row):
            made.add_row(*line)
    return made


def markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as lines of Markdown."""
    return markdown_table(_SHOWN, (line for row in rows for line in cells(row)))
