"""The benchmark runner: what it claims of two sides must be so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import BertConfig, BertModel

import graphopt
from graphopt.bench import side
from graphopt.bench.case import run_case
from graphopt.bench.inputs import real_only
from graphopt.bench.peer import Mode, Peer, Problem, eager
from graphopt.bench.peers import PEERS, named
from graphopt.bench.setting import Case, Setting, command_of
from graphopt.errors import GraphoptError, InputError
from graphopt.runtime import rounds
from tests._clock import Clock

CPU = torch.device("cpu")


def tiny() -> tuple[torch.nn.Module, tuple[torch.Tensor], dict[str, torch.Tensor]]:
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).eval()
    return model, (torch.randn(4, 32),), {}


def bert() -> tuple[torch.nn.Module, tuple[torch.Tensor], dict[str, torch.Tensor]]:
    config = BertConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    ids = torch.randint(1, 50, (3, 12))
    return BertModel(config).eval(), (ids,), {"attention_mask": torch.ones_like(ids)}


def measure(case: Case, made: Any, against: tuple[str, ...], **options: Any) -> dict[str, Any]:
    return run_case(case, *made, Setting(against, rounds=4, threads=1), **options)


def peer(monkeypatch: pytest.MonkeyPatch, name: str, *modes: Mode) -> None:
    monkeypatch.setitem(PEERS, name, Peer(name, lambda problem: modes))


def slowed(clock: Clock, seconds: float) -> Callable[[Problem], Any]:
    def build(problem: Problem) -> Any:
        run = eager(problem.model, problem.args, problem.kwargs)
        return lambda: (clock.sleep(seconds), run())[1]

    return build


@pytest.mark.parametrize("make", [tiny, bert])
@pytest.mark.parametrize("name", ["eager", "onnxruntime", "graphopt-ort", "openvino"])
def test_peers_compute_what_the_model_computes(name: str, make: Any, tmp_path: Path) -> None:
    if reason := PEERS[name].absent(CPU):
        pytest.skip(f"{name}: {reason}")
    model, args, kwargs = make()
    problem = Problem(model, args, kwargs, CPU, tmp_path)
    modes = PEERS[name].modes(problem)
    more = {
        ("onnxruntime", bert): ["transformers optimizer"],
        ("graphopt-ort", tiny): ["export"],
        ("graphopt-ort", bert): ["export"],
    }
    assert [mode.name for mode in modes] == ["", *more.get((name, make), [])]
    with torch.no_grad():
        wanted = model.double()(*args, **kwargs) if make is bert else model.double()(args[0].double())
    model.float()
    for mode in modes:
        run = mode.build(problem)
        for _ in range(2):
            for got, want in zip(run(), wanted.values() if make is bert else [wanted], strict=True):
                assert float((got - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.slow
def test_inductors_modes_are_compiled_apart(tmp_path: Path) -> None:
    model, args, kwargs = tiny()
    problem = Problem(model, args, kwargs, CPU, tmp_path)
    counters = torch._dynamo.utils.counters["stats"]
    default, tuned = PEERS["inductor"].modes(problem)
    (alone,) = PEERS["inductor-max"].modes(problem)
    assert (default.name, tuned.name, alone.name) == ("default", "max-autotune", "max-autotune")
    runs, graphs = [], []
    for mode in (default, tuned):
        runs.append(mode.build(problem))
        graphs.append(counters["unique_graphs"])
    assert graphs[1] == graphs[0] + 1
    for run in runs * 2:
        torch.testing.assert_close(run()[0], model(*args).detach(), rtol=1e-4, atol=1e-5)
    assert counters["unique_graphs"] == graphs[1]  # no call compiles again


def test_a_row_holds_every_side_and_its_error() -> None:
    told: list[tuple[str, float]] = []
    case = Case("zoo:tiny", {"batch": 4})
    torch.set_num_threads(2)
    row = measure(case, tiny(), ("eager", "onnxruntime", "tensorrt"), tell=lambda *args: told.append(args))
    assert torch.get_num_threads() == 2
    assert [side["peer"] for side in row["sides"]] == ["graphopt", "eager", "onnxruntime"]
    for found in row["sides"]:
        assert 0 < found["error"] < 1e-6
        assert len(found["times_ms"]) == 8
        assert found["ms"]["lower"] <= found["ms"]["median"] <= found["ms"]["upper"]
    assert set(row["ratio"]) == {"eager", "onnxruntime"}
    assert row["noise"]["floor"] >= 0
    assert row["missing"]["tensorrt"]["reason"] == "needs a CUDA GPU"
    assert (row["rounds_done"], row["interrupted"], row["threads"]) == (4, False, 1)
    assert row["optimize"]["cold_s"] > 0 < row["optimize"]["warm_s"]
    assert row["optimize"]["weights_bytes"] == 4 * (32 * 64 + 64 + 64 * 8 + 8)
    assert row["inputs"] == ["float32 [4, 32]"]
    assert {"torch", "python"} <= row["versions"].keys()
    assert [done for _, done in told] == sorted(done for _, done in told)
    assert told[-1] == ("measure", 1.0)


def timed(clock: Clock, run: Callable[[], Any]) -> float:
    """Milliseconds that pass on a clock of which nothing but a nap knows."""
    start = clock.now
    run()
    return 1e3 * (clock.now - start)


def test_a_slower_peer_is_found_slower_and_its_faster_mode_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(side, "clock_of", lambda device, cold: lambda run: 1.0 + timed(clock, run))
    peer(monkeypatch, "sleepy", Mode("deep", slowed(clock, 0.03)), Mode("light", slowed(clock, 0.01)))
    row = measure(Case("zoo:tiny"), tiny(), ("sleepy",))
    assert row["ratio"]["sleepy"]["mode"] == "light"
    assert row["ratio"]["sleepy"]["ratio"] == pytest.approx(11.0)
    assert row["ratio"]["sleepy"]["verdict"] == "faster"
    assert [found["counts"] for found in row["sides"]] == [True, False, True]


def test_what_is_wrong_or_fails_is_marked_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(problem: Problem) -> Any:
        run = eager(problem.model, problem.args, problem.kwargs)
        return lambda: [out * 1.01 for out in run()]

    def broken(problem: Problem) -> Any:
        raise ValueError("no such kernel\nand more")

    def breaks(problem: Problem) -> Any:
        def run() -> Any:
            raise RuntimeError("out of memory")

        return run

    modes = [Mode(build.__name__, build) for build in (off, broken, breaks)]
    peer(monkeypatch, "bad", *modes, Mode("died", slowed(Clock(), 0)))
    row = measure(Case("zoo:tiny"), tiny(), ("bad", "eager"), crashed={"bad (died)": "the process died"})
    off_, broken_, breaks_, died = (found for found in row["sides"] if found["peer"] == "bad")
    assert off_["wrong"].startswith("error 1")
    assert broken_["failed"] == "ValueError: no such kernel"
    assert breaks_["failed"] == "RuntimeError: out of memory"
    assert died["failed"] == "the process died"
    assert not any("ms" in found for found in (off_, broken_, breaks_, died))
    assert set(row["ratio"]) == {"eager"}


def test_ragged_batches_state_their_fill() -> None:
    row = measure(Case("zoo:bert", lengths="real"), bert(), ("eager",))
    assert row["lengths"]["kind"] == "real"
    assert len(row["lengths"]["values"]) == 3
    assert row["lengths"]["fill"] == pytest.approx(sum(row["lengths"]["values"]) / 36, abs=1e-3)


@pytest.mark.parametrize(("lengths", "padding"), [(None, "keep"), ("real", "remove")])
def test_padding_is_removed_where_only_real_tokens_are_compared(
    lengths: str | None, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, optimize = [], graphopt.optimize

    def asking(*args: Any, **options: Any) -> Any:
        asked.append(options["padding"])
        return optimize(*args, **options)

    monkeypatch.setattr(graphopt, "optimize", asking)
    row = measure(Case("zoo:bert", lengths=lengths), bert(), ())
    assert asked == [padding, padding]  # cold and warm
    assert "wrong" not in row["sides"][0]


def tampered(where: Callable[[torch.Tensor], torch.Tensor]) -> Mode:
    """The model, but for tokens: of their outputs ``where`` (padded or real, by the mask) is doubled."""

    def build(problem: Problem) -> Any:
        run, real = (
            eager(problem.model, problem.args, problem.kwargs),
            problem.kwargs["attention_mask"].bool(),
        )

        def tampering() -> list[torch.Tensor]:
            tokens, pooled = run()
            return [torch.where(where(real)[..., None], 2 * tokens, tokens), pooled]

        return tampering

    return Mode("", build)


def test_in_a_ragged_batch_only_real_tokens_count(monkeypatch: pytest.MonkeyPatch) -> None:
    peer(monkeypatch, "packs", tampered(torch.logical_not))
    peer(monkeypatch, "errs", tampered(lambda real: real))
    row = measure(Case("zoo:bert", lengths="real"), bert(), ("packs", "errs"))
    packs, errs = row["sides"][1:]
    assert row["lengths"]["compared"] == "real tokens"
    assert "wrong" not in packs
    assert packs["error"] < 1e-5
    assert errs["wrong"].startswith("error ")
    assert "packs" in row["ratio"] and "errs" not in row["ratio"]
    full = measure(Case("zoo:bert"), bert(), ("packs",))
    assert "wrong" not in full["sides"][1]  # a full batch has no padding to tamper with


def test_padding_is_left_out_of_outputs_of_tokens_alone() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    before = [torch.ones(2, 3, 4), torch.ones(2, 3), torch.ones(2, 4, 3), torch.ones(2, 3, 2)]
    reference = Mock(before=before, float64=[value.double() for value in before])
    found = real_only([7 * value for value in before], reference, mask)
    padded = torch.ones(2, 3, 4)
    padded[0, :2], padded[1] = 7, 7
    assert torch.equal(found[0], padded)
    assert all(torch.equal(value, 7 * whole) for value, whole in zip(found[1:3], before[1:3], strict=True))
    assert real_only([torch.ones(2, 3, 4).half(), *before[1:]], reference, mask)[0].dtype == torch.float16


def test_a_long_call_is_announced_and_a_short_one_is_not() -> None:
    took = {"a": 2000.0, "b": 3.0}
    runs: dict[str, Any] = {key: (lambda key=key: key) for key in took}
    told: list[str] = []
    turns = side._Turns(runs, lambda run: took[run()], lambda what, done: told.append(what), 0.0, 1.0)
    for key in "abab":
        assert turns.clock(runs[key]) == took[key]
    turns.on_round(0.5)
    assert told == ["run a", "run b", "run a", "measure"]
    assert [side.side_of(what) for what in told] == ["a", "b", "a", ""]
    assert side.side_of("build graphopt (ort)") == side.side_of("optimize, cold") == ""
    assert side.side_of("run graphopt") == side.side_of(f"run {side.AGAIN}") == ""
    assert side.side_of("build graphopt-ort (export)") == "graphopt-ort (export)"


def test_another_dtype_is_judged_by_its_own_rounding() -> None:
    row = measure(Case("zoo:bert", dtype="bfloat16"), bert(), ("eager",))
    assert row["dtype"] == "bfloat16"
    assert not any("wrong" in found for found in row["sides"])
    assert 1e-4 < row["sides"][1]["error"] < 0.1


def test_an_exported_program_keeps_its_inputs() -> None:
    model, args, _ = tiny()
    program = torch.export.export(model, args)
    row = measure(Case("tiny.pt2"), (program, (), {}), ("eager",))
    assert row["inputs"] == ["float32 [4, 32]"]
    with pytest.raises(InputError, match="has its dtypes"):
        measure(Case("tiny.pt2", dtype="bfloat16"), (program, (), {}), ("eager",))


def test_an_interrupt_keeps_complete_rounds_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def after(calls: int) -> Callable[[Problem], Any]:
        def build(problem: Problem) -> Any:
            run, left = eager(problem.model, problem.args, problem.kwargs), iter(range(calls))

            def interrupted() -> Any:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return run()

            return interrupted

        return build

    # one call checks the side, a warm-up takes six, a round four
    peer(monkeypatch, "late", Mode("", after(1 + 6 + 3 * 4 + 2)))
    row = run_case(Case("zoo:tiny"), *tiny(), Setting(("late",), rounds=50))
    assert (row["interrupted"], row["rounds_done"]) == (True, 3)
    assert {len(found["times_ms"]) for found in row["sides"]} == {6}
    peer(monkeypatch, "early", Mode("", after(1 + 6 + 2 * 4)))
    with pytest.raises(KeyboardInterrupt):
        run_case(Case("zoo:tiny"), *tiny(), Setting(("early",), rounds=50))


def test_energy_is_counted_where_the_device_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.bench import case as module
    from graphopt.observe.energy import Counter

    ticks = iter(range(0, 1000, 7))
    monkeypatch.setattr(module, "counter", lambda device: Counter(lambda: next(ticks)))
    row = measure(Case("zoo:tiny"), tiny(), ("eager",))
    assert all(found["joules"] > 0 for found in row["sides"])


def test_the_command_says_all_that_matters() -> None:
    case = Case("zoo:bert", {"batch": 8, "seq": 64, "layers": 2}, "float16", "real", "cuda:1", seed=3)
    assert command_of(case, Setting(("inductor",), 12, 5.0, 2)) == (
        "graphopt bench zoo:bert --against inductor --batch 8 --seq 64 --set layers=2 --dtype float16"
        " --lengths real --device cuda:1 --seed 3 --rounds 12 --seconds 5 --threads 2"
    )
    assert command_of(Case("zoo:tiny"), Setting(limit=5.0)).endswith(" --limit 5")
    assert command_of(Case("zoo:tiny"), Setting(limit=None)).endswith(" --limit 0")


def test_cases_have_names_of_their_own() -> None:
    cases = [
        Case("a:b"),
        Case("a:b", {"batch": 1}),
        Case("a:b", {"batch": 8}),
        Case("a:b", {"batch": 8}, dtype="float16"),
        Case("a:b", {"batch": 8}, lengths="real"),
        Case("a:b", {"batch": 8}, device="cuda"),
    ]
    assert len({case.name for case in cases}) == len(cases)
    assert Case("a:b", label="Mine").name == "Mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no peer"),
        (" , ", "names no peer"),
        ("egaer", "eager"),
        ("inductr", "inductor"),
        ("xyz", "one of"),
    ],
)
def test_peers_are_named_exactly(text: str, words: str) -> None:
    with pytest.raises(GraphoptError, match=words):
        named(text)
    assert named("eager, openvino,eager") == ["eager", "openvino"]


def test_three_rounds_are_the_least_that_is_kept() -> None:
    assert side._MIN_CALLS == 2 * rounds._MIN_ROUNDS
