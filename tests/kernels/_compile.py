"""``python -m tests.kernels._compile``: kernels at real sizes, compiled for three GPUs without one.

Prints what ptxas made of each as JSON; with ``--record``, writes it to ``compiled.json``, with which the test
compares. A process of its own, because kernels that run in the interpreter cannot be compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

from bench.kernel_cases import cases
from bench.product_cases import products as product_cases
from graphopt.kernels._compile import compiled
from graphopt.kernels._linear_configs import Chip, linear_configs
from graphopt.kernels._linear_triton import products
from graphopt.kernels._triton import Launch, recorded_launches

RECORDED = Path(__file__).parent / "compiled.json"
TARGETS = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}


def every() -> dict[str, dict[str, int]]:
    """Usage by kernel, case and GPU; launches that come to the same code once."""
    found: dict[str, dict[str, int]] = {}
    with FakeTensorMode():
        for case in (*cases(), *product_cases()):
            args = case.make(torch.device("cpu"), torch.float16)
            with recorded_launches() as launches:
                case.face.launch(*args)
            for launch in launches:
                for target, capability in TARGETS.items():
                    found[f"{launch.kernel.__name__}, {case.shape}, {target}"] = asdict(
                        compiled(launch, capability)
                    )
    with FakeTensorMode():
        for name, launch in by_tma():
            for target in ("sm_90", "sm_100"):
                found[f"{name}, {target}"] = asdict(compiled(launch, TARGETS[target]))
    return found


def by_tma() -> Iterator[tuple[str, Launch]]:
    """Products as a GPU with a tensor memory accelerator makes them, in the likeliest tiles."""
    for M, N, K in ((128, 2304, 768), (128, 768, 3072), (1024, 768, 768), (4096, 3072, 768)):
        config = linear_configs(M, N, K, 2, Chip(132, 232448), True, N < K, False)[0]
        x, weight, bias = (torch.randn(size).half() for size in ((M, K), (N, K), (N,)))
        with recorded_launches() as launches:
            products(x, weight, config, bias, "gelu")
        yield f"_linear_tma_kernel, {M}x{K} to {N}", launches[0]


if __name__ == "__main__":
    usages = every()
    lines = (f"{json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(usages.items()))
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if "--record" in sys.argv:
        RECORDED.write_text(text)
    else:
        print(text)
