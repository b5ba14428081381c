from __future__ import annotations

import os
from pathlib import Path

import pytest

from graphopt.errors import OutputError
from graphopt.observe.files import write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_text(path, "one")
    write_text(str(path), "zwei ü\n")
    assert path.read_bytes() == "zwei ü\n".encode()
    assert names(tmp_path) == ["report.json"]


def test_a_failure_keeps_what_was_there_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(self: Path, *args: object, **kwargs: object) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left on device") as caught:
        write_text(path, "new")
    assert caught.value.where == str(path)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.json"]


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        write_text(tmp_path / "missing" / "report.json", "x")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        write_text(tmp_path / "file" / "report.json", "x")
    with pytest.raises(OutputError, match="is a folder"):
        write_text(tmp_path, "x")
    assert names(tmp_path) == ["file"]


def test_a_link_stays_and_a_pipe_is_written_through(tmp_path: Path) -> None:
    link, target, pipe = tmp_path / "link", tmp_path / "target", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()
