"""``python -m tests.kernels._compile``: kernels at real sizes, compiled for three GPUs without one.

Prints what ptxas made of each as JSON; with ``--record``, writes it to ``compiled.json``, with which the test
compares. Names of kernels behind that are the only ones that are compiled, and recorded anew. A process of
its own, because kernels that run in the interpreter cannot be compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from bench.kernel_cases import cases
from bench.product_cases import products as product_cases
from graphopt.kernels._compile import compiled
from graphopt.kernels._linear_configs import Chip, linear_configs
from graphopt.kernels._linear_triton import products
from graphopt.kernels._triton import WITH_PDL, Launch, recorded_launches
from tests.kernels._dependence import hazards

RECORDED = Path(__file__).parent / "compiled.json"
TARGETS = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}


def every(only: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Usage and hazards by kernel, case and GPU; launches that come to the same code once.

    Args:
        only: names of kernels; none for all.
    """
    found: dict[str, dict[str, Any]] = {}
    with FakeTensorMode():
        for case in (*cases(), *product_cases()):
            args = case.make(torch.device("cpu"), torch.float16)
            with recorded_launches() as launches:
                case.face.launch(*args)
            for launch in launches:
                if only and launch.kernel.__name__ not in only:
                    continue
                for target, capability in TARGETS.items():
                    found[f"{launch.kernel.__name__}, {case.shape}, {target}"] = facts(launch, capability)
    with FakeTensorMode():
        for name, launch in by_tma() if not only or "_linear_tma_kernel" in only else ():
            for target in ("sm_90", "sm_100"):
                found[f"{name}, {target}"] = facts(launch, TARGETS[target])
    return found


def facts(launch: Launch, capability: tuple[int, int]) -> dict[str, Any]:
    """What one launch's kernel needs, and where it breaks the rules of dependent launches."""
    made = compiled(launch, capability)
    return {**asdict(made.usage), "hazards": hazards(made) if capability >= WITH_PDL else []}


def by_tma() -> Iterator[tuple[str, Launch]]:
    """Products as a GPU with a tensor memory accelerator makes them, in the likeliest tiles."""
    for M, N, K in ((128, 2304, 768), (128, 768, 3072), (1024, 3072, 768), (4096, 3072, 768)):
        config = linear_configs(M, N, K, 2, Chip(132, 232448), True, N < K, False)[0]
        x, weight, bias = (torch.randn(size).half() for size in ((M, K), (N, K), (N,)))
        with recorded_launches() as launches:
            products(x, weight, config, bias, "gelu")
        yield f"_linear_tma_kernel, {M}x{K} to {N}", launches[0]
    M, N, K = 4096, 768, 768
    config = linear_configs(M, N, K, 2, Chip(132, 232448), True, True, False, True)[0]
    x, weight, bias, residual = (torch.randn(size).half() for size in ((M, K), (N, K), (N,), (M, N)))
    with recorded_launches() as launches:
        products(x, weight, config, bias, residual=residual)
    yield f"_linear_tma_kernel, {M}x{K} to {N}, residual", launches[0]


if __name__ == "__main__":
    record = "--record" in sys.argv
    names = [name for name in sys.argv[1:] if name != "--record"]
    before = json.loads(RECORDED.read_text()) if names and record else {}
    rows = []
    for name, row in sorted({**before, **every(names)}.items()):
        used = {what: value for what, value in row.items() if what != "hazards" or not record}
        rows.append(f"{json.dumps(name)}: {json.dumps(used)}")
    text = "{\n" + ",\n".join(rows) + "\n}\n"
    if record:
        RECORDED.write_text(text)
    else:
        print(text)
