"""Why a model cannot be captured, in one message that names the user's own line."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from graphopt.capture.guards import in_words
from graphopt.capture.inputs import Leaf
from graphopt.errors import CaptureError

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def explain(name: str, error: Exception, tensors: Sequence[Leaf]) -> CaptureError:
    """What ``torch.export`` said first, and the user's own line that it stopped at.

    Args:
        name: of the model.
        error: what stopped it.
        tensors: the leaves that are tensors, as they were exported.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [f"{f.filename}:{f.lineno}" for f in frames if not f.filename.startswith(_NOT_THE_USERS)]
    text = in_words(str(error).strip(), tensors)
    own += [f"{file}:{line}" for file, line in _FRAME.findall(text) if not file.startswith(_NOT_THE_USERS)]
    hint = "make this line traceable (no branching on tensor values), or optimize the part around it"
    if "Constraint" in text or "constraint" in text:
        hint = "declare as dynamic only what the model lets vary"
    return CaptureError(
        f"{name} cannot be exported: {type(error).__name__}: {text.split(chr(10) * 2)[0]}",
        where=own[-1] if own else None,
        hint=hint,
    )
