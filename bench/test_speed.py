"""The suites under pytest-benchmark, which keeps saved runs and compares: graphopt against its own past.

    pytest bench/test_speed.py -k cpu --benchmark-autosave      # today
    pytest bench/test_speed.py -k cpu --benchmark-compare       # after a change

It times one side after the other, so what it shows is a trend on one machine; a claim about two sides is made
by ``python -m bench``, which interleaves them.
"""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest
import torch

import graphopt
from bench.suites import SUITES
from graphopt.bench.peer import eager
from graphopt.bench.problem import pose
from graphopt.bench.setting import Case
from graphopt.cli import _spec

CASES = [
    pytest.param(case, id=f"{name}-" + re.sub(r"[^\w.]+", "-", case.name.removeprefix("bench.models:")))
    for name, suite in SUITES.items()
    for case in suite.cases
]


@pytest.mark.parametrize("side", ["graphopt", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_speed(case: Case, side: str, benchmark: Any) -> None:
    """One call of one side."""
    if case.device.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    loaded = _spec.load(case.spec, sizes=case.sizes)
    problem, _ = pose(
        loaded.model,
        loaded.args,
        loaded.kwargs,
        device=case.device,
        dtype=case.dtype,
        lengths=case.lengths,
        seed=case.seed,
    )
    shutil.rmtree(problem.folder)
    model = problem.model
    if side == "graphopt":
        padding = "keep" if case.lengths is None else "remove"
        model = graphopt.optimize(model, problem.args, problem.kwargs, padding=padding)
    run = eager(model, problem.args, problem.kwargs)

    def call() -> None:
        run()
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)

    benchmark.group = case.name
    benchmark(call)
