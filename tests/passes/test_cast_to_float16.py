from __future__ import annotations

import torch
from torch import nn

from graphopt.compiler.lossy import relative_distance
from graphopt.passes.cast_to_float16 import PASS
from tests._models import randn
from tests.passes._harness import program, results, text
from tests.passes._lossy import lossy

X = randn(3, 5, 16)


def test_a_projection() -> None:
    """The table and the rewrite are those of ``cast_to_bfloat16``, and tested there."""
    model = program(lambda m, x: m.layer(x), layer=nn.Linear(16, 8))
    graph = lossy(PASS, model, X)
    assert text(graph) == (
        "%0 = to(x, float16)\n"
        "%1 = linear(%0, <in float16: layer.weight>, <in float16: layer.bias>)\n"
        "%2 = to(%1, float32)\n"
        "return %2"
    )
    assert list(PASS.matches(graph)) == []
    with torch.no_grad():
        assert 0 < relative_distance([model(X)], results(graph, [X])) < 0.002
