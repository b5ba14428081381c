"""Memory: accounted from lifetimes, and measured by PyTorch's allocator beside it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.capture.export import capture
from graphopt.observe import summary
from graphopt.observe.memory import account, allocated
from graphopt.runtime import arena

CPU = torch.device("cpu")


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([x @ self.weight] * 4)  # 4 x 8 x 8 floats beside 8 x 8
        return wide.reshape(4, 8, 8).sum(0)


class Wide(nn.Module):
    """A value of 4 MiB after the other, each but the last read by the next alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([x] * 64, -1)
        return torch.special.bessel_j0(torch.tanh(y).exp() * 0.5).sum(-1)


def test_memory_is_what_is_alive_at_once() -> None:
    found = account([capture(Chain().eval(), (torch.randn(8, 8),))])
    assert (found["weights"], found["folded"]) == (256, 0)
    assert found["activations"] == 5 * 256  # the product and the four copies; the view of them is no value
    assert found["peak"] == found["weights"] + found["activations"]
    assert found["largest"].startswith("aten.cat of float32 [32, 8] at ")


def test_a_graph_without_calls_takes_nothing() -> None:
    found = account([capture(nn.Identity().eval(), (torch.randn(8, 8),))])
    assert (found["activations"], found["largest"]) == (0, "")
    assert account([])["peak"] == 0


def test_what_is_allocated_is_what_is_held_at_once() -> None:
    def run() -> torch.Tensor:
        first = torch.zeros(2**20)
        second = first + 1.0
        del first
        return second[:10] + 1.0

    assert 8 * 2**20 <= allocated(run, CPU) <= 8 * 2**20 + 2**14


def test_nothing_is_measured_while_somebody_profiles() -> None:
    with torch.profiler.profile() as theirs:
        found = allocated(lambda: torch.zeros(2**20), CPU)
        torch.ones(3)
    assert found is None
    assert "aten::ones" in {event.name for event in theirs.events()}  # it goes on
    assert allocated(lambda: torch.zeros(2**20), CPU) >= 2**22


@pytest.mark.parametrize("planned", [False, True], ids=["allocated", "in one block"])
def test_the_estimate_is_what_is_measured(monkeypatch: pytest.MonkeyPatch, planned: bool) -> None:
    monkeypatch.setattr(arena, "_WORTH_PLANNING", 0 if planned else 2**60)
    x = torch.randn(2**8, 2**6)
    opt = graphopt.optimize(Wide().eval(), (x,), executors=("eager",), level=0, effort="fast")
    memory = opt.report.memory
    (row,) = opt.report.plan
    after = memory["after"]
    assert row["activation_bytes"] == after["activations"] == 2 * 2**22
    assert after["workspace"] == max(0, after["measured"] - after["activations"])
    if planned:  # each call writes over what it reads: one place does for all of them
        assert row["block_bytes"] == 2**22
        assert after["measured"] == pytest.approx(2**22, rel=0.01)
    else:
        assert "block_bytes" not in row
        assert after["measured"] == pytest.approx(after["activations"], rel=0.01)
    assert memory["before"]["measured"] is None  # it was no candidate
    assert memory["peak_rss"] > after["measured"]


def test_the_report_says_both_sides_in_words() -> None:
    opt = graphopt.optimize(Wide().eval(), (torch.randn(256, 64),), effort="fast")
    rows = {label: sizes for label, *sizes in summary.memory_rows(opt.report.memory)}
    assert rows["most activations at once, estimated"][0] == "8.0 MiB"
    assert rows["most that PyTorch allocated in a call"][0].endswith("MiB")
    assert "most activations at once, estimated" in str(opt.report)
    assert opt.report.to_dict()["memory"]["before"]["largest"]
