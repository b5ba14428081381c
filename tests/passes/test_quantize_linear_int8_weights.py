from __future__ import annotations

import torch

from graphopt.compiler.lossy import relative_distance
from graphopt.passes.quantize_linear_int8_weights import PASS
from tests._models import randn
from tests.passes._harness import results, text
from tests.passes._lossy import lossy
from tests.passes._quantizing import projection

X = randn(3, 5, 64)


def test_a_projection() -> None:
    """The rewrite and its refusals are those of ``quantize_linear_int4``, and tested there."""
    model = projection(bias=False)
    graph = lossy(PASS, model, X)
    assert (
        text(graph)
        .splitlines()[0]
        .startswith(
            "%0 = graphopt.block_quantized_linear(x, <in 8 bits: layer.weight>, <a scale a block:"
            " layer.weight>, 8, None,"
        )
    )
    assert list(PASS.matches(graph)) == []
    with torch.no_grad():
        assert 0 < relative_distance([model(X)], results(graph, [X])) < 0.01
    graph.drop_unused_constants()
    held = {c.how: c.tensor for c in graph.constants.values()}
    assert {how: (t.dtype, tuple(t.shape)) for how, t in held.items()} == {
        "in 8 bits": (torch.uint8, (80, 2, 32)),
        "a scale a block": (torch.float32, (80, 2)),
    }
