from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.capture.export import capture
from graphopt.compiler.lossy import relative_distance
from graphopt.compiler.manager import PassManager
from graphopt.compiler.remarks import Remarks
from graphopt.ir.graph import op_name
from graphopt.passes import cast_to_bfloat16, merge_casts, remove_dead_code
from graphopt.passes.cast_to_bfloat16 import PASS
from tests._models import randn
from tests.passes._harness import LIMITS, program, results, text
from tests.passes._lossy import lossy

X = randn(3, 5, 16)


def test_a_projection() -> None:
    model = program(lambda m, x: m.layer(x), layer=nn.Linear(16, 8))
    graph = lossy(PASS, model, X)
    assert text(graph) == (
        "%0 = to(x, bfloat16)\n"
        "%1 = linear(%0, <in bfloat16: layer.weight>, <in bfloat16: layer.bias>)\n"
        "%2 = to(%1, float32)\n"
        "return %2"
    )
    assert [c.tensor.dtype for c in graph.constants.values() if c.how] == [torch.bfloat16] * 2
    assert list(PASS.matches(graph)) == []
    with torch.no_grad():
        assert 0 < relative_distance([model(X)], results(graph, [X])) < 0.01


def narrow_ops(model: nn.Module, *args: torch.Tensor) -> list[str]:
    """The ops that compute in bfloat16 once the casts between them are merged."""
    graph = lossy(PASS, model, *args)
    passes = [merge_casts.PASS, remove_dead_code.PASS]
    graph = PassManager(passes, Remarks(), LIMITS).run(graph, list(args)).graph
    vals = [(node, node.meta["val"]) for node in graph.calls if isinstance(node.meta["val"], torch.Tensor)]
    return [op_name(node).split(".")[-1] for node, val in vals if val.dtype == torch.bfloat16]


def test_what_lies_between_two_products_follows_them() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(m.up(x)).reshape(15, 32)
        return m.down(m.norm(y))

    layers = {"up": nn.Linear(16, 32), "norm": nn.LayerNorm(32), "down": nn.Linear(32, 16)}
    found = narrow_ops(program(forward, **layers), X)
    assert found == ["to", "linear", "gelu", "reshape", "layer_norm", "linear"]


def test_softmax_and_sums_stay_in_float32() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(m.layer(x), -1).sum(1).exp()

    assert narrow_ops(program(forward, layer=nn.Linear(16, 8)), X) == ["to", "linear"]


def test_what_no_product_feeds_stays_in_float32() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x + 1).reshape(-1)

    assert narrow_ops(program(forward), X) == []


def test_parts_of_a_product() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k = m.layer(x).split([8, 24], -1)
        return m.first(q) + m.second(k)

    layers = {"layer": nn.Linear(16, 32), "first": nn.Linear(8, 4), "second": nn.Linear(24, 4)}
    model = program(forward, **layers)
    found = narrow_ops(model, X)
    assert found.count("linear") == 3
    with torch.no_grad():
        assert relative_distance([model(X)], results(lossy(PASS, model, X), [X])) < 0.02


def test_a_convolution() -> None:
    model = program(lambda m, x: F.relu(m.layer(x)), layer=nn.Conv2d(3, 8, 3))
    assert narrow_ops(model, randn(2, 3, 9, 9)) == ["to", "conv2d", "relu"]


def test_attention_with_a_mask_of_truths() -> None:
    def forward(m: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q = m.layer(x)[:, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    model = program(forward, layer=nn.Linear(16, 8))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    graph = lossy(PASS, model, X, mask)
    with torch.no_grad():
        assert relative_distance([model(X, mask)], results(graph, [X, mask])) < 0.02


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_another_type_stays(dtype: torch.dtype) -> None:
    model = program(lambda m, x: m.layer(x), layer=nn.Linear(16, 8)).to(dtype)
    graph = lossy(PASS, model, X.to(dtype))
    assert graph.op_counts() == {"aten.linear": 1}


def test_a_list_that_is_returned_is_refused() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        return torch.ops.aten.split_with_sizes(m.layer(x), [8, 24], -1)

    graph = capture(program(forward, layer=nn.Linear(16, 32)), (X,), {})
    refusals = [cast_to_bfloat16.PASS.check(match) for match in PASS.matches(graph)]
    assert set(refusals) <= {None, "its results are returned as a list"}
