"""``outputs=``: which of a model's outputs are kept, and what that saves."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import InputError
from tests._models import randn

X = randn(2, 5, 8)
Pair = namedtuple("Pair", "left right")


class Heads(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.body, self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = torch.tanh(self.body(x))
        first, second = self.first(hidden), self.second(hidden)
        if self.kind == "tuple":
            return first, second
        if self.kind == "pair":
            return Pair(first, second)
        return {"first": first, "rest": [second, {"hidden": hidden}]}


def optimized(kind: str, outputs: Any, **more: Any) -> tuple[graphopt.OptimizedModel, Any]:
    torch.manual_seed(0)
    model = Heads(kind).eval()
    more = {"effort": "fast", **more}
    return graphopt.optimize(model, (X,), outputs=outputs, **more), model(X)


def test_what_is_not_kept_is_none_and_not_computed() -> None:
    model, whole = optimized("dict", ["first"])
    found = model(X)
    torch.testing.assert_close(found["first"], whole["first"])
    assert found["rest"] is None
    assert sum(count for op, count in model.report.ops_after.items() if "linear" in op) == 2
    assert model.report.ops_before["aten.linear"] == 3


@pytest.mark.parametrize(
    ("kind", "name", "get"),
    [
        ("tuple", "1", lambda out: out[1]),
        ("pair", "right", lambda out: out.right),
        ("dict", "rest.0", lambda out: out["rest"][0]),
        ("dict", "rest.1.hidden", lambda out: out["rest"][1]["hidden"]),
    ],
)
def test_names_lead_into_containers(kind: str, name: str, get: Any) -> None:
    model, whole = optimized(kind, [name])
    torch.testing.assert_close(get(model(X)), get(whole))
    last, _ = optimized(kind, {name: "last"})
    torch.testing.assert_close(get(last(X)), get(whole)[:, -1:])


def test_the_fallback_selects_likewise() -> None:
    model, _ = optimized("dict", {"first": "last"}, on_mismatch="fallback")
    other = randn(3, 5, 8)
    found = model(other)
    assert model.fallbacks == 1
    assert found["first"].shape == (3, 1, 3)
    assert found["rest"] is None


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (["frist"], "did you mean first"),
        (["zebra"], "it has: first, rest"),
        ([], "names none"),
        ("first", "is a string"),
        ({"first": "middle"}, "is unknown"),
        ({"first": 3}, "is unknown"),
    ],
)
def test_bad_selections(outputs: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        optimized("dict", outputs)
    assert words in str(caught.value)


def test_an_output_without_positions() -> None:
    class Flat(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"total": x.sum()}

    with pytest.raises(InputError, match="has no positions"):
        graphopt.optimize(Flat().eval(), (X,), outputs={"total": "last"})
