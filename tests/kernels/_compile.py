"""``python -m tests.kernels._compile``: kernels at real sizes, compiled for three GPUs without one.

Prints what ptxas made of each as JSON; with ``--record``, writes it to ``compiled.json``, with which the test
compares. Names of kernels behind that are the only ones that are compiled, and recorded anew. A process of
its own, because kernels that run in the interpreter cannot be compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode

from bench.kernel_cases import cases
from bench.product_cases import products as product_cases
from graphopt.kernels import _float8_triton
from graphopt.kernels._compile import compiled
from graphopt.kernels._float8_configs import float8_configs
from graphopt.kernels._float8_triton import WITH_FLOAT8, float8_product
from graphopt.kernels._linear_configs import BY_CUBLAS, Chip, linear_configs
from graphopt.kernels._linear_triton import products
from graphopt.kernels._triton import WITH_PDL, Gpu, Launch, recorded_launches, standing_in_for
from graphopt.kernels._tuning import Config
from graphopt.kernels.quantize_rows import OP as QUANTIZE_ROWS
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
                    if multiplies_float8(launch) and capability < WITH_FLOAT8:
                        continue
                    found[f"{launch.kernel.__name__}, {case.shape}, {target}"] = facts(launch, capability)
    with FakeTensorMode():
        for name, launch in (*by_tma(), *float8_by_tma(), *losses_by_tma()):
            if only and launch.kernel.__name__ not in only:
                continue
            for target in ("sm_90", "sm_100"):
                found[f"{name}, {target}"] = facts(launch, TARGETS[target])
        for name, launch in with_roles():
            if not only or launch.kernel.__name__ in only:
                found[f"{name}, sm_90"] = facts(launch, TARGETS["sm_90"])
    return found


def multiplies_float8(launch: Launch) -> bool:
    """Whether a kernel takes or makes float8, for which older GPUs have no instructions."""
    given = (x for x in launch.args if isinstance(x, torch.Tensor))
    return any(x.dtype == torch.float8_e4m3fn for x in given)


def facts(launch: Launch, capability: tuple[int, int]) -> dict[str, Any]:
    """What one launch's kernel needs, and where it breaks the rules of dependent launches."""
    made = compiled(launch, capability)
    return {**asdict(made.usage), "hazards": hazards(made) if capability >= WITH_PDL else []}


def by_tma() -> Iterator[tuple[str, Launch]]:
    """Products as a GPU with a tensor memory accelerator makes them: the likeliest tiles, and tall ones."""
    for M, N, K in ((128, 2304, 768), (128, 768, 3072), (1024, 3072, 768), (4096, 3072, 768)):
        config = linear_configs(M, N, K, 2, Chip(132, 232448), True, N < K, False)[0]
        x, weight, bias = (torch.randn(size).half() for size in ((M, K), (N, K), (N,)))
        with recorded_launches() as launches:
            products(x, weight, config, bias, "gelu")
        yield f"_linear_tma_kernel, {M}x{K} to {N}", launches[0]
    M, N, K = 197, 3072, 768
    x, weight, bias = (torch.randn(size).half() for size in ((M, K), (N, K), (N,)))
    for config in linear_configs(M, N, K, 2, Chip(132, 232448), True, False, False):
        if config.tiles["BLOCK_M"] == 128:
            with recorded_launches() as launches:
                products(x, weight, config, bias, "gelu")
            tile = f"128x64x{config.tiles['BLOCK_K']}"
            yield f"_linear_tma_kernel, {M}x{K} to {N} by {tile}", launches[0]
    M, N, K = 4096, 768, 768
    config = linear_configs(M, N, K, 2, Chip(132, 232448), True, True, False, True)[0]
    x, weight, bias, residual = (torch.randn(size).half() for size in ((M, K), (N, K), (N,), (M, N)))
    with recorded_launches() as launches:
        products(x, weight, config, bias, residual=residual)
    yield f"_linear_tma_kernel, {M}x{K} to {N}, residual", launches[0]


def with_roles() -> Iterator[tuple[str, Launch]]:
    """Products whose warps have roles: the likeliest tiles, and with a residual."""
    chip = Chip(132, 232448, wgmma=True)
    for M, N, K in (
        (1024, 2304, 768),
        (1024, 3072, 768),
        (1024, 768, 3072),
        (12608, 3072, 768),
        (12608, 768, 3072),
    ):
        added = M > 4096 and N < K
        x, weight, bias = (torch.randn(size).half() for size in ((M, K), (N, K), (N,)))
        found = linear_configs(M, N, K, 2, chip, True, N < K, True, added)
        config = next(config for config in found if config != BY_CUBLAS)
        with recorded_launches() as launches:
            residual = torch.randn(M, N).half() if added else None
            products(x, weight, config, bias, "gelu" if N > K else "none", 1.0, residual)
        yield f"_linear_gluon_kernel, {M}x{K} to {N}{', residual' * added}", launches[0]


def float8_by_tma() -> Iterator[tuple[str, Launch]]:
    """Products of float8 rows likewise, in every tile that may be chosen."""
    for M, N, K in ((128, 768, 3072), (4096, 3072, 768)):
        x, weight = QUANTIZE_ROWS(torch.randn(M, K)), QUANTIZE_ROWS(torch.randn(N, K))
        args = *x, weight[0], weight[1].squeeze(1), torch.float16, torch.randn(N).half(), "gelu"
        for config in float8_configs(M, N, 2, Chip(132, 232448), True):
            if not config.tiles["TMA"]:
                continue
            with recorded_launches() as launches, forced(config):
                float8_product(*args)
            tiles = "x".join(str(config.tiles[f"BLOCK_{letter}"]) for letter in "MNK")
            yield f"_float8_tma_kernel, {M}x{K} to {N} by {tiles}, {config.num_stages} stages", launches[0]


def losses_by_tma() -> Iterator[tuple[str, Launch]]:
    """The losses among the cases, as such a GPU makes their logits."""
    for case in (case for case in product_cases() if case.kernel == "linear_cross_entropy"):
        args = case.make(torch.device("cuda"), torch.float16)
        with standing_in_for(Gpu((9, 0), 132, 232448)), recorded_launches() as launches:
            case.face.launch(*args)
        yield f"{launches[0].kernel.__name__}, {case.shape}", launches[0]


@contextmanager
def forced(config: Config) -> Iterator[None]:
    """Let float8 products be launched with this configuration inside the block."""
    with mock.patch.object(_float8_triton, "choose", return_value=config):
        yield


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
