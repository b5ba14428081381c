from __future__ import annotations

from math import ceil, log2

import pytest

from graphopt.compiler.bisect import Answer, Found, bisect


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1000])
def test_every_culprit_is_found_in_log2_judgements(count: int) -> None:
    for culprit in {1, 2, count // 2 or 1, count}:
        asked: list[int] = []

        def judge(applied: int, culprit: int = culprit, asked: list[int] = asked) -> Answer:
            asked.append(applied)
            return "bad" if applied >= culprit else "good"

        if culprit <= count:
            assert bisect(count, judge).guilty == culprit
            assert len(asked) <= 2 + ceil(log2(count) if count > 1 else 0)


def test_what_is_known_is_not_asked_again() -> None:
    answers: dict[int, Answer] = {}
    bisect(64, lambda applied: "bad" if applied >= 20 else "good", answers)

    def never(applied: int) -> Answer:
        raise AssertionError(applied)

    assert bisect(64, never, answers).guilty == 20


def test_skipped_neighbours_are_walked_around() -> None:
    def judge(applied: int) -> Answer:
        return "skip" if applied in (4, 5) else "bad" if applied >= 7 else "good"

    assert bisect(8, judge).guilty == 7


def test_what_cannot_be_told() -> None:
    assert bisect(4, lambda applied: "good") == Found(4, None)
    assert bisect(4, lambda applied: "bad") == Found(None, 0)
    assert bisect(4, lambda applied: "skip") == Found(None, None)
    assert bisect(0, lambda applied: "good") == Found(0, None)
    ends: dict[int, Answer] = {0: "good", 4: "bad"}
    found = bisect(4, lambda applied: ends.get(applied, "skip"))
    assert (found, found.guilty) == (Found(0, 4), None)
