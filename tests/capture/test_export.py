from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from graphopt.capture.export import capture, from_program
from graphopt.errors import CaptureError
from graphopt.ir import provenance
from tests._models import FAMILIES, MLP, gpt2, llama, randn, randomised
from tests.capture._run import captured, example_of, run, same

X = randn(3, 4)


class Of(nn.Module):
    """A model that is one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Pair(NamedTuple):
    left: torch.Tensor
    right: Any


@dataclass
class Box:
    value: torch.Tensor
    label: str


@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_model_is_the_model(family: str) -> None:
    example = example_of(family)
    graph = captured(family, dynamic=False)
    assert same(run(graph, example.model.forward, *example.args, **example.kwargs), example())
    assert graph.op_counts().keys() & {"aten.linear", "aten.convolution", "aten.conv2d"}
    graph.check()


# Containers

OUTPUTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda x: x + 1,
    "tuple of one": lambda x: (x + 1,),
    "nested": lambda x: ({"a": [x + 1, (x * 2, None)], "b": 3}, [x - 1, "text", 2.5, True]),
    "namedtuple": lambda x: Pair(x + 1, {"inner": x * 2}),
    "dataclass": lambda x: Box(x + 1, "label"),
    "an input": lambda x: (x, x + 1),
    "a constant": lambda x: (torch.tensor([1.0, 2.0]), x + 1),
    "the same tensor twice": lambda x: [y := x + 1, y],
    "no container is empty": lambda x: ({}, (), [], x + 1),
    "nothing but a constant": lambda x: torch.tensor(5),
    "dtype and device": lambda x: {"dtype": x.dtype, "device": x.device, "x": x * 2},
}


@pytest.mark.parametrize("label", OUTPUTS)
def test_outputs_come_back_in_their_containers(label: str) -> None:
    function = OUTPUTS[label]
    model = Of(function)
    graph = capture(model, (X,))
    later = randn(3, 4, seed=1)
    found = run(graph, model.forward, later)
    assert type(found) is type(function(later))
    assert same(found, function(later))


@pytest.mark.parametrize("label", ["nested", "dataclass", "namedtuple"])
def test_inputs_may_be_containers(label: str) -> None:
    wrap: dict[str, Callable[[torch.Tensor], Any]] = {
        "nested": lambda x: ({"a": [x, (x * 2, None)], "b": 3},),
        "dataclass": lambda x: (Box(x, "label"),),
        "namedtuple": lambda x: (Pair(x, [x * 3]),),
    }
    read: dict[str, Callable[[Any], Any]] = {
        "nested": lambda v: v["a"][0] - v["a"][1][0] * v["b"],
        "dataclass": lambda v: v.value * len(v.label),
        "namedtuple": lambda v: v.left / v.right[0],
    }
    model = Of(read[label])
    graph = capture(model, wrap[label](X))
    later = wrap[label](randn(3, 4, seed=1))
    assert same(run(graph, model.forward, *later), read[label](*later))


def test_a_hugging_face_output_keeps_its_class_and_its_cache() -> None:
    for make in (gpt2, llama):
        example = make(use_cache=True)
        found = run(capture(example.model, (), example.kwargs), example.model.forward, **example.kwargs)
        wanted = example()
        assert type(found) is type(wanted)
        assert type(found.past_key_values) is type(wanted.past_key_values)
        assert len(found.past_key_values.layers) == 2
        assert same(found, wanted)


def test_an_output_that_hides_tensors_is_refused() -> None:
    class Opaque:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

    with pytest.raises(CaptureError, match="returns a Opaque") as error:
        capture(Of(Opaque), (X,))
    assert error.value.hint


# Inputs


def test_one_tensor_given_twice_stays_two_inputs() -> None:
    model = Of(lambda x, y: x - y)
    graph = capture(model, (X, X))
    left, right = randn(3, 4, seed=1), randn(3, 4, seed=2)
    assert same(run(graph, model.forward, left, right), left - right)
    model = Of(lambda pair, *, z: pair[0] - pair[1] * z)
    graph = capture(model, ([X, X],), {"z": X})
    z = randn(3, 4, seed=3)
    assert same(run(graph, model.forward, [left, right], z=z), left - right * z)


def test_plain_values_are_baked_in() -> None:
    model = Of(lambda x, scale, flag, mode, none: x * scale if flag and mode == "up" and none is None else x)
    graph = capture(model, (X, 3, True), {"mode": "up", "none": None})
    assert same(run(graph, model.forward, X, 3, True, mode="up", none=None), X * 3)
    assert [spec.constant for spec in graph.inputs] == [None, 3, True, "up", None]


@pytest.mark.parametrize(
    "x",
    [torch.arange(12).reshape(3, 4), torch.tensor([[True, False]]), torch.zeros(0, 4), torch.tensor(2.5)],
    ids=["integers", "booleans", "no elements", "no dimensions"],
)
def test_other_kinds_of_tensors(x: torch.Tensor) -> None:
    model = Of(lambda x: (x.sum(), ~x if x.dtype == torch.bool else x * 3))
    assert same(run(capture(model, (x,)), model.forward, x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, x = randomised(MLP()).to(dtype), randn(3, 8).to(dtype)
    with torch.no_grad():
        assert same(run(capture(model, (x,)), model.forward, x), model(x))


def test_the_order_of_keywords_does_not_matter_to_capture() -> None:
    class Ordered(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return x - 2 * y - 3 * z

    x, y, z = (randn(3, 4, seed=seed) for seed in range(3))
    model = Ordered().eval()
    graph = capture(model, (), {"z": z, "x": x, "y": y})
    assert [spec.path for spec in graph.inputs] == ["z", "x", "y"]
    assert same(run(graph, model.forward, y=y, z=z, x=x), model(x, y, z))


# What belongs to the model


class Own(nn.Module):
    """Tied weights, a persistent and a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.inner.weight
        self.register_buffer("kept", randn(4))
        self.register_buffer("passing", randn(4, seed=1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(torch.relu(self.inner(x) + self.kept)) * self.passing


def test_weights_and_buffers_are_shared_and_tied_ones_are_one() -> None:
    model = Own().eval()
    graph = capture(model, (X,))
    assert {c.sources for c in graph.constants.values()} == {("inner.weight",), ("kept",), ("passing",)}
    owned = {c.sources[0]: c.tensor.data_ptr() for c in graph.constants.values()}
    assert owned["inner.weight"] == model.inner.weight.data_ptr()
    with torch.no_grad():
        assert same(run(graph, model.forward, X), model(X))


def test_a_model_without_parameters() -> None:
    graph = capture(nn.Softmax(dim=-1).eval(), (X,))
    assert graph.constants == {}
    assert same(run(graph, nn.Softmax(dim=-1).forward, X), X.softmax(-1))


def test_hooks_are_captured_with_their_effect() -> None:
    model = randomised(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    plain = model(X)
    handles = [
        model.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        model.register_forward_hook(lambda module, args, output: output + 1),
        model[0].register_forward_pre_hook(lambda module, args: (args[0] - 1,)),
        model[0].register_forward_hook(lambda module, args, output: output * 3),
        model.register_forward_pre_hook(lambda m, args, kwargs: ((args[0] + 5,), kwargs), with_kwargs=True),
    ]
    with torch.no_grad():
        wanted = model(X)
        for dynamic in (None, True, {"input": {0: "batch"}}):
            graph = capture(model, (X,), dynamic=dynamic)
            assert same(run(graph, model.forward, X), wanted)
    for handle in handles:
        handle.remove()
    assert not torch.equal(plain, wanted)


def test_capture_leaves_the_model_as_it_was() -> None:
    model = Own().eval()
    before = {name: (id(t), t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    capture(model, (X,), dynamic={"x": {0: "batch"}})
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(id(after[name]) == one and torch.equal(after[name], t) for name, (one, t) in before.items())
    assert not model._forward_pre_hooks and not model._forward_hooks


# Provenance


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_call_knows_its_source_line(family: str, dynamic: bool) -> None:
    graph = captured(family, dynamic=dynamic)
    modules = {"", *(name for name, _ in example_of(family).model.named_modules())}
    for node in graph.calls:
        place = provenance.of(node)
        assert place.file is not None, node.format_node()
        assert Path(place.file).is_file(), place
        assert not place.file.startswith(str(Path(torch.__file__).parent))
        assert place.module in modules
        assert place.origins == (node.name,)


def test_a_source_line_is_the_users_own() -> None:
    model = randomised(MLP())
    graph = capture(model, (randn(3, 8),))
    (gelu,) = (node for node in graph.calls if "gelu" in str(node.target))
    place = provenance.of(gelu)
    line = Path(place.file or "").read_text().splitlines()[(place.line or 0) - 1]
    assert "nn.functional.gelu" in line
    linears = [provenance.of(node).module for node in graph.calls if node is not gelu]
    assert linears == ["first", "second", "last"]


def helper(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x)


def test_the_line_of_a_helper_or_a_hook_is_the_innermost_one() -> None:
    model = nn.Sequential(Of(helper)).eval()
    handle = model.register_forward_hook(lambda module, args, output: torch.sigmoid(output))
    graph = capture(model, (X,))
    handle.remove()
    places = {str(node.target): provenance.of(node) for node in graph.calls}
    lines = Path(__file__).read_text().splitlines()
    for op, text in (
        ("aten.tanh.default", "torch.tanh(x)"),
        ("aten.sigmoid.default", "torch.sigmoid(output)"),
    ):
        assert places[op].file == __file__
        assert text in lines[(places[op].line or 0) - 1]
    assert places["aten.tanh.default"].module == "0"


def test_nodes_and_constants_have_the_users_names() -> None:
    graph = capture(Of(lambda ids, more: ids + more["a"][0]), (X,), {"more": {"a": [X]}})
    assert [node.name for node in graph.placeholders] == ["args_0", "more_a_0"]
    graph = capture(randomised(MLP()), (randn(3, 8),))
    assert [node.name for node in graph.placeholders] == ["x"]
    assert {c.sources[0] for c in graph.constants.values()} == dict(MLP().named_parameters()).keys()


# Programs that were exported elsewhere


def test_an_exported_program_is_captured_as_it_is() -> None:
    example = llama(use_cache=True)
    capture(example.model, (), example.kwargs)  # registers the cache
    program = torch.export.export(example.model, (), example.kwargs, strict=False)
    graph = from_program(program)
    assert all(not c.sources[0].startswith("layers") for c in graph.constants.values())
    assert same(run(graph, example.model.forward, **example.kwargs), example())


def test_an_exported_program_keeps_its_dynamic_sizes_and_plain_values() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, scale: int, y: torch.Tensor) -> torch.Tensor:
            return x * scale + y

    batch = torch.export.Dim("batch", min=2, max=9)
    model = Scaled().eval()
    program = torch.export.export(model, (X, 3, X.clone()), dynamic_shapes=({0: batch}, None, {0: batch}))
    graph = from_program(program)
    later = randn(7, 4), 3, randn(7, 4, seed=1)
    assert same(run(graph, model.forward, *later), model(*later))
    assert graph.guards is not None
    with pytest.raises(AssertionError, match=r"x\.shape\[0\]"):
        graph.guards(randn(7, 4), randn(5, 4))


def test_an_exported_program_without_example_inputs_is_refused() -> None:
    program = torch.export.export(MLP().eval(), (randn(3, 8),))
    program._example_inputs = None
    with pytest.raises(CaptureError, match="no example inputs"):
        from_program(program)
