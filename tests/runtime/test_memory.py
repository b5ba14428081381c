"""The memory plan: lifetimes, views, what may be written in place, and offsets that never overlap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.capture.export import capture
from graphopt.ir.graph import Graph
from graphopt.runtime.arena import Planned, planned
from graphopt.runtime.memory import (
    Buffer,
    bind,
    bytes_of,
    lay_out,
    most_alive,
    possible_owners,
    values_of,
)

CALLS = 40


class Formula(torch.nn.Module):
    def __init__(self, formula: Callable[..., object]) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, x: torch.Tensor) -> object:
        return self.formula(x)


def graph_of(formula: Callable[..., object], x: torch.Tensor, *, dynamic: bool = False) -> Graph:
    return capture(Formula(formula).eval(), (x,), dynamic={"x": {0: "batch"}} if dynamic else None)


def planned_in(formula: Callable[..., object], x: torch.Tensor) -> dict[str, Planned]:
    return {value.node.name: value for value in planned(graph_of(formula, x))}


@st.composite
def buffers(draw: st.DrawFn) -> list[Buffer]:
    """Buffers of random sizes and lives, some of which take over the place of one that dies."""
    found: list[Buffer] = []
    heirs: set[str] = set()
    for index in range(draw(st.integers(0, 30))):
        first = draw(st.integers(0, CALLS))
        last = draw(st.integers(first, CALLS))
        size = draw(st.one_of(st.integers(0, 300), st.integers(0, 100_000)))
        dying = [b for b in found if b.first < first == b.last and b.bytes >= size and b.name not in heirs]
        above = draw(st.sampled_from([None, *dying]))
        if above is not None:
            heirs.add(above.name)
        found.append(Buffer(f"v{index}", size, first, last, "" if above is None else above.name))
    return found


def alive_together(one: Buffer, other: Buffer) -> bool:
    return one.first <= other.last and other.first <= one.last


@given(buffers(), st.sampled_from((1, 64, 256)))
def test_no_two_live_values_overlap(given_buffers: list[Buffer], alignment: int) -> None:
    layout = lay_out(given_buffers, alignment)
    for index, one in enumerate(given_buffers):
        start = layout.offsets[one.name]
        assert start >= 0 and start % alignment == 0
        assert start + one.bytes <= layout.bytes
        for other in given_buffers[index + 1 :]:
            if other.instead_of == one.name:
                assert layout.offsets[other.name] == start
            elif alive_together(one, other) and one.bytes and other.bytes:
                there = layout.offsets[other.name]
                assert start + one.bytes <= there or there + other.bytes <= start, (one, other)


@given(buffers())
def test_the_block_is_between_what_is_needed_and_the_sum(given_buffers: list[Buffer]) -> None:
    layout = lay_out(given_buffers)
    assert layout.needed <= layout.bytes <= layout.total
    assert layout.bytes <= 2 * layout.needed


@given(buffers())
def test_the_most_alive_is_that_of_some_moment(given_buffers: list[Buffer]) -> None:
    at = [sum(b.bytes for b in given_buffers if b.first <= place <= b.last) for place in range(CALLS + 1)]
    assert sum(b.bytes for b in most_alive(given_buffers)) == max(at)


@pytest.mark.parametrize(
    ("above", "heir"),
    [
        (None, Buffer("b", 8, 1, 2, "a")),
        (Buffer("a", 4, 0, 1), Buffer("b", 8, 1, 2, "a")),  # too small
        (Buffer("a", 8, 0, 2), Buffer("b", 8, 1, 2, "a")),  # it lives on
        (Buffer("a", 8, 1, 1), Buffer("b", 8, 1, 2, "a")),  # one call makes both
    ],
)
def test_what_cannot_be_taken_over_is_refused(above: Buffer | None, heir: Buffer) -> None:
    with pytest.raises(ValueError, match="b cannot take the place of a"):
        lay_out([heir] if above is None else [above, heir])


def test_a_place_is_taken_over_once() -> None:
    heirs = [Buffer("a", 8, 0, 1), Buffer("b", 8, 1, 2, "a"), Buffer("c", 8, 1, 2, "a")]
    with pytest.raises(ValueError, match="c cannot take the place of a"):
        lay_out(heirs)


X = torch.randn(4, 6)


def test_a_chain_of_pointwise_calls_is_one_place() -> None:
    found = planned_in(lambda x: torch.tanh(torch.exp(x.sin()) + 1.0).sum(0), X)
    names = [name for name in found if not found[name].instead_of]
    assert names == ["sin"]
    assert lay_out([value.buffer({}) for value in found.values()]).bytes == 128  # 96 bytes, aligned


@pytest.mark.parametrize(
    "formula",
    [
        lambda x: (x.sin().exp() + x.sin().cos()).tanh().sum(0),  # two of one input, one each
        lambda x: ((y := x.sin()).exp() + y).sum(0),  # the source is read again
        lambda x: ((y := x.sin()).exp() + y.t().reshape(4, 6)).sum(0),  # and through a view
        lambda x: ((y := x.sin()[:1]).exp() + y).sum(0),
        lambda x: (x.sin()[:1] * x.cos()).sum(0),  # broadcast: a part is read many times
        lambda x: torch.einsum("ij->ij", x.sin()).exp().sum(0),  # may be its input
    ],
)
def test_a_source_that_is_still_needed_is_not_written_over(formula: Callable[..., object]) -> None:
    graph = graph_of(formula, X)
    calls = graph.calls
    roots = possible_owners(calls)
    for value in planned(graph):
        if value.instead_of:
            later = calls[value.first + 1 :]
            read = {source.name for node in later for source in node.all_input_nodes}
            assert not [name for name in read if value.instead_of in roots.get(name, ())]


def test_a_view_keeps_what_it_looks_at_alive() -> None:
    def formula(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        view = y.view(6, 4)
        z = torch.exp(x)
        return (z.sum() + view).sum(0)

    found = planned_in(formula, X)
    assert found["sin"].last > found["exp"].first
    assert found["exp"].instead_of == ""


@pytest.mark.parametrize(
    "formula",
    [
        lambda x: x.sin(),
        lambda x: x.sin().view(-1),
        lambda x: torch.einsum("ij->ji", x.sin()),
        lambda x: (x.sin().t(), x.cos().sum()),
        lambda x: torch.split(x.sin(), 2)[0],
    ],
)
def test_what_is_returned_is_in_no_block(formula: Callable[..., object]) -> None:
    assert "sin" not in planned_in(formula, X)


def test_bytes_follow_the_sizes_of_a_call() -> None:
    graph = graph_of(lambda x: torch.cat([x, x]).sin().exp().sum(0), torch.randn(4, 6), dynamic=True)
    cat = next(value for value in planned(graph) if value.node.name == "cat")
    for batch in (1, 5, 100):
        sizes = bind(graph.placeholders, [(batch, 6)])
        assert cat.buffer(sizes).bytes == 2 * batch * 6 * 4


def test_a_size_that_depends_on_values_is_not_planned() -> None:
    graph = graph_of(lambda x: (x[x > 0].sin().exp() + 1.0).sum(), X)
    symbols = bind(graph.placeholders, [(4, 6)])
    sized = [bytes_of(node.meta["val"], symbols) for node in graph.calls if node.name in ("sin", "exp")]
    assert sized == [None, None]
    assert not {value.node.name for value in planned(graph)} & {"sin", "exp", "add"}


def test_the_values_of_two_graphs_live_on_across_the_border() -> None:
    graph = graph_of(lambda x: (x.sin() + x.cos()).exp(), X)
    spans = {value.name: (value.first, value.last) for value in values_of([graph])}
    assert spans == {"sin": (0, 2), "cos": (1, 2), "add": (2, 3), "exp": (3, 4)}
    assert values_of([]) == []
