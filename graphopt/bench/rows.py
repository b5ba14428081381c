"""Rows on disk: JSON lines, appended whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from graphopt.errors import InputError, OutputError
from graphopt.observe.files import cannot_write, require_folder

FORMAT, SCHEMA = "graphopt-bench", 1
_KEYS = ("case", "sides", "ratio", "versions", "command")  # what every reader of a measured row relies on

Row = dict[str, Any]


def line(row: Row) -> str:
    """A row as its line."""
    return json.dumps(row, allow_nan=False) + "\n"


def require_appendable(path: Path) -> None:
    """Refuse a file that rows cannot be added to, before anything is measured.

    Raises:
        OutputError: the folder is missing, or the file is not writable, or it is one.
        InputError: the file holds something else than rows.
    """
    require_folder(path.absolute().parent)
    if path.is_dir():
        raise OutputError(f"{path} is a folder, not a file", hint=f"name a file in it: {path / 'rows.jsonl'}")
    existed = path.exists()
    if path.is_file():
        read(path)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666))
    except OSError as error:
        raise cannot_write(path, error) from error
    if not existed:
        path.unlink()


def append(path: Path, row: Row) -> None:
    """Add a row at the end of a file, in one write; what a full disk cuts short is taken back.

    Raises:
        OutputError: it cannot be written; the file is as it was.
    """
    text = line(row).encode()
    existed, file = path.exists(), -1
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(file).st_size
        try:
            if os.write(file, text) != len(text):
                raise OSError(28, "no space left: the row does not fit")
            if path.is_file():
                os.fsync(file)
        except OSError:
            if path.is_file():
                os.ftruncate(file, size)
            raise
    except OSError as error:
        if file >= 0 and not existed:
            path.unlink(missing_ok=True)
        raise cannot_write(path, error) from error
    finally:
        if file >= 0:
            os.close(file)


def read(path: Path) -> list[Row]:
    """The rows of a file, failed cases among them.

    Raises:
        InputError: it cannot be read, holds something else, or rows of a newer graphopt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InputError(f"{path} cannot be read: {reason}", hint="name a file that -o wrote") from error
    return [_row(text, f"{path}:{number}") for number, text in enumerate(lines, 1) if text.strip()]


def holds_rows(path: Path) -> bool:
    """True when a file begins with a row; others may lie beside it."""
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and first.get("format") == FORMAT


def read_all(paths: Iterable[Path]) -> list[Row]:
    """The rows of files, in order; of a case measured again on the same device only the last.

    Raises:
        InputError: a file cannot be read, or none holds a row.
    """
    newest: dict[tuple[str, str], Row] = {}
    names = list(map(str, paths))
    for name in names:
        for row in read(Path(name)):
            key = row["case"], row.get("device_name", "")
            newest.pop(key, None)
            newest[key] = row
    if not newest:
        raise InputError(
            f"no rows in {', '.join(names)}", hint="measure some: graphopt bench SPEC -o rows.jsonl"
        )
    return list(newest.values())


def _row(text: str, where: str) -> Row:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise InputError(
            "the line is no JSON",
            where=where,
            hint="remove it: it may be half of a row, or a conflict's mark",
        ) from error
    if not isinstance(row, dict) or row.get("format") != FORMAT:
        raise InputError(
            "the line is no row of graphopt bench", where=where, hint="name a file that -o wrote"
        )
    if row.get("schema") != SCHEMA:
        raise InputError(
            f"the row has schema {row.get('schema')}, this graphopt reads {SCHEMA}",
            where=where,
            hint="install the graphopt that wrote it, or measure again",
        )
    missing = [key for key in _KEYS if key not in row] if "failed" not in row else []
    if missing:
        raise InputError(f"the row has no {missing[0]!r}", where=where, hint="measure the case again")
    return row
