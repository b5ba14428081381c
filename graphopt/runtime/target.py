"""Where a model is optimized for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from graphopt.compiler.device import Limits, device_limits
from graphopt.errors import TargetError
from graphopt.runtime.ort_options import OrtOptions

_KNOWN = ("auto", "cpu", "cuda", "cuda:<index>")


@dataclass(frozen=True)
class Target:
    """A device to optimize for, and those that may help it.

        two = graphopt.Target(torch.device("cuda:0"), beside=(torch.device("cuda:1"),))
        graphopt.optimize(model, args, target=two)

    Args:
        device: the device that inputs, weights and outputs are on.
        ort: how the executors on ONNX Runtime open their sessions.
        beside: other devices, which may compute a part of the model where that is faster, copies included;
            they keep weights of their own for that part.

    Raises:
        TargetError: a device is named twice, or cannot run a part of a model.
    """

    device: torch.device
    ort: OrtOptions = field(default_factory=OrtOptions)
    beside: tuple[torch.device, ...] = ()

    def __post_init__(self) -> None:
        for device in self.beside and (self.device, *self.beside):
            if not isinstance(device, torch.device) or device.type not in ("cpu", "cuda"):
                raise TargetError(
                    f"{device!r} cannot run a part of a model", hint="beside=(torch.device('cuda:1'),)"
                )
            if device.type == "cuda" and device.index is None:
                raise TargetError(f"{device!r} does not say which GPU", hint="torch.device('cuda:1')")
        if len({self.device, *self.beside}) <= len(self.beside):
            named = ", ".join(map(str, (self.device, *self.beside)))
            raise TargetError(f"a device is named twice: {named}")

    @staticmethod
    def of(target: str | Target, home: torch.device) -> Target:
        """The target that a user names.

        Args:
            target: ``"auto"`` (where the model is), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or a Target.
            home: the device that the model is on.

        Raises:
            TargetError: the name is unknown, the device is not there, or the model is on another one.
        """
        if isinstance(target, Target):
            return target
        if target == "auto":
            return Target(home)
        try:
            device = torch.device(target)
        except (RuntimeError, TypeError):
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda"):
            raise TargetError(f"unknown target {target!r}", hint=f"one of: {', '.join(_KNOWN)}")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise TargetError(
                f"target {target!r} needs CUDA device {device.index or 0}; PyTorch sees {found} here",
                hint="target='cpu', or install a CUDA build of PyTorch on a machine with a GPU",
            )
        if device.type != home.type:
            raise TargetError(
                f"target {target!r}, but the model is on {home}", hint=f"move the model with .to({target!r})"
            )
        return Target(device if device.index is not None or device.type == "cpu" else home)

    @property
    def limits(self) -> Limits:
        """The device's ceilings."""
        return device_limits(self.device)

    def __str__(self) -> str:
        return str(self.device)
