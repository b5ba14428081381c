"""Files are written whole or not at all."""

from __future__ import annotations

import uuid
from pathlib import Path

from graphopt.errors import OutputError


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8 and put it in place in one step, what was there before replaced.

    The text goes to a hidden file next to the destination first, so a failure leaves neither half a file nor
    a lost one. A device or a pipe has nothing to replace and is written to as it is.

    Args:
        path: of the file; its folder must exist.
        text: what it will hold.

    Raises:
        OutputError: the folder is missing or cannot be written to, or the path is a folder.
    """
    place = require_place(path, "report")
    special = place.exists() and not place.is_file()
    draft = place if special else place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
    try:
        draft.write_text(text, encoding="utf-8", newline="\n")
        if not special:
            draft.replace(place)
    except OSError as error:
        raise cannot_write(place, error) from error
    finally:
        if not special:
            draft.unlink(missing_ok=True)


def require_place(path: str | Path, example: str) -> Path:
    """Refuse a place for a file that cannot be one; returns where it is, links followed.

    Args:
        path: of the file.
        example: a name that such a file may have.

    Raises:
        OutputError: the folder is missing, or the path is a folder.
    """
    place = Path(path).resolve()
    require_folder(place.parent)
    if place.is_dir():
        raise OutputError(f"{path} is a folder, not a file", hint=f"name a file in it: {place / example}")
    return place


def require_folder(folder: Path) -> None:
    """Refuse a place to write into that is not a folder.

    Raises:
        OutputError: it is not there, or is a file.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise OutputError(f"the folder {folder} {what}", hint="create it first, or name another place")


def cannot_write(place: Path, error: OSError) -> OutputError:
    """The error to raise when the system refuses to write."""
    return OutputError(
        f"cannot write {place.name}: {error.strerror or error}",
        where=str(place),
        hint="name a place that can be written to and has room",
    )
