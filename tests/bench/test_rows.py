"""Rows on disk: whole lines or none, and nothing but rows."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphopt.bench.rows import append, holds_rows, line, read, read_all, require_appendable
from graphopt.bench.setting import Case
from graphopt.errors import GraphoptError, InputError, OutputError
from tests.bench._rows import failing, row

ROW = row(Case("zoo:block", {"batch": 1}), 1.0, {"eager": 2.0})


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    failed = failing(Case("zoo:other"), "no such luck")
    append(path, ROW)
    append(path, failed)
    assert read(path) == [ROW, failed]
    assert path.read_text().count("\n") == 2


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file can grow over 3500 bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3500, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_leaves_whole_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert 3500 / 2 < len(line(ROW)) < 3500
    append(path, ROW)
    with pytest.raises(OutputError, match=r"cannot write rows\.jsonl"):
        append(path, ROW)
    assert read(path) == [ROW]


@pytest.mark.usefixtures("small_files")
def test_a_first_row_that_does_not_fit_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(OutputError, match=r"does not fit|File too large"):
        append(path, {**ROW, "case": "x" * 7000})
    assert not path.exists()


def test_a_device_that_takes_nothing() -> None:
    with pytest.raises(OutputError, match="cannot write full"):
        append(Path("/dev/full"), ROW)


def test_a_place_is_looked_at_before_the_work(tmp_path: Path) -> None:
    require_appendable(tmp_path / "new.jsonl")
    assert not (tmp_path / "new.jsonl").exists()
    append(tmp_path / "rows.jsonl", ROW)
    require_appendable(tmp_path / "rows.jsonl")
    (tmp_path / "notes.txt").write_text("milk, eggs\n")
    for place, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "missing" / "rows.jsonl", "does not exist"),
        (tmp_path / "rows.jsonl" / "rows.jsonl", "is a file"),
        (tmp_path / "notes.txt", "is no JSON"),
    ):
        with pytest.raises(GraphoptError, match=words):
            require_appendable(place)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (line(ROW)[:200], "no JSON"),
        ("<<<<<<< HEAD\n" + line(ROW), "no JSON"),
        ("[1]\n", "no row of graphopt bench"),
        ('{"format": "graphopt-lock"}\n', "no row of graphopt bench"),
        (line({**ROW, "schema": 99}), "schema 99"),
        (line({key: value for key, value in ROW.items() if key != "sides"}), "has no 'sides'"),
    ],
)
def test_what_is_no_row_is_named_by_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line(ROW) + text)
    with pytest.raises(InputError, match=words) as caught:
        read(path)
    assert caught.value.where == f"{path}:2"


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"\xff\xfe\x00")
    for name, words in (("missing.jsonl", "No such file"), ("weights", "not text"), (".", "directory")):
        with pytest.raises(InputError, match=words):
            read(tmp_path / name)


def test_of_a_case_measured_again_the_last_counts(tmp_path: Path) -> None:
    again = {**ROW, "date": "2027-01-01"}
    elsewhere = {**ROW, "device_name": "Other CPU"}
    for name, rows in (("a.jsonl", [ROW, elsewhere]), ("b.jsonl", [again])):
        (tmp_path / name).write_text("".join(map(line, rows)))
    assert read_all([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]) == [elsewhere, again]
    (tmp_path / "c.jsonl").touch()
    with pytest.raises(InputError, match=r"no rows in .*c\.jsonl"):
        read_all([tmp_path / "c.jsonl"])


def test_a_number_that_is_none_is_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        line({**ROW, "error": float("nan")})
    assert json.loads(line(ROW)) == ROW


def test_files_beside_the_rows_are_told_apart(tmp_path: Path) -> None:
    append(tmp_path / "rows.jsonl", ROW)
    (tmp_path / "time.jsonl").write_text('{"case": "llama-12"}\n')
    (tmp_path / "empty.jsonl").touch()
    assert [path.name for path in sorted(tmp_path.iterdir()) if holds_rows(path)] == ["rows.jsonl"]
