"""Every architecture through the passes: what is there is found, nothing is reverted, outputs are right."""

from __future__ import annotations

import functools

import pytest

from bench.catalogue import COMPLETE, KINDS, PAGE, Row, cases, measure, page
from graphopt.observe.snapshot import versions


@functools.cache
def row_of(name: str, attention: str) -> Row:
    return measure(name, attention)


def lines(row: Row, kinds: tuple[str, ...]) -> str:
    """What is missing of some kinds: what was left where, and what the passes said about it."""
    short = [kind for kind in kinds if row.found[kind] < row.expected[kind]]
    return "".join(
        "\n".join([f"\n{KINDS[kind]}: {row.found[kind]} of {row.expected[kind]}", *row.missing[kind]])
        for kind in short
    )


EACH = pytest.mark.parametrize(("name", "attention"), list(cases()))


@EACH
def test_everything_is_found(name: str, attention: str) -> None:
    missing = lines(row_of(name, attention), COMPLETE)
    assert not missing, missing


@EACH
def test_no_more_is_counted_than_is_there(name: str, attention: str) -> None:
    row = row_of(name, attention)
    assert {kind for kind in KINDS if row.found[kind] > row.expected[kind]} == set()


@EACH
def test_nothing_is_reverted_and_the_outputs_are_right(name: str, attention: str) -> None:
    row = row_of(name, attention)
    assert not row.reverted, "\n".join(row.reverted)
    assert not row.wrong


def test_the_page_is_what_is_generated() -> None:
    said, here = PAGE.read_text(), versions()
    if any(f"{package} {here[package]}" not in said for package in ("torch", "transformers")):
        pytest.skip("graphs differ from version to version, and the page is of another")
    assert page([row_of(*case) for case in cases()]) == said, "run `python -m bench catalogue`"
