"""What can be made again: made at once, and after that by whoever needs it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from graphopt.runtime.executors._remade import Remade


def test_it_is_made_once_until_it_is_let_go_of() -> None:
    made: list[object] = []

    def make() -> object:
        made.append(object())
        return made[-1]

    value = Remade(make)
    assert len(made) == 1
    assert value.get() is value.get() is made[0]
    assert value.drop()
    assert not value.drop()
    assert len(made) == 1
    assert value.get() is made[1]


def test_of_many_who_need_it_one_makes_it() -> None:
    entered, made = threading.Event(), []

    def make() -> object:
        if made:
            entered.wait(0.2)  # the others have time to ask for it
        made.append(object())
        return made[-1]

    value = Remade(make)
    value.drop()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: value.get(), range(8)))
    assert len(made) == 2
    assert set(map(id, found)) == {id(made[1])}


def test_what_cannot_be_made_is_an_error_each_time() -> None:
    fails = [False]

    def make() -> int:
        if fails[0]:
            raise RuntimeError("no memory")
        return 1

    value = Remade(make)
    fails[0] = value.drop()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            value.get()
    fails[0] = False
    assert value.get() == 1
