"""The benchmark runner: what it claims of two sides must be so."""

import pytest
import torch

from graphopt.bench.case import Setting, run_case
from graphopt.bench.peers import PEERS, tensors


def tiny() -> tuple[torch.nn.Module, tuple[torch.Tensor], dict[str, torch.Tensor]]:
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).eval()
    return model, (torch.randn(4, 32),), {}


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
