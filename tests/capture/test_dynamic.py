"""Dynamic sizes: declared by name, inferred, and checked at every call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graphopt.capture.export import capture
from graphopt.errors import CaptureError, InputError
from graphopt.runtime.calling import CallingConvention
from tests._models import padding, randn, randomised, tokens
from tests.capture._run import captured, example_of, run, same


class Positions(nn.Module):
    """Tokens and learned positions, of which there are 16."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(53, 4), nn.Embedding(16, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        x = self.words(ids) + self.positions.weight[: ids.shape[1]]
        x = x if mask is None else x * mask[..., None]
        return x + more["extra"]["a"][0] if more else x


NAMES = {0: "batch", 1: "seq"}
MODEL = randomised(Positions())


def call(batch: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tokens(batch, seq), randn(batch, seq)


@pytest.mark.parametrize("example", [(2, 5), (1, 5), (1, 1), (3, 3)], ids=str)
def test_named_sizes_vary(example: tuple[int, int]) -> None:
    graph = capture(MODEL, call(*example), dynamic={"ids": NAMES, "mask": NAMES})
    for sizes in ((1, 1), (2, 5), (1, 16), (7, 3), (5, 5)):
        later = call(*sizes)
        with torch.no_grad():
            assert same(run(graph, MODEL.forward, *later), MODEL(*later)), sizes


@pytest.mark.parametrize("example", [(2, 5), (1, 5)], ids=str)
def test_inferred_sizes_vary(example: tuple[int, int]) -> None:
    graph = capture(MODEL, call(*example), dynamic=True)
    for sizes in ((1, 2), (2, 5), (4, 16), (5, 5)):
        later = call(*sizes)
        with torch.no_grad():
            assert same(run(graph, MODEL.forward, *later), MODEL(*later)), sizes


def test_sizes_inside_containers_and_open_keywords_vary() -> None:
    for dynamic in (True, {"ids": NAMES, "extra": NAMES}, {"ids": NAMES, "extra['a'][0]": NAMES}):
        graph = capture(MODEL, (tokens(2, 5),), {"extra": {"a": [randn(2, 5, 4)]}}, dynamic=dynamic)
        later = {"extra": {"a": [randn(3, 7, 4)]}}
        with torch.no_grad():
            wanted = MODEL(tokens(3, 7), **later)
        assert same(run(graph, MODEL.forward, tokens(3, 7), **later), wanted)


def test_whole_models_vary() -> None:
    lengths = {"bert": (3, 9), "gpt2": (4, 3), "llama": (1, 11)}
    for family, (batch, seq) in lengths.items():
        example = example_of(family)
        later = {
            "input_ids": tokens(batch, seq),
            "attention_mask": padding((seq, *range(batch - 1)), seq),
            "token_type_ids": tokens(batch, seq) % 2,
        }
        later = {name: later[name] for name in example.kwargs}
        with torch.no_grad():
            found = run(captured(family, dynamic=True), example.model.forward, **later)
            assert same(found, example.model(**later)), family


def test_an_encoder_and_its_decoder_vary_apart() -> None:
    example = example_of("t5")
    graph = captured("t5", dynamic=True)
    later = {"input_ids": tokens(3, 9), "decoder_input_ids": tokens(3, 2)}
    with torch.no_grad():
        assert same(run(graph, example.model.forward, **later), example.model(**later))


def test_the_named_dimensions_are_recorded() -> None:
    graph = capture(MODEL, call(2, 5), dynamic={"ids": NAMES, "mask": {1: "seq", 0: "batch"}})
    assert [spec.dims for spec in graph.inputs] == [NAMES, NAMES]
    assert all(isinstance(size, torch.SymInt) for spec in graph.inputs for size in spec.shape)


# Calls that do not fit


def refusal(graph: Any, *args: Any) -> str:
    with pytest.raises(InputError) as error:
        CallingConvention(graph, MODEL.forward).flatten(args, {})
    return str(error.value)


@pytest.mark.parametrize("dynamic", [True, {"ids": NAMES, "mask": NAMES}], ids=["inferred", "named"])
def test_sizes_out_of_range_are_refused_by_name(dynamic: Any) -> None:
    graph = capture(MODEL, call(2, 5), dynamic=dynamic)
    assert "ids.shape[1] <= 16" in refusal(graph, *call(2, 17))


def test_unequal_sizes_of_one_name_are_refused_by_name() -> None:
    graph = capture(MODEL, call(2, 5), dynamic={"ids": NAMES, "mask": NAMES})
    assert "'seq' is 6 in ids and 5 in mask" in refusal(graph, tokens(2, 6), randn(2, 5))
    graph = capture(MODEL, call(2, 5), dynamic=True)
    assert "ids.shape[1] == mask.shape[1]" in refusal(graph, tokens(2, 6), randn(2, 5))


def test_a_refusal_is_not_remembered_as_good() -> None:
    graph = capture(MODEL, call(2, 5), dynamic=True)
    CallingConvention(graph, MODEL.forward).flatten(call(3, 6), {})
    for _ in range(2):
        refusal(graph, *call(3, 17))


# Declarations that do not fit


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"tokens": NAMES}, "the input 'tokens', which is not among the example inputs"),
        ({"ids": {2: "width"}}, "dimension 2 of 'ids', which has 2 dimensions"),
        ({"ids": {-1: "seq"}}, "dimension -1 of 'ids'"),
        ({"ids": {0: "same", 1: "same"}}, "dimension 'same' is 2 in the example ids and 5 in ids"),
        ({"ids": {0: "n"}, "mask": {1: "n"}}, "dimension 'n' is 2 in the example ids and 5 in mask"),
        ({"ids": ["batch", "seq"]}, "maps 'ids' to"),
        ({"ids": {0: 3}}, "maps 'ids' to"),
        ("batch", "dynamic is 'batch'"),
    ],
    ids=str,
)
def test_declarations_that_do_not_fit_are_refused(dynamic: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        capture(MODEL, call(2, 5), dynamic=dynamic)
    assert message in str(error.value)


def test_a_size_that_the_model_fixes_cannot_be_dynamic() -> None:
    with pytest.raises(CaptureError) as error:
        capture(nn.Linear(4, 4).eval(), (randn(3, 4),), dynamic={"input": {1: "width"}})
    assert "input.shape[1]" in error.value.message
    assert "declare as dynamic only what the model lets vary" in (error.value.hint or "")
