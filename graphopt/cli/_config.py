"""``[tool.graphopt]`` of the nearest pyproject.toml: which passes run, and the gate's budgets."""

from __future__ import annotations

import difflib
import importlib
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import InputError, PassError, said


@dataclass(frozen=True)
class Passes:
    """Which passes run.

    Args:
        level: of optimization.
        enable: exact names of passes to run whatever their level.
        disable: exact names of passes to leave out.
    """

    level: int = 2
    enable: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()


def passes(
    level: int | None, enable: Sequence[str] | None, disable: Sequence[str] | None, start: Path | None = None
) -> Passes:
    """What the command line says about passes, and what pyproject.toml says where it is silent.

    ``enable`` and ``disable`` add to those of the file, and win where the two name the same pass. Modules
    named under ``passes`` are imported first, so that the passes which they register can be named.

    Args:
        level: of the command line; None where it is silent.
        enable: likewise.
        disable: likewise.
        start: the folder from which pyproject.toml is looked for upwards; the current one by default.

    Raises:
        InputError: the file cannot be read, or a setting is unknown or of the wrong type.
        PassError: a module of passes cannot be imported.
    """
    path, settings = _settings(start or Path.cwd())
    for name in settings.get("passes", []):
        _import(name, path)
    enable, disable = tuple(enable or ()), tuple(disable or ())
    return Passes(
        settings.get("level", 2) if level is None else level,
        (*(name for name in settings.get("enable", []) if name not in disable), *enable),
        (*(name for name in settings.get("disable", []) if name not in enable), *disable),
    )


def precision(given: str | None, start: Path | None = None) -> str:
    """The precision of the command line, or else of pyproject.toml, or else ``exact``.

    Raises:
        InputError: the file cannot be read.
    """
    _, settings = _settings(start or Path.cwd())
    return str(settings.get("precision", "exact")) if given is None else given


def check_settings(start: Path | None = None) -> tuple[str, dict[str, Any]]:
    """The table ``check`` with the gate's budgets, and where it stands; ``gate/budgets.py`` reads it.

    Raises:
        InputError: the file cannot be read.
    """
    path, settings = _settings(start or Path.cwd())
    return f"[tool.graphopt.check] of {path}", settings.get("check", {})


def _settings(start: Path) -> tuple[Path, dict[str, Any]]:
    for folder in (start, *start.parents):
        path = folder / "pyproject.toml"
        if path.is_file():
            try:
                found = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}).get("graphopt", {})
            except (OSError, ValueError) as error:
                raise InputError(f"pyproject.toml cannot be read: {error}", where=str(path)) from error
            _check(found, path)
            return path, found
    return start, {}


def _check(settings: Any, path: Path) -> None:
    where = f"[tool.graphopt] of {path}"
    if not isinstance(settings, dict):
        raise InputError("tool.graphopt is no table", where=where)
    for key, value in settings.items():
        if key not in _KNOWN:
            near = difflib.get_close_matches(key, _KNOWN, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the settings are: {', '.join(_KNOWN)}"
            raise InputError(f"the setting {key!r} is unknown", where=where, hint=hint)
        wanted, fits = _KNOWN[key]
        if not fits(value):
            raise InputError(f"{key} = {value!r} is not {wanted}", where=where)


def _is_level(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 3


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_KNOWN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "level": ("a number from 0 to 3", _is_level),
    "enable": ("a list of names of passes", _are_names),
    "disable": ("a list of names of passes", _are_names),
    "precision": ('a precision, such as "int8"', lambda value: isinstance(value, str)),
    "check": ("a table of budgets", lambda value: isinstance(value, dict)),
    "passes": ("a list of modules that register passes", _are_names),
}


def _import(name: str, path: Path) -> None:
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        importlib.import_module(name)
    except Exception as error:
        raise PassError(
            f"the passes of {name!r} cannot be imported: {said(error)}",
            where=f"[tool.graphopt] of {path}",
        ) from error
