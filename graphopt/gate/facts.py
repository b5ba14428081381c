"""The facts of an optimized model: everything that the lock records and a check holds against it.

All but ``numerics``, ``serve`` and ``latency`` are the same in every run on every machine, given the same
model, inputs, versions and configuration.
"""

from __future__ import annotations

import hashlib
import inspect
import platform
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import fx

from graphopt.compiler.cost import VIEWS, milliseconds, node_cost, node_dtype
from graphopt.compiler.device import Limits
from graphopt.compiler.lossy import relative_distance
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.reference import computed, output_reference
from graphopt.compiler.remarks import Remark, Rewrite
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.gate import kernels, probe
from graphopt.ir import provenance
from graphopt.ir.graph import Graph, is_getitem, is_symbolic, op_name
from graphopt.observe.explanation import Explanation, Group
from graphopt.observe.machine import cpu_name
from graphopt.observe.memory import account
from graphopt.observe.snapshot import versions
from graphopt.runtime.plan import Plan
from graphopt.runtime.profile import NodeTime

SYNCS = {"aten.item", "aten._local_scalar_dense", "aten.nonzero"}
_MEMCPY = re.compile("Memcpy")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Subject:
    """A model after the passes, and after lowering where its target is here.

    Args:
        captured: the graph as captured.
        inputs: example inputs: flat tensors in placeholder order.
        graphs: what runs: the regions of the plan in order, or the rewritten graph.
        outputs: flat, what that gives for the inputs.
        rewrites: every rewrite tried.
        remarks: all remarks.
        passes: what could have rewritten it.
        limits: of the target.
        host: what ``host.watch`` saw in the original's forward.
        plan: what runs; None for a target that is not here.
        node_times: of the plan.
        chosen: name of the candidate that runs; "" without a plan.
        max_loss: what may be lost where it runs in narrower numbers: a relative distance from float64; None
            where it runs in the model's own.
    """

    captured: Graph
    inputs: Sequence[torch.Tensor]
    graphs: Sequence[Graph]
    outputs: Sequence[Any]
    rewrites: Sequence[Rewrite]
    remarks: Sequence[Remark]
    passes: Sequence[Pass]
    limits: Limits
    host: Mapping[str, Any]
    plan: Plan | None = None
    node_times: Sequence[NodeTime] = ()
    chosen: str = ""
    max_loss: float | None = None


def facts_of(subject: Subject) -> dict[str, Any]:
    """The facts of a model, JSON-ready; ``serve``, ``latency`` and ``metric`` are added by who runs it."""
    kept = Counter(row.pass_name for row in subject.rewrites if row.kept)
    reverted = [row for row in subject.rewrites if not row.kept]
    calls = [node for graph in subject.graphs for node in graph.calls]
    return {
        "captured": _captured(subject.captured, subject.limits),
        "fusions": dict(kept),
        "reverted": dict(Counter(row.pass_name for row in reverted)),
        "undone": sorted(
            {f"{r.pass_name}: {r.reason}" for r in subject.remarks if r.reason.startswith("undone: ")}
        ),
        "ops": dict(Counter(op_name(n) for n in calls if not is_symbolic(n) or op_name(n) in SYNCS)),
        "cost": {**_cost(calls, subject.limits), "device": subject.limits.name},
        "plan": _plan(subject, calls),
        "gpu": kernels.on_gpu(calls, subject.limits) if subject.plan is None else None,
        "host": _host(subject.host),
        "memory": account(subject.graphs),
        **_numerics(subject),
        "inputs": probe.inputs(subject.captured, subject.inputs),
        "weights": probe.weights(subject.captured),
        "passes": {rule.name: pass_digest(rule) for rule in subject.passes},
        "sources": _sources(subject.captured),
        "remarks": [_remark(group) for group in _missed(subject)],
        "items": subject.inputs[0].shape[0] if subject.inputs and subject.inputs[0].dim() else None,
        "lines": _lines(subject.captured),
        "serve": None,
        "latency": None,
        "metric": None,
        "versions": versions(),
        "machine": machine(),
    }


def for_lock(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts without what serves only to tell where something new is: it changes with every edit."""
    kept = {name: value for name, value in facts.items() if name != "lines"}
    return {**kept, "host": {**facts["host"], "places": {}}}


def machine() -> dict[str, Any]:
    """What the facts that are measured depend on."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "providers": onnxruntime.get_available_providers(),
    }


def portable(source: str) -> str:
    """A ``file:line`` without the part that is this machine's: from the current folder, or of a package."""
    file, _, line = source.rpartition(":")
    if not file:
        return source
    path = Path(file)
    if path.is_relative_to(Path.cwd()) and "site-packages" not in path.parts:
        return f"{path.relative_to(Path.cwd()).as_posix()}:{line}"
    for root in sorted(map(Path, sys.path), key=lambda root: -len(root.parts)):
        if root.is_absolute() and path.is_relative_to(root):
            return f"{path.relative_to(root).as_posix()}:{line}"
    return f"{'/'.join(path.parts[-2:])}:{line}"


def pass_digest(rule: Pass) -> str:
    """The digest of the file that a pass is written in."""
    file = inspect.getsourcefile(inspect.unwrap(rule.rewrite))
    try:
        return hashlib.sha256(Path(file or "").read_bytes()).hexdigest()[:16]
    except OSError:  # it was typed into a session
        return "unknown"


def pattern_of(module: str) -> str:
    """A module path with a star for each number: the place that all layers of a model share."""
    return _NUMBER.sub("*", module)


def _captured(graph: Graph, limits: Limits) -> dict[str, Any]:
    """The captured graph: calls by place and op, with their cost; what the user wrote, in short."""
    calls = [node for node in graph.calls if not is_symbolic(node)]
    places = Counter(place_of(node) for node in calls)
    return {"places": dict(places), **_cost(calls, limits)}


def _lines(graph: Graph) -> dict[str, dict[str, list[Any]]]:
    """By place: the modules that it stands for, each with its number of calls and the line of the first."""
    found: dict[str, dict[str, list[Any]]] = {}
    for node in graph.calls:
        if not is_symbolic(node):
            at = provenance.of(node)
            row = found.setdefault(place_of(node), {}).setdefault(at.module, [0, portable(at.source)])
            row[0] += 1
    return found


def _host(seen: Mapping[str, Any]) -> dict[str, Any]:
    places = {name: sorted(map(portable, lines)) for name, lines in seen["places"].items()}
    return {**seen, "places": places}


def place_of(node: fx.Node) -> str:
    """Where a captured call stands, and what it calls: ``encoder.layer.*.output.dense aten.linear``."""
    return f"{pattern_of(provenance.of(node).module) or '(model)'} {op_name(node)}"


def _cost(calls: Iterable[fx.Node], limits: Limits) -> dict[str, float]:
    flops, moved, ms = 0.0, 0.0, 0.0
    for node in calls:
        cost = node_cost(node)
        flops, moved = flops + cost.flops, moved + cost.bytes
        ms += milliseconds(cost, limits, node_dtype(node))
    return {"flops": flops, "bytes": moved, "ms": two_digits(ms)}


def two_digits(value: float) -> float:
    """A measured number as the lock keeps it: what noise decides is not written down."""
    return float(f"{value:.2g}")


def _plan(subject: Subject, calls: Sequence[fx.Node]) -> dict[str, Any] | None:
    """Who runs what; None for a target that is not here."""
    plan = subject.plan
    if plan is None:
        return None
    by_name = {node.name: node for node in calls}
    ran = Counter(row.op for row in subject.node_times if not _is_view(by_name.get(row.node), row.executor))
    syncs = Counter(op_name(node) for node in calls if op_name(node) in SYNCS)
    copies = Counter(op for op in ran.elements() if _MEMCPY.match(op))
    copies.update(op_name(node) for node in calls if _changes_device(node))
    opset: dict[str, int] = {}
    for step in plan.steps:
        model = getattr(step.program, "model", None)
        opset |= {name or "ai.onnx": number for name, number in getattr(model, "opset_imports", {}).items()}
    on_gpu = plan.device.type == "cuda"
    return {
        "chosen": subject.chosen,
        "regions": [
            {
                "executor": step.executor,
                "provider": getattr(step.program, "provider", "PyTorch"),
                "device": (step.device or plan.device).type,
                "calls": sum(not is_symbolic(node) for node in step.region.graph.calls),
            }
            for step in plan.steps
        ],
        "kernels": dict(ran),
        "launches": sum(ran.values()),
        "copies": dict(copies),
        "syncs": dict(syncs),
        "cuda_graph_coverage": _graph_coverage(plan) if on_gpu else None,
        "opset": opset,
    }


def _is_view(node: fx.Node | None, executor: str) -> bool:
    """True for what an executor lists and does not launch; runtimes of their own list only what they ran."""
    if executor in ("ort", "openvino") or node is None:
        return False
    return node.target in VIEWS or is_getitem(node) or is_symbolic(node)


def _changes_device(node: fx.Node) -> bool:
    there = getattr(node.meta.get("val"), "device", None)
    return any(
        there is not None and getattr(source.meta.get("val"), "device", there) != there
        for source in node.all_input_nodes
    )


def _graph_coverage(plan: Plan) -> float | None:
    """The part of a plan's calls that CUDA graphs replay; None where its programs do not tell."""
    told = [
        (len(step.region.graph.calls), getattr(step.program, "in_cuda_graph", None)) for step in plan.steps
    ]
    if any(covered is None for _, covered in told):
        return None
    return sum(calls for calls, covered in told if covered) / max(sum(calls for calls, _ in told), 1)


def _numerics(subject: Subject) -> dict[str, Any]:
    """Errors against the original in float64, and the original's outputs in short.

    A model in narrower numbers is right where it loses no more than it may.

    The reference is the model as it was captured, whatever passes that lose something made of it: what they
    lost, in whatever metric they were allowed to, counts here.
    """
    reference = output_reference(subject.captured, subject.inputs, MODEL_FLOOR_ULPS)
    after = computed(subject.captured, subject.outputs)
    found = reference.compare(after)
    if subject.max_loss is not None:
        loss = relative_distance(reference.float64, after)
        reason = f"the loss is {loss:.3g}, above the {subject.max_loss:.3g} allowed"
        ok = loss <= subject.max_loss
        found = replace(found, ok=ok, reason="" if ok else reason)
    return {
        "numerics": {
            "error": found.error_after,
            "error_original": found.error_before,
            "ok": found.ok,
            "reason": found.reason,
        },
        "outputs": probe.sketch(reference.float64, reference.before),
    }


def _sources(captured: Graph) -> dict[str, str]:
    """The digest of every file that the captured calls come from."""
    files = {provenance.of(node).file for node in captured.calls} - {None}
    found = {}
    for file in files:
        path = Path(str(file))
        if path.is_file():
            name = portable(f"{file}:0").removesuffix(":0")
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def _missed(subject: Subject) -> list[Group]:
    told = Explanation("", subject.limits.name, subject.remarks, 0, 0, 0.0, 0.0)
    return told.groups(["missed"])


def _remark(group: Group) -> dict[str, Any]:
    row = group.to_dict()
    return {**row, "source": portable(group.source), "ms": two_digits(group.ms)}
