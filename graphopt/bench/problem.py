"""From a case to the problem that every side is given: a model on its device, in its dtype, with inputs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from graphopt.bench.inputs import dtype_named, fill, moved, padded
from graphopt.bench.peer import Problem
from graphopt.errors import InputError
from graphopt.runtime.target import Target

Model = torch.nn.Module | torch.export.ExportedProgram


def pose(
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    device: str = "auto",
    dtype: str | None = None,
    lengths: str | None = None,
    seed: int = 0,
) -> tuple[Problem, dict[str, Any] | None]:
    """Cast and move a model with its inputs, and make the batch ragged.

    Args:
        model: as its SPEC makes it.
        args: its inputs.
        kwargs: its keyword inputs.
        device: where it shall be; "auto" leaves it.
        dtype: what its weights and floating inputs become; None leaves them.
        lengths: "real" or "uniform" for a ragged batch; None leaves it.
        seed: of the lengths.

    Returns:
        The problem, and what a row says of its lengths.

    Raises:
        InputError: the model cannot be cast, moved or padded.
        TargetError: the device is not there.
    """
    module: torch.nn.Module
    if isinstance(model, torch.export.ExportedProgram):
        if dtype is not None or lengths is not None:
            raise InputError(
                "a .pt2 file has its dtypes and inputs in it",
                where=f"--dtype {dtype}" if dtype else f"--lengths {lengths}",
                hint="export it again with others, or leave the option out",
            )
        module = model.module()
        args, kwargs = model.example_inputs or ((), {})
    else:
        module = model
    home = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    where = home if device == "auto" else device_named(device)
    if module is not model and where != home:
        raise InputError(f"a .pt2 file stays on its device, {home}", where=f"--device {device}")
    if module is model:
        wanted = dtype_named(dtype) if dtype is not None else None
        module = module.to(device=where, dtype=wanted)
        args, kwargs = moved((tuple(args), dict(kwargs)), where, wanted)
    ragged = None
    if lengths is not None:
        kwargs, values = padded(kwargs, lengths, seed)
        seq = kwargs["attention_mask"].shape[1]
        share = round(fill(values, seq), 3)
        ragged = {"kind": lengths, "fill": share, "values": values, "compared": "real tokens"}
    folder = Path(tempfile.mkdtemp(prefix="graphopt-bench-"))
    return Problem(module, tuple(args), kwargs, where, folder), ragged


def device_named(name: str) -> torch.device:
    """A device by name; of "auto" the CPU, which is always there.

    Raises:
        TargetError: it is unknown or not there.
    """
    if name == "auto":
        return torch.device("cpu")
    return Target.of(name, torch.device("cuda", 0) if name.startswith("cuda") else torch.device("cpu")).device


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A stream of the case's own on a GPU: the default one cannot be captured as a CUDA graph."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield
