"""``python -m bench kernels``: the Triton kernels beside ATen, Inductor and the roofline.

All sides of a case run in one process, in CUDA graphs replayed in turn. Warm, a graph calls one set of
arguments again and again, so that small ones stay in the L2 cache; cold, it goes through copies of them that
together are four times that cache. The roofline is the later of what a copy of 1 GiB moves and what cuBLAS
multiplies at 8192 x 8192 x 8192, both measured in the same run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import RESULTS
from bench.kernel_cases import Case, cases
from bench.product_cases import products
from graphopt.compiler.compare import worst_error
from graphopt.compiler.device import l2_bytes
from graphopt.compiler.evaluate import widen
from graphopt.kernels._replay import captured, replayed
from graphopt.kernels._triton import prefetched_weights
from graphopt.kernels._tuning import tune
from graphopt.observe.machine import commit
from graphopt.observe.snapshot import versions

Thunk = Callable[[], Any]
ROUNDS, LEAST_CALLS, MOST_CALLS, MOST_BYTES = 15, 20, 200, 2**33
SIDES = ("triton", "eager", "inductor", "triton again")


def run(only: str, against: Sequence[str], tuned: bool, record: bool) -> None:
    """Measure in float16, print, and record rows under ``bench/results``.

    Args:
        only: cases whose kernel or shape contains this.
        against: which of "eager", which is ATen, and "inductor" to measure beside.
        tuned: whether the kernels' configurations are measured first; else the heuristics choose.
        record: whether rows are written.

    Raises:
        SystemExit: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise SystemExit("python -m bench kernels needs a CUDA GPU")
    peaks = copy_bandwidth(), product_rate()
    wanted = [case for case in (*cases(), *products()) if only in f"{case.kernel} {case.shape}"]
    facts = {
        "roofline_TBps": round(peaks[0] / 1e12, 3),
        "roofline_TFLOPs": round(peaks[1] / 1e12, 1),
        "device": torch.cuda.get_device_name(),
        "tuned": tuned,
        "versions": versions(),
        "commit": commit(Path.cwd()),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m bench kernels" + " --tune" * tuned,
    }
    rows = []
    for case in track(wanted, "kernels"):
        rows.append({**measure(case, torch.float16, peaks, against, tuned), **facts})
        if record:
            _record(rows[-1:])
    _print(rows)


def measure(
    case: Case, dtype: torch.dtype, peaks: tuple[float, float], against: Sequence[str], tuned: bool
) -> dict[str, Any]:
    """One row: microseconds by side, cold and warm, bytes, the share of the roofline, and errors by side."""
    torch._dynamo.reset()
    device = torch.device("cuda")
    args = case.make(device, dtype)
    reason = case.face.refuses(*args)
    if reason is not None:
        raise SystemExit(f"{case.kernel} {case.shape}: {reason}")
    with prefetched_weights(_tensors(args)):
        changed = tune(case.face.launch, *args, again=True) if tuned else []
    peers = {
        "eager": case.reference,
        "inductor": torch.compile(case.reference, dynamic=False, fullgraph=True),
    }
    if case.reads_back(args):  # no CUDA graph can hold it
        peers = {}
    sides: dict[str, Callable[..., Any]] = {
        "triton": case.face.launch,
        **{peer: call for peer, call in peers.items() if peer in against},
        "triton again": case.face.launch,
    }
    exact = case.reference(*widen(args))
    errors = {side: worst_error(_outputs(call(*args)), _outputs(exact)) for side, call in sides.items()}
    cost = case.cost(args)
    moved, least = cost.bytes, max(cost.bytes / peaks[0], cost.flops / peaks[1])
    sets = _copies(args, moved)
    with prefetched_weights(_tensors(sets)):
        cold = interleaved([_calls(call, sets) for call in sides.values()])
        warm = interleaved([_calls(call, [args]) for call in sides.values()])
    best = {result.kernel: result.config.options for result in changed}
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "us": {side: round(us, 3) for side, us in zip(sides, cold, strict=True)},
        "us_warm": {side: round(us, 3) for side, us in zip(sides, warm, strict=True)},
        "bytes": int(moved),
        "roofline_percent": {
            side: round(100 * least / (us * 1e-6), 1) for side, us in zip(sides, cold, strict=True)
        },
        "error": errors,
        "configuration": best,
    }


def copy_bandwidth() -> float:
    """Bytes a second that a pass over 1 GiB reads and writes, a copy's or an elementwise kernel's."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    calls = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return 2 * source.nbytes / (1e-6 * min(interleaved([[call] * 4 for call in calls])))


def product_rate() -> float:
    """FLOPs a second of a large product in float16, which memory does not hold up."""
    a, b = (torch.randn(8192, 8192, device="cuda").half() for _ in range(2))
    return float(2 * 8192**3 / (1e-6 * min(interleaved([[lambda: torch.mm(a, b)] * 4]))))


def interleaved(sides: Sequence[Sequence[Thunk]]) -> list[float]:
    """Median microseconds of a call of each side: a CUDA graph a side, replayed A B C, C B A."""
    graphs = []
    for calls in sides:
        for _ in range(3):  # what is compiled and allocated by first calls must not be captured
            calls[0]()
        torch.cuda.synchronize()
        graphs.append(captured(calls))  # results that shared memory would stay in the cache: they are kept
        graphs[-1][0].replay()
    times = replayed([graph for graph, _ in graphs], ROUNDS)
    return [us / len(calls) for us, calls in zip(times, sides, strict=True)]


def _calls(call: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> list[Thunk]:
    """At least ``LEAST_CALLS`` of them, going round the sets of arguments."""
    count = max(len(sets), LEAST_CALLS // len(sets) * len(sets))

    def bound(args: tuple[Any, ...]) -> Thunk:
        return lambda: call(*args)

    return [bound(sets[i % len(sets)]) for i in range(count)]


def _tensors(args: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]


def _copies(args: tuple[Any, ...], moved: float) -> list[tuple[Any, ...]]:
    """Sets of arguments that together move four times the L2 cache, in at most ``MOST_BYTES`` of memory."""
    cache = l2_bytes(torch.device("cuda", 0))
    held = sum(x.nbytes for x in _tensors(args))
    count = max(min(math.ceil(4 * cache / moved), MOST_CALLS, MOST_BYTES // held), 2)
    return [pytree.tree_map_only(torch.Tensor, torch.clone, args) for _ in range(count)]


def _outputs(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def _record(rows: list[dict[str, Any]]) -> None:
    """One JSON line a case and dtype; one measured again on that device takes its old row's place."""
    path = RESULTS / "kernels.jsonl"
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    new = {_identity(row) for row in rows}
    kept = [row for row in old if _identity(row) not in new]
    path.write_text("".join(json.dumps(row) + "\n" for row in (*kept, *rows)))


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["device"], row["kernel"], row["shape"], row["dtype"]


def _print(rows: list[dict[str, Any]]) -> None:
    times = [f"{side} us" for side in SIDES]
    table = Table("kernel", "shape", *times, "warm", "%", "configuration")
    for row in rows:
        warm = ", ".join(f"{us:.2f}" for us in row["us_warm"].values())
        times = [f"{row['us'].get(side, math.nan):.2f}" for side in SIDES]
        options = [str(number) for found in row["configuration"].values() for number in found.values()]
        share = f"{row['roofline_percent']['triton']:.0f}"
        table.add_row(row["kernel"], row["shape"], *times, warm, share, " ".join(options))
    Console(width=180).print(table)
