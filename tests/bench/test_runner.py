"""The benchmark runner: what it claims of two sides must be so."""

import random
import time

import pytest
import torch

from graphopt.bench.case import Setting, run_case
from graphopt.bench.peers import PEERS, tensors
from graphopt.runtime.rounds import interleave, ratio


def tiny() -> tuple[torch.nn.Module, tuple[torch.Tensor], dict[str, torch.Tensor]]:
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).eval()
    return model, (torch.randn(4, 32),), {}


def test_a_side_that_sleeps_longer_is_found_slower() -> None:
    def sleeping(seconds: float) -> object:
        return lambda: time.sleep(seconds)

    times = interleave({"short": sleeping(0.002), "long": sleeping(0.006)}, rounds=8)  # type: ignore[dict-item]
    found = ratio(times["long"], times["short"])
    assert found["low"] <= found["ratio"] <= found["high"]
    assert found["low"] > 1.5


def test_equal_sides_have_an_interval_around_one() -> None:
    source = random.Random(1)
    rows = [[source.gauss(10, 1) for _ in range(200)] for _ in range(2)]
    found = ratio(*rows)
    assert found["low"] < 1 < found["high"]


def test_rounds_run_forwards_and_backwards() -> None:
    order: list[str] = []
    sides = {name: (lambda name=name: order.append(name) or []) for name in "abc"}
    interleave(sides, rounds=2)  # type: ignore[arg-type]
    assert "".join(order[9:]) == "abccba" * 2  # nine warm-up calls first


@pytest.mark.parametrize("peer", ["eager", "onnxruntime"])
def test_peers_compute_what_the_model_computes(peer: str) -> None:
    model, args, kwargs = tiny()
    (got,) = PEERS[peer](model, args, kwargs)()
    (want,) = tensors(model.double()(args[0].double()))
    assert float((got - want).detach().abs().max() / want.detach().abs().max()) < 1e-6


def test_a_row_holds_every_side_and_its_error() -> None:
    row = run_case("tiny", tiny, ["eager", "onnxruntime"], Setting(rounds=3))
    assert set(row["ms"]) == {"graphopt", "eager", "onnxruntime", "graphopt again"}
    assert row["wrong"] == []
    assert all(0 < error < 1e-6 for error in row["error"].values())
    assert row["optimize_peak_bytes"] >= 0


def test_a_wrong_peer_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: torch.nn.Module, args: tuple[torch.Tensor], kwargs: dict[str, torch.Tensor]) -> object:
        return lambda: [out * 1.01 for out in tensors(model(*args))]

    monkeypatch.setitem(PEERS, "wrong", wrong)
    row = run_case("tiny", tiny, ["wrong"], Setting(rounds=2))
    assert row["wrong"] == ["wrong"]
