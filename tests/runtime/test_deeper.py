"""What takes minutes to compile is compiled where a quicker way to the same has come near the fastest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphopt.capture.export import capture
from graphopt.compiler.device import GPUS
from graphopt.compiler.reference import output_reference
from graphopt.compiler.remarks import Remarks
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.ir.graph import Graph
from graphopt.kernels._triton import Gpu, standing_in_for
from graphopt.runtime import candidates as module
from graphopt.runtime import target, ways
from graphopt.runtime.candidates import Candidate, Choice, choose
from graphopt.runtime.executors import EXECUTORS
from graphopt.runtime.measure import Timing
from graphopt.runtime.partition import partition
from graphopt.runtime.target import Target
from tests._models import MLP, randn, randomised

X = randn(4, 8)
HOST = Target(torch.device("cpu"))


@pytest.fixture
def graph() -> Graph:
    return capture(randomised(MLP()), (X,))


def candidate(name: str, graph: Graph, deeper: Callable[[], Candidate] | None = None) -> Candidate:
    plan = partition(graph, [EXECUTORS["eager"]], HOST, Remarks(), "fast")
    return Candidate(name, graph, plan, deeper=deeper)


def chosen(
    given: list[Candidate], ms: dict[str, float], monkeypatch: pytest.MonkeyPatch, remarks: Remarks
) -> Choice:
    """What is chosen where candidates take these times, in the order in which they come to be timed."""

    def timed(runs: list[Any], **_: Any) -> list[Timing]:
        return [Timing(time, time, time, 6) for time in list(ms.values())[: len(runs)]]

    monkeypatch.setattr(module, "interleaved", timed)
    reference = output_reference(given[0].graph, [X], MODEL_FLOOR_ULPS)
    return choose(given, [X], reference, HOST, remarks, [[X]])


def test_one_that_comes_near_is_compiled_for_longer_and_timed_with_all(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [candidate("own", graph), candidate("quick", graph, lambda: candidate("deep", graph))]
    choice = chosen(given, {"own": 1.0, "quick": 1.4, "deep": 0.8}, monkeypatch, Remarks())
    assert [each.name for each in choice.candidates] == ["own", "quick", "deep"]
    assert choice.best.name == "deep"


def test_a_hopeless_one_is_not_and_a_remark_says_so(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> Candidate:
        raise AssertionError("compiled in vain")

    remarks = Remarks()
    given = [candidate("own", graph), candidate("quick", graph, never)]
    choice = chosen(given, {"own": 1.0, "quick": 1.6}, monkeypatch, remarks)
    assert choice.best.name == "own"
    assert "quick is not tuned for longer: it takes 1.6 times as long as own" in [
        row.reason for row in remarks.rows
    ]


def test_the_fastest_itself_is_compiled_for_longer(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [candidate("own", graph), candidate("quick", graph, lambda: candidate("deep", graph))]
    assert chosen(given, {"own": 2.0, "quick": 1.0, "deep": 1.1}, monkeypatch, Remarks()).best.name == "quick"


def test_one_that_was_disturbed_is_judged_by_its_quick_calls(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings = [Timing(0.95, 1.0, 1.05, 6), Timing(0.7, 1.1, 1.5, 6)]
    monkeypatch.setattr(module, "interleaved", lambda runs, **_: timings)
    given = [candidate("steady", graph), candidate("disturbed", graph)]
    reference = output_reference(graph, [X], MODEL_FLOOR_ULPS)
    assert choose(given, [X], reference, HOST, Remarks(), [[X]]).best.name == "disturbed"


def test_one_that_is_wrong_then_is_dropped(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    other = capture(randomised(MLP(), seed=1), (X,))
    given = [candidate("own", graph), candidate("quick", graph, lambda: candidate("deep", other))]
    choice = chosen(given, {"own": 1.0, "quick": 1.1, "deep": 0.1}, monkeypatch, Remarks())
    deep = choice.candidates[-1]
    assert (deep.name, deep.plan, choice.best.name) == ("deep", None, "own")
    assert deep.reason


@pytest.mark.parametrize("narrow", [False, True])
def test_on_a_gpu_inductor_searches_for_kernels_only_then(
    graph: Graph, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    efforts = []

    def compiled(*given: Any) -> Any:
        efforts.append(given[-1])
        return None

    monkeypatch.setattr(target, "device_limits", lambda device: GPUS["h100"])
    monkeypatch.setattr(ways, "partition", compiled)
    monkeypatch.setattr(ways, "_compiled", lambda name, *given: Candidate(name, graph, compiled(*given)))
    gpu = Target(torch.device("cuda:0"))
    with standing_in_for(Gpu((9, 0), 132, 232448)):
        if narrow:
            found = ways.narrowed_candidates(graph, "bf16", lambda: None, None, gpu, Remarks())
        else:
            found = ways.plan_candidates(graph, graph, None, gpu, Remarks())
        (inductor,) = [each for each in found if each.name.startswith("inductor")]
        assert efforts[found.index(inductor)] == "fast"
        assert efforts[0] == "measured"
        assert inductor.deeper is not None
        assert inductor.deeper().name == (
            "inductor, max-autotune (bf16)" if narrow else "inductor (max-autotune)"
        )
    assert efforts[-1] == "measured"
