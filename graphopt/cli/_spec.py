"""From a SPEC to a model: a factory, a Hugging Face directory, or an exported program."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from graphopt.errors import SpecError, said

_FACTORY = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*(\.[^\W\d]\w*)*)")
_FORMS = "package.module:factory, a local Hugging Face directory, or a .pt2 file"


@dataclass(frozen=True)
class Loaded:
    """What a SPEC leads to.

    Args:
        kind: ``factory``, ``huggingface`` or ``pt2``.
        model: the model.
        args: example positional inputs.
        kwargs: example keyword inputs.
        notes: what the user should know: random weights, made inputs.
    """

    kind: str
    model: torch.nn.Module | torch.export.ExportedProgram
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load(
    spec: str,
    *,
    batch: int = 1,
    seq: int | None = None,
    target: str = "auto",
    sizes: Mapping[str, int] | None = None,
) -> Loaded:
    """Load the model that a SPEC names. Nothing is ever downloaded.

    A factory is the user's own code and runs. So may a ``.pt2`` file, whose example inputs and constants
    PyTorch may read as pickles: load only what you trust.

    Args:
        spec: ``package.module:factory``, a local Hugging Face directory, or a ``.pt2`` file.
        batch: batch size of inputs that are made here (Hugging Face directories).
        seq: their number of tokens; None for 128, or as many as the model takes.
        target: a Hugging Face model is put on this device, when it is one.
        sizes: what a factory is called with, by the names of its parameters; of a Hugging Face directory's
            inputs ``batch`` and ``seq``, in place of the above.

    Raises:
        SpecError: it does not lead to a model.
    """
    path, sizes = Path(spec).expanduser(), dict(sizes or {})
    if spec.endswith(".pt2"):
        _refuse_sizes(f"{path.name}, an exported program with its inputs,", sizes)
        return _exported(path)
    if path.is_dir():
        from graphopt.cli import _huggingface

        batch, seq = sizes.pop("batch", batch), sizes.pop("seq", seq)
        _refuse_sizes(f"{path.name}, a Hugging Face directory,", sizes)
        model, inputs, notes = _huggingface.load(path, batch, seq, target)
        return Loaded("huggingface", model, (), inputs, notes)
    if found := _FACTORY.fullmatch(spec):
        return _made(spec, _find_factory(found["module"], found["name"], spec), sizes)
    what = "is a file that graphopt does not read" if path.exists() else "leads to no model"
    raise SpecError(f"SPEC {spec!r} {what}", hint=f"name {_FORMS}")


def _exported(path: Path) -> Loaded:
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.pt2")])
        hint = f"did you mean {near[0]}.pt2?" if near else "write it with torch.export.save(program, path)"
        raise SpecError(f"{path.name} does not exist", where=str(path.absolute()), hint=hint)
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise SpecError(
            f"{path.name} is not an exported program: {_first_line(error)}",
            where=str(path.absolute()),
            hint="write it again with torch.export.save(program, path), with this version of PyTorch",
        ) from error
    if program.example_inputs is None:
        raise SpecError(
            f"{path.name} carries no example inputs",
            where=str(path.absolute()),
            hint="write it again with torch.export.save(torch.export.export(model, args), path)",
        )
    return Loaded("pt2", program)


def named(spec: str) -> Any:
    """What ``package.module:name`` stands for.

    Raises:
        SpecError: it is not written like that, or there is nothing of that name.
    """
    found = _FACTORY.fullmatch(spec)
    if found is None:
        raise SpecError(f"{spec!r} names no function", hint="write it as package.module:function")
    return _find_factory(found["module"], found["name"], spec)


def calibration(spec: str | None) -> list[Any]:
    """The further inputs that a function gives, as ``graphopt.optimize`` takes them; none without one.

    Args:
        spec: ``package.module:function``, which is called without arguments.

    Raises:
        SpecError: there is no such function, or it fails.
    """
    if spec is None:
        return []
    function = named(spec)
    try:
        return list(function())
    except Exception as error:
        raise SpecError(
            f"{spec} gives no inputs: {said(error)}",
            where=f"--calibration {spec}",
            hint="it is called without arguments, and gives tuples of arguments, or mappings",
        ) from error


def _find_factory(module_name: str, name: str, spec: str) -> Any:
    found: Any = _import(module_name, spec)
    place = module_name
    for part in name.split("."):
        if not hasattr(found, part):
            names = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            near = difflib.get_close_matches(part, names, cutoff=0.5) or names[:5]
            separator = ":" if place == module_name else "."
            raise SpecError(
                f"{place} has no {part!r}",
                where=getattr(sys.modules[module_name], "__file__", None) or spec,
                hint=f"did you mean {', '.join(place + separator + n for n in near)}?" if near else None,
            )
        found, place = getattr(found, part), spec[: len(place) + 1 + len(part)]
    return found


def _import(name: str, spec: str) -> ModuleType:
    """Import a module, the current directory first, as ``python -m`` does."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise SpecError(
                f"no module named {error.name!r}",
                where=f"SPEC {spec}, looked for from {here}",
                hint="run from the folder that holds it, or install it",
            ) from error
        raise _user_error(f"{name} does not import", error, spec) from error
    except Exception as error:
        raise _user_error(f"{name} does not import", error, spec) from error


def _refuse_sizes(what: str, sizes: Mapping[str, int], where: str | None = None) -> None:
    if sizes:
        name = next(iter(sizes))
        hint = f"leave {name} out, or name package.module:factory, a function with a parameter {name}"
        raise SpecError(f"{what} takes no {name}", where=where, hint=hint)


def _made(spec: str, factory: Any, sizes: Mapping[str, int]) -> Loaded:
    """Call a factory with the sizes asked for, and see what it returns."""
    if isinstance(factory, torch.nn.Module) or not callable(factory):
        kind = type(factory).__name__
        raise SpecError(
            f"{spec} is a {kind}, not a callable that returns a model",
            hint="name a function without arguments that returns (model, args) or (model, args, kwargs)",
        )
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(factory).parameters
    except ValueError:  # a callable written in C tells no signature
        parameters = {}
    unknown = {name: size for name, size in sizes.items() if name not in parameters}
    _refuse_sizes(spec, unknown, _place(factory))
    needed = [name for name, p in parameters.items() if _is_needed(p) and name not in sizes]
    if needed:
        raise SpecError(
            f"{spec} takes arguments: {', '.join(needed)}",
            where=_place(factory),
            hint="name a callable without arguments",
        )
    try:
        made = factory(**sizes)
    except Exception as error:
        raise _user_error(f"{spec} raises", error, spec) from error
    match made:
        case (torch.nn.Module() as model, tuple() | list() as args):
            return Loaded("factory", model, tuple(args))
        case (torch.nn.Module() as model, tuple() | list() as args, Mapping() as kwargs):
            return Loaded("factory", model, tuple(args), kwargs)
        case torch.nn.Module():
            wrong = f"a {type(made).__name__} without example inputs"
        case tuple():
            wrong = f"({', '.join(type(part).__name__ for part in made)})"
        case _:
            wrong = type(made).__name__
    raise SpecError(
        f"{spec} returns {wrong}",
        where=_place(factory),
        hint="return (model, args) or (model, args, kwargs): a torch.nn.Module, a tuple, a dict",
    )


def _is_needed(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and not variadic


def _place(factory: Any) -> str | None:
    code = getattr(factory, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else None


def _user_error(what: str, error: Exception, spec: str) -> SpecError:
    """An error of the user's own code, at the user's own line."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = (
        str(Path(__file__).parent),
        str(Path(importlib.__file__).parent),
        "<frozen",
        str(Path(torch.__file__).parent),
    )
    own = [frame for frame in frames if not frame.filename.startswith(outside)]
    where = f"{own[-1].filename}:{own[-1].lineno}" if own else f"SPEC {spec}"
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    return SpecError(
        f"{what}: {type(error).__name__}: {_first_line(error)}",
        where=where,
        hint="mend it, or see the whole traceback with --debug",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
