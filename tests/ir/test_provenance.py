from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from graphopt.capture.export import capture
from graphopt.ir import provenance
from graphopt.ir.graph import Graph
from graphopt.ir.provenance import Provenance
from tests._models import randn

X = randn(3, 4)


def helper(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    return y.cos()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.fc(x)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Inner(), Inner()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.exp()
        for layer in self.layers:
            x = layer(x)
        return helper(x)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return capture(Outer().eval(), (X,))


def places(graph: Graph, op: str) -> list[Provenance]:
    return [provenance.of(node) for node in graph.calls if f".{op}." in str(node.target)]


def line_of(function, text: str) -> int:
    """The line of a function's source that holds the text."""
    code = function.__code__
    lines = Path(code.co_filename).read_text().splitlines()
    return next(i for i in range(code.co_firstlineno, len(lines)) if text in lines[i - 1])


def test_a_line_of_the_users(graph: Graph) -> None:
    (place,) = places(graph, "exp")
    assert place.source == f"{__file__}:{line_of(Outer.forward, 'x.exp()')}"
    assert place.module == ""
    assert place.module_type.endswith("Outer")
    assert place.origins == ("exp",)


def test_layers_are_told_apart(graph: Graph) -> None:
    first, second = places(graph, "linear")
    assert [first.module, second.module] == ["layers.0.fc", "layers.1.fc"]
    assert first.module_type.endswith("Linear")
    assert first.source == second.source == f"{__file__}:{line_of(Inner.forward, 'self.fc(x)')}"
    assert first.origins != second.origins


def test_inside_a_module_of_transformers(graph: Graph) -> None:
    first, second = places(graph, "rsqrt")
    assert [first.module, second.module] == ["layers.0.norm", "layers.1.norm"]
    assert first.module_type.endswith("LlamaRMSNorm")
    assert (
        first.source
        == f"{LlamaRMSNorm.forward.__code__.co_filename}:{line_of(LlamaRMSNorm.forward, 'rsqrt')}"
    )


def test_through_a_helper_function(graph: Graph) -> None:
    for op in ("sin", "cos"):
        (place,) = places(graph, op)
        assert place.source == f"{__file__}:{line_of(helper, f'.{op}()')}"
        assert place.module == ""


def test_what_has_none(graph: Graph) -> None:
    place = provenance.of(graph.placeholders[0])
    assert place == Provenance()
    assert place.source == ""


def test_merging_keeps_the_place_of_one_and_the_origins_of_all(graph: Graph) -> None:
    exp, sin, cos = (
        next(n for n in graph.calls if f".{op}." in str(n.target)) for op in ("exp", "sin", "cos")
    )
    merged = provenance.merge(cos, [exp, sin, cos, exp])
    assert (merged.file, merged.line, merged.module) == (__file__, provenance.of(cos).line, "")
    assert merged.origins == ("exp", "sin", "cos")
    assert provenance.of(cos).origins == ("cos",)
