"""Calls on streams: where it pays, who waits for whom, and what the simulation says."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest

from graphopt.runtime.scheduling.branches import HANDOVER_S, Arrangement, Call, arranged, chains, on_streams

US = 1e-6


def tower(name: str, length: int, us: float, share: float, source: str) -> list[Call]:
    calls, before = [], source
    for index in range(length):
        calls.append(Call(f"{name}{index}", us * US, share, (before,)))
        before = calls[-1].name
    return calls


def two_towers(us: float = 10.0, share: float = 0.3, length: int = 8) -> list[Call]:
    first = Call("first", us * US, share)
    towers = tower("a", length, us, share, "first"), tower("b", length, us, share, "first")
    ends = tuple(calls[-1].name for calls in towers)
    return [first, *towers[0], *towers[1], Call("last", us * US, share, ends)]


def test_small_towers_run_side_by_side() -> None:
    found = arranged(two_towers())
    assert found.streams == 2
    assert found.in_order == pytest.approx(18 * 10 * US)
    # the ends and one tower; the end follows the tower that began behind a handover
    assert found.seconds == pytest.approx(10 * 10 * US + HANDOVER_S)
    assert {found.stream[f"a{index}"] for index in range(8)} == {found.stream["first"]}
    assert {found.stream[f"b{index}"] for index in range(8)} == {1}
    waits = {name: awaited for name, awaited in found.waits.items() if awaited}
    assert waits == {"b0": ("first",), "last": ("a7",)}


def test_towers_that_each_fill_the_gpu_stay_in_order() -> None:
    assert arranged(two_towers(share=1.0)).streams == 1


def test_towers_that_fill_it_together_gain_what_is_left() -> None:
    found = arranged(two_towers(share=0.75))
    assert found.streams == 2
    side_by_side = 2 * 8 * 10 * 0.75  # both slow down to what is there
    assert found.seconds == pytest.approx((side_by_side + 20) * US, rel=0.05)


def test_branches_shorter_than_a_handover_stay_in_order() -> None:
    assert arranged(two_towers(us=0.5, length=2)).streams == 1


def test_a_small_branch_beside_a_long_one_is_not_worth_a_stream() -> None:
    calls = [*tower("a", 50, 10.0, 0.2, "b0")]
    assert arranged([Call("b0", 10 * US, 0.2), *calls, Call("c", 5 * US, 0.2, ("b0",))]).streams == 1


def test_a_chain_and_nothing_at_all_stay_in_order() -> None:
    assert arranged([Call("x", 10 * US, 0.1), *tower("a", 5, 10.0, 0.1, "x")]).streams == 1
    assert arranged([]).order == ()


def test_more_branches_have_more_streams() -> None:
    calls = [call for name in "abcde" for call in tower(name, 4, 20.0, 0.1, "x")]
    assert arranged([Call("x", US, 0.1), *calls]).streams == 4
    assert arranged([Call("x", US, 0.1), *calls], most=3).streams == 3


def test_views_go_with_what_they_are_of() -> None:
    calls = [
        Call("x", US, 0.1),
        Call("view", 0.0, 0.0, ("x",)),
        Call("y", US, 0.1, ("view",)),
        Call("part", 0.0, 0.0, ("y",)),
        Call("other", 0.0, 0.0, ("y",)),
        Call("left", US, 0.1, ("part",)),
        Call("right", US, 0.1, ("other", "part")),
        Call("size", 0.0, 0.0),
    ]
    assert chains(calls) == {
        **dict.fromkeys(("x", "view", "y", "part", "other"), "x"),
        "left": "left",
        "right": "right",
    }


def test_what_is_known_to_be_done_is_not_waited_for() -> None:
    """The second stream has waited for b, and so for a; the first for d, and so for c."""
    calls = [Call(name, US, 0.1, reads) for name, reads in (
        ("a", ()), ("b", ("a",)), ("c", ("b",)), ("d", ("a", "c")), ("e", ("c", "d", "b")),
    )]  # fmt: skip
    found = on_streams(calls, {"a": 0, "b": 0, "c": 1, "d": 1, "e": 0}, "abcde")
    assert found.waits == {"a": (), "b": (), "c": ("b",), "d": (), "e": ("d",)}
    assert found.knows["e"] == (4, 3)


@st.composite
def _calls(draw: st.DrawFn) -> list[Call]:
    calls: list[Call] = []
    for index in range(draw(st.integers(1, 14))):
        reads = draw(st.sets(st.sampled_from([call.name for call in calls]), max_size=3)) if calls else set()
        seconds = draw(st.sampled_from([0.0, 1e-6, 2e-5]))
        calls.append(Call(f"c{index}", seconds, draw(st.sampled_from([0.1, 0.5, 1.0])), tuple(sorted(reads))))
    return calls


def behind(found: Arrangement, calls: list[Call]) -> dict[str, set[str]]:
    """By call, all that the streams and the waits put ahead of it."""
    ahead: dict[str, set[str]] = {}
    last: dict[int, str] = {}
    for name in found.order:
        sources = [*found.waits[name], *([last[found.stream[name]]] if found.stream[name] in last else [])]
        ahead[name] = set(sources).union(*(ahead[source] for source in sources))
        last[found.stream[name]] = name
    return ahead


@hypothesis.given(_calls(), st.integers(2, 4))
def test_every_call_is_behind_what_it_reads(calls: list[Call], most: int) -> None:
    found = arranged(calls, most)
    assert sorted(found.order) == sorted(call.name for call in calls)
    assert found.seconds <= found.in_order + 1e-12
    ahead = behind(found, calls)
    for call in calls:
        assert ahead[call.name].issuperset(call.reads)
        for stream, place in enumerate(found.knows[call.name]):
            if stream != found.stream[call.name] and place >= 0:
                assert found.order[place] in ahead[call.name]


@hypothesis.given(_calls(), st.data())
def test_any_streams_have_the_waits_that_they_need(calls: list[Call], data: st.DataObject) -> None:
    stream = {call.name: data.draw(st.integers(0, 2)) for call in calls}
    found = on_streams(calls, stream, [call.name for call in calls])
    ahead = behind(found, calls)
    assert all(ahead[call.name].issuperset(call.reads) for call in calls)
    for name in found.order:  # and no wait is for what another one stands for
        for awaited in found.waits[name]:
            assert not any(awaited in ahead[other] for other in found.waits[name] if other != awaited)
    longest: dict[str, float] = {}
    for call in calls:
        longest[call.name] = call.seconds + max((longest[read] for read in call.reads), default=0.0)
    assert found.seconds >= max(longest.values()) - 1e-12
