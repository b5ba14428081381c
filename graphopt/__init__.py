"""graphopt: a compiler-style optimizer of PyTorch computation graphs, every rewrite verified or reverted.

The public names are in ``_face.py`` and are loaded when the first of them is used: importing them imports
PyTorch, and ``graphopt --help`` should not wait for that.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt._face import *  # noqa: F403

_SHADOWED = ("explain", "optimize")  # functions of the face that have the name of the module they are in


def __getattr__(name: str) -> Any:
    if not name.startswith("_") or name == "__all__":  # what tools ask every module for loads nothing
        face = importlib.import_module("graphopt._face")
        if name in ("__all__", *face.__all__):
            return globals().setdefault(name, getattr(face, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module("graphopt._face").__all__})


class _Package(ModuleType):
    """The package; importing ``graphopt.optimize`` does not put the module in the function's place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _SHADOWED and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
