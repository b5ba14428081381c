"""Kernels compiled for a GPU that need not be here, and what ptxas made of them.

Imports nothing of Triton until something is compiled: a CPU never comes here. Kernels that were made for
Triton's interpreter cannot be compiled, so neither can any in a process that has TRITON_INTERPRET set.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.kernels._triton import WITH_PDL, Launch, launch_options, triton

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float32: "*fp32",
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Usage:
    """What a kernel needs of a GPU.

    Args:
        shared: bytes of shared memory a program.
        threads: a program's.
        registers: a thread's.
        stack: bytes of stack a thread.
        local: bytes of local memory a thread, where spilled registers live.
    """

    shared: int
    threads: int
    registers: int
    stack: int
    local: int


@dataclass(frozen=True)
class Compiled:
    """A kernel in machine code.

    Args:
        usage: what it needs.
        ptx: the code before ptxas.
        cubin: the code behind it.
        early: numbers of the parameters in ``ptx`` that may be read before the kernel waits.
    """

    usage: Usage
    ptx: str
    cubin: bytes
    early: tuple[int, ...]

    def sass(self) -> str:
        """The machine code as text."""
        return _tool("-sass", self.cubin)


def compiled(launch: Launch, capability: tuple[int, int]) -> Compiled:
    """Compile the kernel of one launch, with early weights where the GPU can.

    Args:
        launch: as ``recorded_launches`` collects it; fake tensors will do.
        capability: of the GPU, (9, 0) for an H100.

    Raises:
        Exception: whatever Triton or ptxas says of a kernel that cannot be compiled.
    """
    from triton.backends.compiler import GPUTarget

    pdl = 2 if capability >= WITH_PDL else 0
    options = launch_options(pdl, launch.num_warps, launch.num_stages, launch.registers)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    binary = triton.compile(_source(launch, pdl), target=target, options=options)
    registers, stack, local = _usage(binary.asm["cubin"])
    usage = Usage(binary.metadata.shared, 32 * binary.metadata.num_warps, registers, stack, local)
    return Compiled(usage, binary.asm["ptx"], binary.asm["cubin"], _parameters(launch))


def _parameters(launch: Launch) -> tuple[int, ...]:
    """The places of what is read early among the parameters that are left: constants are none."""
    early = {id(x) for x in launch.early}
    left = [arg for arg in _flat(launch.args) if arg is not None and not (type(arg) is int and arg == 1)]
    return tuple(place for place, arg in enumerate(left) if id(arg) in early)


def _flat(args: tuple[Any, ...]) -> list[Any]:
    """One item for every parameter; a descriptor is its tensor, followed by sizes and strides."""
    flat: list[Any] = []
    for arg in args:
        if isinstance(arg, tuple):
            flat += _flat(arg)
        elif hasattr(arg, "block_shape"):
            flat += [arg.base, *(2 * len(arg.block_shape) * [0])]
        else:
            flat.append(arg)
    return flat


def _source(launch: Launch, pdl: int) -> Any:
    """The kernel, specialised as this launch would have it."""
    attrs: dict[tuple[int, ...], Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    names = launch.kernel.arg_names
    given = dict(zip(names, launch.args, strict=False))
    types = {name: _type(arg, (names.index(name),), attrs, constants) for name, arg in given.items()}
    for name, value in {**launch.constants, "PDL": pdl}.items():
        types[name] = "constexpr"
        constants[(names.index(name),)] = value
    return _language_of(launch.kernel)(launch.kernel, {name: types[name] for name in names}, constants, attrs)


def _language_of(kernel: Any) -> Any:
    """What Triton compiles a kernel from, by the language that it is written in."""
    from triton.compiler import ASTSource

    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _type(arg: Any, place: tuple[int, ...], attrs: dict[Any, Any], constants: dict[Any, Any]) -> Any:
    """An argument's type as Triton writes it; what a launch specialises on goes to attrs and constants."""
    if isinstance(arg, tuple):
        return tuple(_type(x, (*place, i), attrs, constants) for i, x in enumerate(arg))
    if isinstance(arg, torch.Tensor):
        attrs[place] = [["tt.divisibility", 16]]
        return _POINTERS[arg.dtype]
    if hasattr(arg, "block_shape"):  # of TMA; one of Gluon's says how a block lies in shared memory, too
        layout = f",{arg.layout!r}" if hasattr(arg, "layout") else ""
        return f"tensordesc<{_POINTERS[arg.base.dtype][1:]}{list(arg.block_shape)}{layout}>"
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


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """A thread's registers, and its bytes of stack and of local memory."""
    said = _tool("-res-usage", cubin)
    found = _USAGE.search(said)
    if found is None:
        raise RuntimeError(f"cuobjdump does not tell what a kernel uses: {said}")
    registers, stack, _, local = map(int, found.groups())
    return registers, stack, local


def _tool(option: str, cubin: bytes) -> str:
    """What cuobjdump says of machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True)
    return said.stdout + said.stderr
