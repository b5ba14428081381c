"""Where a node comes from: the user's source line, the module path, and the nodes it was made from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import fx

KEY = "provenance"
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Provenance:
    """One identity from source line to kernel.

    Args:
        file: the user's source file, the innermost frame outside PyTorch.
        line: its line, counted from 1.
        module: the dotted ``nn.Module`` path ("encoder.layer.0.attention"); "" is the model itself.
        module_type: the class of that module.
        origins: names of the captured nodes that this node was made from.
    """

    file: str | None = None
    line: int | None = None
    module: str = ""
    module_type: str = ""
    origins: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """``file:line``, or "" when unknown."""
        return f"{self.file}:{self.line}" if self.file else ""


def from_export(node: fx.Node) -> Provenance:
    """Read the provenance that ``torch.export`` recorded on a freshly captured node."""
    file, line = None, None
    for found in _FRAME.finditer(node.meta.get("stack_trace") or ""):
        if not found["file"].startswith(_TORCH):
            file, line = found["file"], int(found["line"])
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values()), ("", ""))
    return Provenance(file, line, path, getattr(kind, "__qualname__", str(kind)), (node.name,))


def of(node: fx.Node) -> Provenance:
    """The provenance of a node; an empty one for nodes that have none (placeholders, weights)."""
    found = node.meta.get(KEY)
    return found if isinstance(found, Provenance) else Provenance()


def merge(primary: fx.Node, nodes: Iterable[fx.Node]) -> Provenance:
    """The provenance of a node made from several: the place of the primary one, the origins of all.

    Args:
        primary: the node whose source line and module the new node inherits.
        nodes: every node that the new one replaces.
    """
    origins = dict.fromkeys(origin for node in nodes for origin in of(node).origins)
    return replace(of(primary), origins=tuple(origins))
