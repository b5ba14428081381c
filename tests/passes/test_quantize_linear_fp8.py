from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.capture.export import capture
from graphopt.compiler.lossy import relative_distance
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.kernels._triton import Gpu, standing_in_for
from graphopt.kernels.linear_activation import OP
from graphopt.passes import (
    fuse_add_layer_norm,
    fuse_linear_activation,
    merge_common_subexpressions,
    quantize_linear_fp8,
)
from graphopt.passes.quantize_linear_fp8 import PASS, quantized, quantizing_us, saved_us
from tests._models import randn
from tests.passes._harness import program, results, run, text
from tests.passes._lossy import lossy

X = randn(3, 5, 64).half()
H100, A100 = Gpu((9, 0), 132, 232448), Gpu((8, 0), 108, 166912)


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CPU stands in for an H100, and whatever a layer saves is worth it: these are tiny."""
    monkeypatch.setattr(quantize_linear_fp8, "quantizing_us", lambda *_: -1.0)
    with standing_in_for(H100):
        yield


def projection(**options: Any) -> nn.Module:
    return program(lambda m, x: m.layer(x), layer=nn.Linear(64, 80, **options)).half()


def refusal(graph: Graph) -> str | None:
    (match,) = PASS.matches(graph)
    return PASS.check(match)


def rewritten(graph: Graph) -> Graph:
    for match in list(PASS.matches(graph)):
        rewriter = Rewriter(match, PASS.name)
        PASS.rewrite(rewriter, match)
        rewriter.commit()
    graph.check()
    return graph


@pytest.mark.parametrize("bias", [True, False])
def test_a_projection(bias: bool) -> None:
    model = projection(bias=bias)
    graph = lossy(PASS, model, X)
    added = "layer.bias" if bias else "None"
    assert text(graph) == (
        "%0 = graphopt.quantize_rows(x)\n"
        "%1 = getitem(%0, 0)\n"
        "%2 = getitem(%0, 1)\n"
        "%3 = graphopt.float8_linear(%1, %2, <in float8: layer.weight>, <a scale a row: layer.weight>,"
        f" float16, {added})\n"
        "return %3"
    )
    assert list(PASS.matches(graph)) == []
    with torch.no_grad():
        assert 0.01 < relative_distance([model(X)], results(graph, [X])) < 0.05
    assert results(graph, [X])[0].dtype == torch.float16


def test_the_reference_in_float64_reads_the_codes() -> None:
    """What float8 took away is there in float64 too; what float16 rounds is not."""
    model = projection()
    graph = lossy(PASS, model, X)
    (narrow,), (wide,) = results(graph, [X]), results(graph, [X], float64=True)
    assert wide.dtype == torch.float64
    assert 0 < relative_distance([wide], [narrow]) < 1e-3
    with torch.no_grad():
        assert relative_distance([model(X)], [wide]) > 0.01


def test_an_activation_goes_along() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(m.layer(x))

    model = program(forward, layer=nn.Linear(64, 80)).half()
    graph = run(fuse_linear_activation.PASS, model, X).graph
    assert refusal(graph) is None
    assert text(rewritten(graph)).splitlines()[3].endswith("layer.bias, gelu, 1)")


def test_projections_in_a_row_and_of_one_value() -> None:
    """Each reads what the one before it became, and a value is quantized once for all who read it."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.first(x)
        return m.left(y) + m.right(y)

    layers = {"first": nn.Linear(64, 64), "left": nn.Linear(64, 32), "right": nn.Linear(64, 32)}
    model = program(forward, **layers).half()
    graph = rewritten(capture(model, (X,), {}))
    for match in merge_common_subexpressions.PASS.matches(graph):
        rewriter = Rewriter(match, "merge_common_subexpressions")
        merge_common_subexpressions.PASS.rewrite(rewriter, match)
        rewriter.commit()
    counts = graph.op_counts()
    assert (counts["graphopt.quantize_rows"], counts["graphopt.float8_linear"]) == (2, 3)
    with torch.no_grad():
        assert relative_distance([model(X)], results(graph, [X])) < 0.1


def test_dynamic_sizes() -> None:
    model = projection()
    graph = lossy(PASS, model, X, dynamic={"x": {0: "batch", 1: "seq"}})
    other = randn(2, 3, 64, seed=1).half()
    with torch.no_grad():
        assert relative_distance([model(other)], results(graph, [other])) < 0.05


def test_codes_and_scales() -> None:
    weight = randn(6, 64)
    weight[2] = 0
    weight[3] *= 1e-30
    codes, scale = quantized(weight)
    assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, (6, 64))
    assert (scale.dtype, scale.shape) == (torch.float32, (6,))
    assert not codes[2].float().any()
    assert codes.float().abs().amax(1).tolist() == [448, 448, 0, 448, 448, 448]
    found, exact = codes.double() * scale.double()[:, None], weight.double()
    off = (found - exact).abs()
    smallest = scale.double()[:, None] * 2**-10  # half of the step between the smallest numbers
    assert (off <= torch.maximum(exact.abs() * 2**-4, smallest) * (1 + 1e-6)).all()


def test_every_code_is_the_nearest_and_ties_go_to_the_even_one() -> None:
    """On float8's own numbers, the points half way between them, and the nearest float64 beside those."""
    bits = torch.arange(127, dtype=torch.uint8)
    grid = bits.view(torch.float8_e4m3fn).double()  # 0 to 448, ascending
    middle = (grid[1:] + grid[:-1]) / 2
    even = torch.where(bits[:-1] % 2 == 0, grid[:-1], grid[1:])
    up, down = (torch.nextafter(middle, torch.tensor(end)) for end in (1e9, 0.0))
    values = torch.cat([grid, middle, up, down])
    wanted = torch.cat([grid, even, grid[1:], grid[:-1]])
    weight = torch.stack([values, -values]).double()
    codes, scale = quantized(weight)
    assert scale.tolist() == [1.0, 1.0]
    assert torch.equal(codes.double(), torch.stack([wanted, -wanted]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m, None),
        (lambda m: m.float(), "the weight is torch.float32 of 2 dimensions, not of half precision and 2"),
        (lambda m: _with(m, torch.inf), "the weight is not finite"),
        (lambda m: _with(m, torch.nan), "the weight is not finite"),
    ],
)
def test_weights_that_are_refused(change: Any, reason: str | None) -> None:
    model = change(projection())
    assert refusal(capture(model, (X.to(model.layer.weight.dtype),), {})) == reason


def _with(model: nn.Module, number: float) -> nn.Module:
    with torch.no_grad():
        model.layer.weight[0, 0] = number
    return model


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 40), (40, 64)])
def test_sizes_of_no_multiple_are_refused(inputs: int, outputs: int) -> None:
    model = program(lambda m, x: m.layer(x), layer=nn.Linear(inputs, outputs)).half()
    found = refusal(capture(model, (randn(2, inputs).half(),), {}))
    assert found == f"the weight is ({outputs}, {inputs}), and float8 products take multiples of 16"


def test_a_computed_weight_is_refused() -> None:
    model = program(lambda m, x, w: F.linear(x, w))
    assert refusal(capture(model, (X, randn(80, 64).half()), {})) == "the weight is not a constant"


def test_a_residual_is_refused() -> None:
    model = program(
        lambda m, x, r: OP.overload(x, m.weight, None, "relu", 1.0, r), weight=nn.Parameter(randn(80, 64))
    ).half()
    graph = capture(model, (X, randn(3, 5, 80).half()), {})
    assert refusal(graph) == "a residual is added behind the activation"


def test_gpus_without_float8_are_refused() -> None:
    graph = capture(projection(), (X,), {})
    with standing_in_for(Gpu((0, 0), 0, 0)):
        assert refusal(graph) == "the weight is on cpu: fp8 is for GPUs"
    with standing_in_for(Gpu((8, 9), 58, 101376)):
        assert refusal(graph) is None
    assert quantize_linear_fp8._refused_device(torch.device("cpu")) is None
    with standing_in_for(A100):
        found = quantize_linear_fp8._refused_device(torch.device("cuda"))
    assert found == "the GPU is sm_80: float8 products take sm_89"


def test_a_layer_that_saves_less_than_quantizing_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = capture(projection(), (X,), {})
    monkeypatch.setattr(quantize_linear_fp8, "quantizing_us", quantizing_us)
    found = str(refusal(graph))
    assert found.startswith(
        "(15, 64) to 80 is about 0.0 us shorter in float8, and quantizing the input takes 1.0"
    )
    assert saved_us(4096, 8192, 8192) > 5 * quantizing_us(4096, 8192, False)
    assert saved_us(1, 64, 64) < quantizing_us(1, 64, False)


def test_a_norm_makes_its_codes_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return m.layer(m.norm(x + y))

    model = program(forward, layer=nn.Linear(64, 80), norm=nn.LayerNorm(64)).half()
    graph = run(fuse_add_layer_norm.PASS, model, X, randn(3, 5, 64, seed=1).half()).graph
    asked: list[bool] = []
    monkeypatch.setattr(
        quantize_linear_fp8, "quantizing_us", lambda *given: float(asked.append(given[2]) or -1)
    )
    assert refusal(graph) is None
    assert refusal(capture(projection(), (X,), {})) is None
    assert asked == [True, False]
    assert quantizing_us(4096, 768, True) < quantizing_us(4096, 768, False) / 3


def test_it_waits_for_its_name() -> None:
    assert (PASS.exact, PASS.kind) == (False, "cast")
