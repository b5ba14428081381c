from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes.prune_heads_by_magnitude import PASS
from tests._models import randn, randomised
from tests.passes._harness import program
from tests.passes._lossy import agrees, lossy

X = randn(2, 5, 16)
H, D = 4, 4


def attention(kv_heads: int = H) -> nn.Module:
    def forward(m, x):
        q, k, v = (y.view(*x.shape[:2], -1, D).transpose(1, 2) for y in (m.q(x), m.k(x), m.v(x)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv_heads != H)
        return m.o(y.transpose(1, 2).reshape(*x.shape[:2], H * D))

    sizes = {"q": H, "k": kv_heads, "v": kv_heads}
    layers = {name: nn.Linear(16, heads * D) for name, heads in sizes.items()}
    return randomised(program(forward, **layers, o=nn.Linear(H * D, 16)))


def weaken(model: nn.Module, head: int, size: int = D) -> None:
    """Make a head the weakest; its output is masked by ``mask`` in the dense model."""
    with torch.no_grad():
        model.v.weight[head * D : head * D + D] *= 1e-2
        model.o.weight[:, head * size : head * size + size] *= 1e-2


def mask(model: nn.Module, head: int, size: int = D) -> None:
    with torch.no_grad():
        model.o.weight[:, head * size : head * size + size] = 0


def widths(graph) -> list[int]:
    return sorted(node.args[1].meta["val"].shape[0] for node in graph.calls if "linear" in str(node.target))


def test_the_weakest_head_goes() -> None:
    model = attention()
    weaken(model, 2)
    graph = lossy(PASS, model, X)
    assert widths(graph) == [12, 12, 12, 16]
    mask(model, 2)
    agrees(graph, model, X)


def test_heads_that_share_a_key_go_together() -> None:
    model = attention(2)
    weaken(model, 1, 2 * D)
    graph = lossy(PASS, model, X)
    assert widths(graph) == [4, 4, 8, 16]
    mask(model, 1, 2 * D)
    agrees(graph, model, X)


def test_one_head_stays() -> None:
    graph = lossy(PASS, attention(), X, rounds=10)
    assert widths(graph) == [4, 4, 4, 16]
    assert not list(PASS.matches(graph))


def test_dynamic_sizes() -> None:
    model = attention()
    weaken(model, 0)
    graph = lossy(PASS, model, X, dynamic={"x": {0: "batch", 1: "seq"}})
    mask(model, 0)
    agrees(graph, model, randn(3, 4, 16))
