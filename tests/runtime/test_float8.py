"""A graph in float8 on its way to the cuda executor: what may run its nodes, and what is wrong of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from graphopt.compiler.device import GPUS
from graphopt.compiler.evaluate import outputs
from graphopt.compiler.remarks import Remarks
from graphopt.ir.graph import Graph, is_getitem
from graphopt.kernels import _triton
from graphopt.kernels._triton import Gpu, standing_in_for
from graphopt.passes import quantize_linear_fp8
from graphopt.runtime import choosing, target, ways
from graphopt.runtime.choosing import Choosing, Decision
from graphopt.runtime.implementations import Implementation
from graphopt.runtime.joining import joined
from graphopt.runtime.target import Target
from tests._models import randn
from tests.passes._harness import program
from tests.passes._lossy import lossy

X = randn(3, 5, 64).half()


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Graph:
    monkeypatch.setattr(quantize_linear_fp8, "quantizing_us", lambda *_: -1.0)
    model = program(lambda m, x: m.layer(x), layer=nn.Linear(64, 80)).half()
    with standing_in_for(Gpu((9, 0), 132, 232448)):
        return joined(lossy(quantize_linear_fp8.PASS, model, X))


def decided(graph: Graph) -> dict[str, Decision]:
    """Run a graph node by node, deciding for every call."""
    choose = Choosing(graph, timed=False)
    values: dict[fx.Node, Any] = {graph.placeholders[0]: X}
    for node in graph.calls:
        args = fx.map_arg(node.args, lambda n: values[n] if n in values else graph.constant(n))
        run: Callable[..., Any] = node.target if is_getitem(node) else choose.decide(node, args, {}).run
        values[node] = run(*args)
    return {decision.op: decision for decision in choose.decisions}


@pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")
def test_kernels_are_as_exact_as_the_reference(graph: Graph) -> None:
    found = decided(graph)
    assert {op: decision.chosen.name for op, decision in found.items()} == {
        "graphopt.quantize_rows": "triton",
        "graphopt.float8_linear": "triton",
    }
    assert all(decision.refused == {} for decision in found.values())


@pytest.mark.parametrize("spoil", ["codes", "scale"])
def test_wrong_codes_and_scales_are_refused(
    graph: Graph, spoil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def implementations(op: Any, args: Any, kwargs: Any) -> Any:
        def wrong(*args: Any) -> Any:
            codes, scale = op(*args)
            if spoil == "scale":
                return codes, 1.01 * scale
            return (0.8 * codes.float()).to(codes.dtype), scale

        right = Implementation("aten", op)
        return [Implementation("wrong", wrong), right] if "rows" in str(op) else [right], {}

    monkeypatch.setattr(choosing, "implementations", implementations)
    decision = decided(graph)["graphopt.quantize_rows"]
    assert decision.chosen.name == "aten"
    assert "exceeds" in decision.refused["wrong"]


def test_inductor_is_not_asked_to_multiply_codes(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "device_limits", lambda device: GPUS["h100"])
    gpu, no_judge = Target(torch.device("cuda:0")), lambda: None
    with standing_in_for(Gpu((9, 0), 132, 232448)):
        found = ways.narrowed_candidates(graph, "fp8", no_judge, None, gpu, Remarks())
    assert [candidate.name for candidate in found] == ["cuda (fp8)", "eager (fp8)"]


def test_rounding_at_random_leaves_codes_as_they_are(graph: Graph) -> None:
    noisy = outputs(graph, [X], noise=torch.Generator().manual_seed(0))[0]
    plain = outputs(graph, [X])[0]
    assert 0 < (noisy - plain).abs().max() < 0.01 * plain.abs().max()
