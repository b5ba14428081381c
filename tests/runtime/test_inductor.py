"""The inductor executor, and when it is a candidate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphopt
from graphopt.compiler.device import Limits
from graphopt.errors import LoweringError
from graphopt.runtime import ways
from graphopt.runtime.executors import EXECUTORS
from graphopt.runtime.executors import inductor as module
from tests._models import MLP, bert, randn, randomised
from tests.runtime.test_executors import check

X = randn(4, 8)


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Inductor's place taken by the module as it is; what it was given is kept."""
    given: list[torch.fx.GraphModule] = []

    def compile_fx(plain: torch.fx.GraphModule, examples: Any, options: Any) -> Any:
        given.append(plain)
        return module._Compiled(plain, ())

    monkeypatch.setattr(module, "_compile_fx", compile_fx)
    return given


def test_a_model_runs_on_inductor_with_other_inputs_and_sizes(one_kernel_alone: None) -> None:
    model = randomised(MLP())
    opt = graphopt.optimize(model, (X,), executors=("inductor",), dynamic={"x": {0: "batch"}}, effort="fast")
    assert [row["executor"] for row in opt.report.plan] == ["inductor"]
    assert [row.op for row in opt.report.node_times] == ["inductor"]
    for batch in (4, 7, 2):
        check(model, opt, randn(batch, 8, seed=batch))


def test_it_sees_plain_aten(eager_compiler: list[torch.fx.GraphModule]) -> None:
    example = bert()
    opt = graphopt.optimize(example.model, (), example.kwargs, executors=("inductor",), effort="fast")
    assert any(op.startswith("graphopt.") for op in opt.report.ops_after)
    (plain,) = eager_compiler
    assert not [node for node in plain.graph.nodes if "graphopt::" in str(node.target)]


def test_no_compiler_is_a_reason_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def missing() -> str:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    model = randomised(MLP())
    with pytest.raises(LoweringError, match=r"No working C\+\+ compiler"):
        graphopt.optimize(model, (X,), executors=("inductor",), effort="fast")
    monkeypatch.setattr(ways, "_WORTH_COMPILING_MS", 0.0)
    opt = graphopt.optimize(model, (X,))
    row = next(row for row in opt.report.candidates if row.name == "inductor")
    assert not row.chosen
    assert "runs no part of it" in row.reason
    assert any("No working C++ compiler" in remark.reason for remark in opt.report.remarks)
    check(model, opt, X)


@pytest.mark.parametrize(
    ("flops_per_s", "effort", "tried"),
    [(1e12, "measured", False), (1e3, "measured", True), (1e3, "fast", False)],
)
def test_on_the_cpu_it_is_tried_where_a_call_takes_long(
    flops_per_s: float,
    effort: str,
    tried: bool,
    eager_compiler: list[torch.fx.GraphModule],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = Limits("slow", flops_per_s, 1e12)
    monkeypatch.setattr("graphopt.runtime.target.device_limits", lambda device: slow)
    opt = graphopt.optimize(randomised(MLP()), (X,), effort=effort)
    assert ("inductor" in {row.name for row in opt.report.candidates}) is tried


def test_complex_values_stay_outside() -> None:
    class Spectrum(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.fft(torch.tanh(x)).abs()

    with pytest.raises(LoweringError, match="no code for complex values"):
        graphopt.optimize(Spectrum().eval(), (X,), executors=("inductor",))


def test_it_is_known_by_name() -> None:
    assert EXECUTORS["inductor"].name == "inductor"
