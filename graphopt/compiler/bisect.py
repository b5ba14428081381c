"""Finding the guilty rewrite: a binary search over how many rewrites are applied."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Literal

Answer = Literal["good", "bad", "skip"]


@dataclass(frozen=True)
class Found:
    """The end of a search.

    Args:
        good: the most rewrites with which the judge says good; None when it never does.
        bad: the fewest rewrites with which it says bad; None when it never does.
    """

    good: int | None
    bad: int | None

    @property
    def guilty(self) -> int | None:
        """The rewrite that makes the difference, counted from 1; None when none was convicted."""
        sure = self.good is not None and self.bad is not None and self.bad - self.good == 1
        return self.bad if sure else None


def bisect(
    count: int, judge: Callable[[int], Answer], answers: MutableMapping[int, Answer] | None = None
) -> Found:
    """Find the first rewrite with which the judge says bad: two judgements for the ends and log2(count) more.

    Args:
        count: how many rewrites there are.
        judge: called with a number of rewrites to apply, 0 to ``count``; "skip" where it cannot tell.
        answers: what is known already, and takes what is learnt: a search that was cut off goes on with it.

    Returns:
        The two numbers between which the answer turns. They lie next to each other, unless the judge skipped
        everything between them, or both ends are good, or both are bad.
    """
    answers = {} if answers is None else answers

    def ask(applied: int) -> Answer:
        if applied not in answers:
            answers[applied] = judge(applied)
        return answers[applied]

    if ask(count) != "bad":
        return Found(count if answers[count] == "good" else None, None)
    if ask(0) != "good":
        return Found(None, 0 if answers[0] == "bad" else count)
    good, bad = 0, count
    while bad - good > 1:
        middle = (good + bad) // 2
        nearest = sorted(range(good + 1, bad), key=lambda applied: abs(applied - middle))
        turned = next((applied for applied in nearest if ask(applied) != "skip"), None)
        if turned is None:
            break
        if answers[turned] == "bad":
            bad = turned
        else:
            good = turned
    return Found(good, bad)
