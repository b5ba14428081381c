"""The peers that PyTorch brings, and torch_tensorrt, which it loads."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Sequence

import torch

from graphopt.bench.inputs import moved
from graphopt.bench.peer import Mode, Problem, Run, eager, tensors
from graphopt.kernels._replay import captured

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _also_narrow(modes: Sequence[Mode], problem: Problem) -> Sequence[Mode]:
    """The modes, and the same on the model in the dtype that the problem's precision allows, if it is one."""
    if problem.precision not in _DTYPES:
        return modes

    def narrow(mode: Mode) -> Mode:
        return mode.narrowed(problem.precision, lambda given: mode.build(_cast(given)))

    return [*modes, *map(narrow, modes)]


def _cast(problem: Problem) -> Problem:
    """A copy of the model, and its inputs, in narrower numbers before anything is timed; so is the output."""
    dtype = _DTYPES[problem.precision]
    model = copy.deepcopy(problem.model).to(dtype)
    args, kwargs = moved((problem.args, dict(problem.kwargs)), problem.device, dtype)
    return dataclasses.replace(problem, model=model, args=args, kwargs=kwargs)


def eager_modes(problem: Problem) -> Sequence[Mode]:
    """The model as it is, and cast as a whole where that is allowed; on a GPU also as one CUDA graph."""
    modes = [Mode("", lambda p: eager(p.model, p.args, p.kwargs))]
    if problem.device.type == "cuda":
        modes.append(Mode("CUDA graph", _graphed))
    return _also_narrow(modes, problem)


def _graphed(problem: Problem) -> Run:
    run = eager(problem.model, problem.args, problem.kwargs)
    for _ in range(3):  # what is allocated and tuned by first calls must not be captured
        run()
    graph, results = captured([run])
    outputs: list[torch.Tensor] = results[0]

    def replay() -> list[torch.Tensor]:
        graph.replay()
        return outputs

    return replay


def inductor_modes(problem: Problem) -> Sequence[Mode]:
    """``torch.compile`` in every mode that may win on the device.

    On a CPU with its weights frozen, as it advises. On a GPU also as most run it: what frozen weights gain
    where batch norms are folded, they may lose where products choose their own layouts.
    """
    if problem.device.type != "cuda":
        return _also_narrow([inductor_mode(name) for name in ("default", "max-autotune")], problem)
    modes = [inductor_mode(name, frozen=False) for name in ("reduce-overhead", "max-autotune")]
    frozen = Mode("max-autotune, frozen", inductor_mode("max-autotune").build)
    return _also_narrow([*modes, frozen], problem)


def inductor_mode(name: str, frozen: bool = True) -> Mode:
    """``torch.compile`` in one mode, by PyTorch's name for it, and whether its weights are constants."""
    return Mode(name, lambda problem: _inductor(problem, name, frozen))


def _inductor(problem: Problem, mode: str, frozen: bool) -> Run:
    """Compiled for these shapes alone.

    Freezing is asked for twice: as an option, which also keeps one mode's code apart from another's, and
    around the first calls, because Dynamo reads it while it traces, where options do not reach.
    """
    options = {**torch._inductor.list_mode_options(mode), "freezing": frozen}
    compiled = torch.compile(problem.model, dynamic=False, options=options)
    run = eager(compiled, problem.args, problem.kwargs)  # type: ignore[arg-type]
    with torch._inductor.config.patch(freezing=frozen):
        for _ in range(3):  # the second and third record CUDA graphs
            run()
    return run


def torch_tensorrt(problem: Problem) -> Run:
    """``torch.compile`` with TensorRT's backend, in the model's own dtypes."""
    importlib.import_module("torch_tensorrt")  # registers the backend
    compiled = torch.compile(
        problem.model, backend="torch_tensorrt", dynamic=False, options={"use_explicit_typing": True}
    )

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            return tensors(compiled(*problem.args, **problem.kwargs))

    run()
    return run
