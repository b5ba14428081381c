"""The kernels that a graph needs on a GPU which is not here: counted, and compiled where Triton is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.compiler.cost import VIEWS
from graphopt.compiler.device import Limits
from graphopt.compiler.evaluate import concrete
from graphopt.errors import said
from graphopt.ir.graph import is_getitem, is_symbolic, op_name
from graphopt.ir.op import TritonFace, op_of
from graphopt.kernels._aten import triton_face
from graphopt.kernels._compile import compiled
from graphopt.kernels._triton import INTERPRETED, Gpu, Launch, recorded_launches, standing_in_for, triton

Row = dict[str, Any]


def on_gpu(calls: Iterable[fx.Node], limits: Limits) -> Row:
    """What a graph launches on a GPU: a fused op is one kernel, any other op at least one, a view none.

    Args:
        calls: of the rewritten graph.
        limits: of the GPU.

    Returns:
        ``launches`` (at least so many), ``fused`` (fused ops by name), ``without_kernel`` (those of them that
        have no Triton face, which run as PyTorch spells them), and ``compiled``: see ``compiled_for``, None
        where Triton is not installed.
    """
    launched = [node for node in calls if not (node.target in VIEWS or is_getitem(node) or is_symbolic(node))]
    ours = [node for node in launched if op_of(node.target) is not None]
    bare = [node for node in ours if triton_face(node.target) is None]
    can_compile = triton is not None and not INTERPRETED
    return {
        "launches": len(launched),
        "fused": dict(Counter(map(op_name, ours))),
        "without_kernel": dict(Counter(map(op_name, bare))),
        "compiled": compiled_for(launched, limits) if can_compile else None,
    }


def compiled_for(nodes: Iterable[fx.Node], limits: Limits) -> dict[str, Row]:
    """Compile the Triton kernels of calls for a GPU that need not be here.

    Args:
        nodes: calls; those without a Triton face are passed over.
        limits: of the GPU.

    Returns:
        By op and kernel, over all calls: ``variants`` (of sizes, types and tiles), and the most ``registers``
        and ``spilled`` bytes of a thread and ``shared`` bytes of a program. Instead of these, ``failed`` says
        why a kernel cannot be compiled or started; by op alone, ``refused`` why it has none for such a call.
    """
    gpu = Gpu(limits.capability, limits.processors, limits.shared_memory)
    found: dict[str, Row] = {}
    seen: set[str] = set()
    for node in nodes:
        face = triton_face(node.target)
        if face is None:
            continue
        name = op_name(node)
        launches, why = _launches(node, face, gpu)
        if why:
            found.setdefault(name, why)
        for launch in launches:
            identity = f"{name} {_identity(launch)}"
            if identity not in seen:
                seen.add(identity)
                key = f"{name}: {launch.kernel.__name__}"
                found[key] = _worse(found.get(key), _used(launch, gpu))
    return found


def _launches(node: fx.Node, face: TritonFace, gpu: Gpu) -> tuple[list[Launch], Row]:
    """What a call launches, from tensors without data; and why it launches nothing, if so."""
    with FakeTensorMode(), standing_in_for(gpu), recorded_launches() as launches, torch.no_grad():
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: concrete(n.meta["val"], "cuda"))
        try:
            refused = face.refuses(*args, **kwargs)
            if refused:
                return [], {"refused": refused}
            face.launch(*args, **kwargs)
        except Exception as error:  # whatever a launcher or Triton says
            return [], {"failed": said(error)}
    return launches, {}


def _identity(launch: Launch) -> str:
    """All that a kernel is specialised on, and its sizes."""

    def of(arg: Any) -> str:
        if isinstance(arg, torch.Tensor):
            return str(arg.dtype)
        return f"({' '.join(map(of, arg))})" if isinstance(arg, tuple) else str(arg)

    numbers = launch.constants, launch.num_warps, launch.num_stages
    return f"{launch.kernel.__name__} {of(launch.args)} {numbers}"


def _used(launch: Launch, gpu: Gpu) -> Row:
    try:
        usage = asdict(compiled(launch, gpu.capability).usage)
    except Exception as error:
        return {"failed": said(error)}
    if usage["shared"] > gpu.shared_memory:
        return {"failed": f"it needs {usage['shared']} bytes of shared memory of {gpu.shared_memory}"}
    return {
        "variants": 1,
        "registers": usage["registers"],
        "shared": usage["shared"],
        "spilled": usage["local"],
    }


def _worse(row: Mapping[str, Any] | None, other: Row) -> Row:
    """Two variants of a kernel as one row: a failure stays one."""
    if row is None or "failed" in other:
        return other
    if "failed" in row:
        return dict(row)
    most = {key: max(row[key], other[key]) for key in ("registers", "shared", "spilled")}
    return {**most, "variants": row["variants"] + 1}
