"""Options that commands share, and how their values are read."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.errors import InputError

if TYPE_CHECKING:
    from graphopt.capture.inputs import Dynamic

Spec = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        show_default=False,
        help="The model: package.module:factory, a local Hugging Face directory, or a .pt2 file.",
    ),
]
Target = Annotated[
    str, typer.Option(help='Where it shall run: "auto" (where the model is), "cpu", "cuda:1".')
]
Executors = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,NAME", help="Use these only, in this order of preference, e.g. ort,eager. Not measured."
    ),
]
DynamicDims = Annotated[
    list[str] | None,
    typer.Option(
        "--dynamic",
        metavar="INPUT:DIM=NAME,...",
        help='Dimensions that vary: input_ids:0=batch,1=seq (repeatable), JSON, or "auto" to infer them.',
    ),
]
Level = Annotated[
    int | None,
    typer.Option(min=0, max=3, help="0 rewrites nothing, 2 is the default, 3 adds what is rarely worth it."),
]
Enable = Annotated[
    list[str] | None, typer.Option(metavar="PASS", help="Run this pass whatever its level. Repeatable.")
]
Disable = Annotated[list[str] | None, typer.Option(metavar="PASS", help="Leave this pass out. Repeatable.")]
Precision = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Also try bf16, fp16, fp8, int8, int8-static, int8-weights or int4. The default is exact.",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="package.module:function",
        help="Called without arguments: gives further inputs, on which int8-static observes its ranges.",
    ),
]
MaxLoss = Annotated[
    float | None,
    typer.Option(min=0.0, help="The most that lossy passes or a precision may lose (0.01 is 1 %)."),
]


class PaddingChoice(enum.StrEnum):
    """What outputs hold where the mask of attention pads."""

    keep = "keep"
    remove = "remove"


class EffortChoice(enum.StrEnum):
    """What decides between the ways to run the model."""

    measured = "measured"
    fast = "fast"


Padding = Annotated[
    PaddingChoice,
    typer.Option(help="Outputs at padded positions: the original's, or zeros, which are not computed."),
]
Effort = Annotated[
    EffortChoice, typer.Option(help="Time the ways to run it, or take the first that is right.")
]
Batch = Annotated[int, typer.Option(min=1, help="Batch size of made inputs (Hugging Face directories).")]
Seq = Annotated[int | None, typer.Option(min=1, help="Tokens of made inputs: 128, or the most there may be.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout, all else on stderr.")]
Outputs = Annotated[
    list[str] | None,
    typer.Option(
        "--outputs", metavar="NAME[=last]", help="Keep this output, or its last position. Repeatable."
    ),
]
Lock = Annotated[
    Path, typer.Option("--lock", metavar="FILE", help="The lock; one file may hold many models.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def executors(text: str | None) -> tuple[str, ...] | None:
    """The names in a comma list.

    Raises:
        InputError: it has none.
    """
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise InputError(
            "--executors names none", hint="a list such as --executors ort,eager, or leave it out"
        )
    return names


def outputs(texts: Sequence[str] | None) -> dict[str, str | None] | None:
    """Outputs as ``graphopt.optimize`` takes them: ``logits=last``, or a name alone for all of it."""
    if not texts:
        return None
    pairs = (text.partition("=") for text in texts)
    return {name.strip(): way.strip() or None for name, _, way in pairs}


def dynamic(texts: Sequence[str] | None) -> Dynamic:
    """Dynamic dimensions as ``graphopt.optimize`` takes them.

    Args:
        texts: ``input_ids:0=batch,1=seq``, a JSON object ``{"input_ids": {"0": "batch"}}``, or ``auto``.

    Raises:
        InputError: a text is none of these, or names a dimension twice.
    """
    if not texts:
        return None
    if list(texts) == ["auto"]:
        return True
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        for name, dims in (_from_json(text) if text.lstrip().startswith("{") else _from_pairs(text)).items():
            known = found.setdefault(name, {})
            if twice := known.keys() & dims.keys():
                raise _malformed(text, f"dimension {min(twice)} of {name!r} has two names")
            known.update(dims)
    return found


def _from_pairs(text: str) -> dict[str, dict[int, str]]:
    name, _, pairs = text.rpartition(":")
    dims: dict[int, str] = {}
    for pair in pairs.split(","):
        dim, _, label = (part.strip() for part in pair.partition("="))
        if not name or not dim.isdecimal() or not label or int(dim) in dims:
            raise _malformed(text, f"{pair!r} does not read as DIM=NAME" if name else "it names no input")
        dims[int(dim)] = label
    return {name.strip(): dims}


def _from_json(text: str) -> dict[str, dict[int, str]]:
    try:
        value: Any = json.loads(text)
        if not all(isinstance(dims, Mapping) for dims in value.values()):
            raise ValueError("each input needs an object of dimensions")
        return {name: {int(dim): str(label) for dim, label in dims.items()} for name, dims in value.items()}
    except ValueError as error:
        raise _malformed(text, str(error)) from error


def _malformed(text: str, why: str) -> InputError:
    return InputError(
        f"cannot read the dynamic dimensions: {why}",
        where=f"--dynamic {text}",
        hint="""--dynamic input_ids:0=batch,1=seq or --dynamic '{"input_ids": {"0": "batch", "1": "seq"}}'""",
    )
