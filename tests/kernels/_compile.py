"""``python -m tests.kernels._compile``: kernels at real sizes, compiled for three GPUs without one.

Prints what ptxas made of each as JSON; with ``--record``, writes it to ``compiled.json``, with which the test
compares. A process of its own, because kernels that run in the interpreter cannot be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.kernel_cases import cases
from bench.product_cases import products as product_cases
from graphopt.kernels._linear_configs import Chip, linear_configs
from graphopt.kernels._linear_triton import products
from graphopt.kernels._triton import Launch, recorded_launches

RECORDED = Path(__file__).parent / "compiled.json"
TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def described(arg: Any, place: tuple[int, ...], attrs: dict, constants: dict) -> Any:
    """An argument's type as Triton writes it; what a launch specialises on goes to attrs and constants."""
    if isinstance(arg, tuple):
        return tuple(described(x, (*place, i), attrs, constants) for i, x in enumerate(arg))
    if isinstance(arg, torch.Tensor):
        attrs[place] = [["tt.divisibility", 16]]
        return POINTERS[arg.dtype]
    if isinstance(arg, TensorDescriptor):
        return f"tensordesc<{POINTERS[arg.base.dtype][1:]}{list(arg.block_shape)}>"
    if arg is None or (type(arg) is int and arg == 1):
        constants[place] = arg
        return "constexpr"
    if isinstance(arg, bool):
        return "u1"
    if isinstance(arg, int):
        if arg % 16 == 0:
            attrs[place] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= arg < 2**31 else "i64"
    assert isinstance(arg, float)
    return "fp32"


def compiled(launch: Launch, arch: int) -> dict[str, int]:
    """Compile one launch for a GPU, with early weights where the GPU can, and read what ptxas made of it."""
    attrs: dict[tuple[int, ...], Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    names = launch.kernel.arg_names
    given = dict(zip(names, launch.args, strict=False))
    signature = {name: described(arg, (names.index(name),), attrs, constants) for name, arg in given.items()}
    for name, value in {**launch.constants, "PDL": 2 if arch >= 90 else 0}.items():
        signature[name] = "constexpr"
        constants[(names.index(name),)] = value
    signature = {name: signature[name] for name in names}
    source = ASTSource(launch.kernel, signature, constants, attrs)
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "launch_pdl": arch >= 90,
        "enable_fp_fusion": True,
    }
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {"shared": binary.metadata.shared, "threads": 32 * launch.num_warps, **usage(binary.asm["cubin"])}


def usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of stack and local memory a thread, where spilled registers live."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True)
    found = USAGE.search(said.stdout + said.stderr)
    assert found is not None, said
    registers, stack, _, local = map(int, found.groups())
    return {"registers": registers, "stack": stack, "local": local}


def every() -> dict[str, dict[str, int]]:
    """Usage by kernel, case and GPU; launches that come to the same code once."""
    found: dict[str, dict[str, int]] = {}
    with FakeTensorMode():
        for case in (*cases(), *product_cases()):
            args = case.make(torch.device("cpu"), torch.float16)
            with recorded_launches() as launches:
                case.face.launch(*args)
            for launch in launches:
                for target, arch in TARGETS.items():
                    found[f"{launch.kernel.__name__}, {case.shape}, {target}"] = compiled(launch, arch)
    with FakeTensorMode():
        for name, launch in by_tma():
            for target in ("sm_90", "sm_100"):
                found[f"{name}, {target}"] = compiled(launch, TARGETS[target])
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
