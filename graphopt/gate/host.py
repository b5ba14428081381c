"""What a model's own forward asks of the host: copies between devices, and values that are waited for."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_TO_HOST = {"cpu", "numpy"}
_SYNCS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"}
_OUTSIDE = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class HostCalls(TorchFunctionMode):
    """Watches the tensor methods that a block calls, and keeps those that leave the device.

    On a GPU each of them stops the stream until the host has the value. They are told from the calls alone,
    so a machine without a GPU sees them, too.

    Attributes:
        copies: calls that move a tensor to the host or to another device, by method.
        syncs: calls that wait for a value, by method.
        places: the user's ``file:line`` of each, by method.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if isinstance(args[0] if args else None, torch.Tensor):
            if name in _TO_HOST or (name in ("to", "cuda") and _moves(name, args[0], args[1:], kwargs or {})):
                self._keep(self.copies, name)
            elif name in _SYNCS:
                self._keep(self.syncs, name)
        return func(*args, **(kwargs or {}))

    def _keep(self, kind: Counter[str], name: str) -> None:
        kind[f"Tensor.{name}"] += 1
        frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(_OUTSIDE)]
        if frames:
            self.places.setdefault(f"Tensor.{name}", []).append(f"{frames[-1].filename}:{frames[-1].lineno}")

    def to_dict(self) -> dict[str, Any]:
        """The calls as JSON-ready values."""
        return {
            "copies": dict(self.copies),
            "syncs": dict(self.syncs),
            "places": {name: sorted(set(places)) for name, places in self.places.items()},
        }


def _moves(name: str, tensor: torch.Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True for a move to another device, and to a host that is named: ``"cpu"`` is where the model runs here.

    ``x.to(y.device)`` moves nothing where both are on one device, whichever that is.
    """
    if name == "cuda":
        return not tensor.is_cuda
    here: str = tensor.device.type
    for given in (*args, kwargs.get("device")):
        if isinstance(given, str):
            named: str = torch.device(given).type
            return named == "cpu" or named != here
        if isinstance(given, torch.device | torch.Tensor):
            there: str = given.type if isinstance(given, torch.device) else given.device.type
            return there != here
    return False


def watch(run: Callable[[], object]) -> dict[str, Any]:
    """Run the original once, and tell what it asks of the host."""
    with torch.no_grad(), HostCalls() as calls:
        run()
    found: dict[str, Any] = calls.to_dict()
    return found
