"""Cutting: few regions, in an order that runs, every node once, and nothing pulled that does not pay."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.capture.export import capture
from graphopt.ir.graph import is_symbolic
from graphopt.runtime.regions import Unit, cheapest, take_turns, units_of

OWNERS = ("ort", "eager", "inductor")


def units_from(needs: Sequence[Sequence[int]]) -> list[Unit]:
    return [Unit((), frozenset(sources)) for sources in needs]


@st.composite
def graphs(draw: st.DrawFn, most: int = 25, owners: int = 3) -> tuple[list[Unit], list[str]]:
    """Units that need any of those before them, each with an owner."""
    count = draw(st.integers(0, most))
    needs = [
        draw(st.sets(st.integers(0, index - 1), max_size=3)) if index else set() for index in range(count)
    ]
    return units_from([sorted(row) for row in needs]), [
        draw(st.sampled_from(OWNERS[:owners])) for _ in range(count)
    ]


def fewest(units: Sequence[Unit], owner: Sequence[str]) -> int:
    """The fewest groups of any order, by trying every sequence of turns."""
    if not units:
        return 0
    states = {frozenset[int]()}
    for count in itertools.count(1):
        reached = set()
        for done, name in itertools.product(states, sorted(set(owner))):
            now = set(done)
            for index, unit in enumerate(units):
                if owner[index] == name and unit.needs <= now:
                    now.add(index)
            reached.add(frozenset(now))
        if any(len(done) == len(units) for done in reached):
            return count
        states = reached
    raise AssertionError


@given(graphs())
def test_every_unit_runs_once_and_after_what_it_needs(drawn: tuple[list[Unit], list[str]]) -> None:
    units, owner = drawn
    done: set[int] = set()
    for name, members in take_turns(units, owner):
        assert members == sorted(members)
        for index in members:
            assert owner[index] == name and index not in done
            assert units[index].needs <= done | {other for other in members if other < index}
            done.add(index)
    assert done == set(range(len(units)))


@given(graphs(owners=2))
def test_with_two_owners_no_order_has_fewer_groups(drawn: tuple[list[Unit], list[str]]) -> None:
    units, owner = drawn
    assert len(take_turns(units, owner)) == fewest(units, owner)


@given(graphs(most=10))
def test_with_three_owners_few_groups_are_too_many(drawn: tuple[list[Unit], list[str]]) -> None:
    units, owner = drawn
    assert len(take_turns(units, owner)) <= fewest(units, owner) + 1


@given(graphs(most=8), st.lists(st.integers(1, 9), min_size=24, max_size=24), st.integers(0, 9))
def test_the_owners_are_the_cheapest_in_their_order(
    drawn: tuple[list[Unit], list[str]], costs: list[int], change: int
) -> None:
    units, owner = drawn
    able = [
        {name: float(costs[3 * index + place]) for place, name in enumerate(OWNERS) if name >= owner[index]}
        for index in range(len(units))
    ]

    def total(names: Sequence[str]) -> float:
        changes = sum(a != b for a, b in itertools.pairwise((None, *names)))
        return change * changes + sum(able[index][name] for index, name in enumerate(names))

    found = cheapest(range(len(units)), able, lambda place, name, before: float(change))
    best = min(total(names) for names in itertools.product(*able)) if units else 0.0
    assert total([found[index] for index in range(len(units))]) == pytest.approx(best)


def test_what_takes_a_result_apart_stays_with_the_call() -> None:
    class Parts(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = torch.split(x.sin(), 2)
            return left * right.reshape(x.shape[0] // 2, -1)

    graph = capture(Parts().eval(), (torch.randn(4, 6),))
    units = units_of(graph, is_symbolic)
    split = next(unit for unit in units if "split" in str(unit.nodes[0].target))
    assert len(split.nodes) == 3
    assert sorted(node for unit in units for node in unit.nodes) == graph.calls
    for index, unit in enumerate(units):
        assert all(source < index for source in unit.needs)
