"""The only guard around importing Triton, and what every launcher needs.

A kernel is written with ``jit`` and started with ``launch``, which adds programmatic dependent launch (PDL)
where the GPU has it: a kernel's programs start while those of the kernel before still run, and wait for them.
These rules keep that right; ``wait_for_all`` and ``wait_for_inputs`` are how a kernel obeys them, and
``tests/kernels/test_dependent_launch.py`` looks for each in the machine code:

- Every program waits, on whichever path it takes: none leaves early. The wait is for the end of the kernel
  before, and is no more than that. Only because that kernel waited as well does its end mean that all before
  it are done: their results can be seen, and what they read may be written, new tensors in old memory too.
- Nothing is written before the wait, partial sums included: the kernel before may still read that memory.
- What is read before the wait was written by no kernel in flight. A launcher names such tensors (``early``),
  and ``launch`` lets the kernel read them early only where each is one of the constants that an executor has
  vouched for (``prefetched_weights``): not a weight that another node computes, nor a contiguous copy that
  the launcher itself has just made. Bringing weights into L2 is not reading: L2 sees every later write.
- The wait stands in no loop. Triton's pipeliner moves the loads of a loop's first turns ahead of the loop,
  and so past a wait inside it.
- Memory is counted on by nobody before it is written: no counter or semaphore has to be zero at entry.
- A kernel that waits for another stream as well is launched without (``behind_edge``): its own wait would be
  for the kernel before it on its stream.
- TMA descriptors are passed by value. They hold an address, as a pointer does: in a CUDA graph that of its
  own memory, or of a constant, which both stay as long as the graph.

Its own dependents a kernel lets go at once, before it has read anything: they wait for its end, not for that
call. A kernel of ours may thus stand before any other: one that is started with PDL waits, ours by these
rules and NVIDIA's by its own, and one that is not is started when all before it is done.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.kernels._driver import prefer_shared_memory

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:  # macOS, Windows, a CPU build of torch
    triton = None
    tl = None
    libdevice = None

__all__ = [
    "INTERPRETED",
    "OLDEST",
    "WITH_PDL",
    "Edge",
    "Gpu",
    "Launch",
    "as_rows",
    "behind_edge",
    "capability",
    "compile_time",
    "constant",
    "dependence",
    "device_of",
    "jit",
    "last_contiguous",
    "launch",
    "launch_options",
    "libdevice",
    "prefetched_weights",
    "processors",
    "recorded_launches",
    "refuse",
    "stand_in",
    "standing_in_for",
    "tl",
    "triton",
    "version",
    "wait_for_all",
    "wait_for_inputs",
]

# With TRITON_INTERPRET=1, set before this import, kernels run in numpy on tensors of any device.
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
OLDEST = (8, 0)  # compute capability of the first GPU with bfloat16 and asynchronous copies
WITH_PDL = (9, 0)
_INTERPRETED = None if tl is None else tl.constexpr(INTERPRETED)  # as a kernel may read it

_recorded: ContextVar[list[Launch] | None] = ContextVar("graphopt_recorded_launches", default=None)
_constants: ContextVar[frozenset[int] | None] = ContextVar("graphopt_prefetched_weights", default=None)
_edge: ContextVar[Edge | None] = ContextVar("graphopt_edge_between_streams", default=None)


@dataclass(frozen=True)
class Gpu:
    """What a launcher asks of a GPU.

    Args:
        capability: compute capability, (9, 0) for an H100.
        processors: streaming multiprocessors.
        shared_memory: bytes of it that a program may have.
    """

    capability: tuple[int, int]
    processors: int
    shared_memory: int


_H100 = Gpu((9, 0), 132, 227 * 1024)
_stand_in: ContextVar[Gpu | None] = ContextVar("graphopt_stand_in", default=None)


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``, or the function as it is where there is no Triton."""
    return function if triton is None else triton.jit(function)


def compile_time(function: Callable[..., Any]) -> Any:
    """Let kernels call a plain function of compile-time arguments; it runs while they are compiled."""
    return function if triton is None else triton.constexpr_function(function)


def constant(value: Any) -> Any:
    """A module's number, string or flag that kernels may read."""
    return value if triton is None else tl.constexpr(value)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as a test that compiles without a GPU needs it.

    Args:
        kernel: the kernel.
        grid: programs along each of up to three axes.
        args: runtime arguments, in the kernel's order; a tuple of tensors is one argument.
        constants: compile-time arguments by name, ``PDL`` excepted.
        num_warps: a program's warps, of 32 threads each.
        num_stages: of the software pipeline.
        early: those of the arguments that are read before the wait.
        registers: the most of a thread; None for what the compiler will have.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    early: tuple[torch.Tensor, ...] = ()
    registers: int | None = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    early: Any = (),  # Iterable[Tensor | None]; to mypy **options could be one
    num_warps: int = 4,
    num_stages: int = 2,
    registers: int | None = None,
    **constants: Any,
) -> None:
    """Start a kernel on the device of its first tensor; one without programs is not started.

    Args:
        kernel: made by ``jit``; takes the compile-time argument ``PDL`` last.
        grid: programs along each of up to three axes.
        args: runtime arguments, in the kernel's order.
        early: those that the kernel reads between ``wait_for_all`` and ``wait_for_inputs``.
        num_warps: a program's warps, of 32 threads each.
        num_stages: of the software pipeline.
        registers: the most of a thread; None for what the compiler will have.
        constants: compile-time arguments by name.
    """
    if 0 in grid:
        return
    read = tuple(x for x in early if x is not None)
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(Launch(kernel, grid, args, constants, num_warps, num_stages, read, registers))
        return
    device = device_of(args)
    pdl = dependence(device, read)
    options = launch_options(pdl, num_warps, num_stages, registers)
    here = device.type != "cuda" or device.index == torch.cuda.current_device()
    with contextlib.nullcontext() if here else torch.cuda.device(device):
        started = kernel[grid](*args, **constants, PDL=pdl, **options)
        if started is not None:  # nothing is compiled for the interpreter
            prefer_shared_memory(started.function)


def launch_options(pdl: int, num_warps: int, num_stages: int, registers: int | None = None) -> dict[str, Any]:
    """What the compiler is told of a launch beside its arguments and constants; ``PDL`` is one of these."""
    return {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "launch_pdl": pdl > 0,
        "enable_fp_fusion": True,
        **({} if registers is None else {"maxnreg": registers}),
    }


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect the launches made inside the block instead of making them."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


@contextlib.contextmanager
def standing_in_for(gpu: Gpu) -> Iterator[None]:
    """Let fake tensors on "cuda" be taken, inside the block, for tensors on a GPU like this.

    For launches that are recorded: refusals and configurations are then those of that GPU, none of them
    measured.
    """
    token = _stand_in.set(gpu)
    try:
        yield
    finally:
        _stand_in.reset(token)


@contextlib.contextmanager
def prefetched_weights(constants: Iterable[torch.Tensor]) -> Iterator[None]:
    """Let kernels launched inside the block read weights before the kernels ahead of them are done.

    Args:
        constants: what may be read so: no kernel in flight writes their memory, in a graph or ahead of it.
    """
    token = _constants.set(frozenset(_memory(x) for x in constants))
    try:
        yield
    finally:
        _constants.reset(token)


@dataclass
class Edge:
    """Whether a stream has come to wait for another one, and launched no kernel of ours since.

    Args:
        pending: it has; the next kernel is launched when all that it waits for is done.
    """

    pending: bool = False


@contextlib.contextmanager
def behind_edge(edge: Edge) -> Iterator[None]:
    """Let the first kernel inside the block be no dependent launch, where an edge is pending.

    A dependent launch is about the kernel before it on its own stream. The edge is settled by a kernel of
    ours only: whether a call of ATen launched one, nobody knows.
    """
    token = _edge.set(edge)
    try:
        yield
    finally:
        _edge.reset(token)


def dependence(device: torch.device, early: Iterable[torch.Tensor]) -> int:
    """How a kernel depends on those before it: the value of its ``PDL``.

    Args:
        device: that it runs on.
        early: what it would read before the wait.

    Returns:
        0 without programmatic dependent launch, 1 with it, 2 where it may read weights before it waits.
    """
    edge = _edge.get()
    if edge is not None and edge.pending:
        edge.pending = False
        return 0
    if INTERPRETED or capability(device) < WITH_PDL:
        return 0
    constants = _constants.get()
    return 2 if constants is not None and all(_memory(x) in constants for x in early) else 1


def _memory(x: torch.Tensor) -> int:
    """The address of what a tensor is a view of."""
    return x.untyped_storage().data_ptr()


def refuse(*tensors: torch.Tensor | None) -> str | None:
    """Why no Triton kernel can take these tensors, or None. None among them is passed over.

    Wants them on one GPU of sm_80 or later (anywhere in the interpreter), and none of them float64, since
    kernels accumulate in float32. Fake tensors will do.
    """
    if triton is None:
        return "Triton is not installed"
    given = [x for x in tensors if x is not None]
    devices = sorted({str(x.device) for x in given})
    if len(devices) > 1:
        return f"the inputs are on {' and '.join(devices)}"
    if any(x.dtype == torch.float64 for x in given):
        return "an input is float64, and kernels accumulate in float32"
    if INTERPRETED:
        return None
    if given[0].device.type != "cuda":
        return f"the inputs are on {devices[0]}, not on a GPU"
    have = capability(given[0].device)
    return None if have >= OLDEST else f"the GPU is sm_{have[0]}{have[1]}, before sm_80"


def version() -> tuple[int, ...]:
    """The version of Triton, (3, 9); (0, 0) without it."""
    return (0, 0) if triton is None else tuple(map(int, triton.__version__.split(".")[:2]))


def stand_in() -> Gpu | None:
    """The GPU that the tensors of now stand for, if they do."""
    return _stand_in.get()


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU, (9, 0) for an H100; (0, 0) for what is none."""
    gpu = _stand_in.get()
    return _capability(device) if gpu is None else gpu.capability


def processors(device: torch.device) -> int:
    """The streaming multiprocessors of a GPU; an H100's for what is none, so that tests launch as there."""
    gpu = _stand_in.get()
    return _processors(device) if gpu is None else gpu.processors


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; an H100's for what is no GPU."""
    gpu = _stand_in.get()
    return _shared_memory(device) if gpu is None else gpu.shared_memory


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _H100.processors
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@functools.cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return _H100.shared_memory
    index = torch.cuda.current_device() if device.index is None else device.index
    most: int = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return most


def last_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dimension lies together in memory, else a contiguous copy."""
    return x if x.dim() == 0 or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., D) as (rows, D) with the last dimension together in memory: a view where strides allow."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return last_contiguous(x).reshape(rows, x.shape[-1])


def device_of(args: tuple[Any, ...]) -> torch.device:
    """Where a launch with these arguments runs: with its first tensor, or what TMA sees of one."""
    for arg in args:
        tensor = getattr(arg, "base", arg)  # of a descriptor
        if isinstance(tensor, torch.Tensor):
            return tensor.device
        if isinstance(arg, tuple) and arg:
            return device_of(arg)
    raise TypeError("a kernel was given no tensor")


# What kernels call. PDL is 0 without programmatic dependent launch, 1 with it, 2 with weights read early.


@jit
def wait_for_all(PDL: tl.constexpr) -> None:
    """First in a kernel: nothing is read before this, unless weights may be."""
    if PDL == 1:
        tl.extra.cuda.gdc_wait()
    if PDL > 0:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def wait_for_inputs(PDL: tl.constexpr) -> None:
    """After the weights are read, and before anything else is read or written."""
    if PDL == 2:
        tl.extra.cuda.gdc_wait()


@jit
def dot(a, b, acc):  # type: ignore[no-untyped-def]
    """a @ b + acc, summed in float32, and of float32 not rounded to TF32; the interpreter has no bfloat16."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
