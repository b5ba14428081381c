"""Structures built as PyTorch's own way builds them, from the second time on without asking it."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ModelOutput,
    QuestionAnsweringModelOutput,
)

from graphopt.runtime.structure import builder
from tests._models import randn

Pair = namedtuple("Pair", ["a", "b"])


class Derived(BaseModelOutputWithPooling):
    """Somebody's own, which holds more than its values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rows = self.last_hidden_state.shape[0]


def encoder(*, layers: int = 0) -> BaseModelOutputWithPooling:
    hidden = tuple(randn(2, seed=place) for place in range(layers)) or None
    return BaseModelOutputWithPooling(
        last_hidden_state=randn(3), pooler_output=randn(4), hidden_states=hidden
    )


STRUCTURES: dict[str, Any] = {
    "a leaf": randn(1),
    "a tuple": (randn(1), randn(2)),
    "nothing": (),
    "nested": [randn(1), {"x": (randn(2), [randn(3)]), "y": {}}, 3, None, "text"],
    "a named tuple": Pair(randn(1), [randn(2)]),
    "an ordered dictionary": OrderedDict(b=randn(1), a=randn(2)),
    "an encoder's": encoder(),
    "an encoder's with a tuple in it": encoder(layers=3),
    "one in another": {"inner": [encoder(), encoder(layers=1)]},
    "one field that is no tensor": BaseModelOutputWithPooling(hidden_states=(randn(1), randn(2))),
    "somebody's own": Derived(last_hidden_state=randn(3)),
}


def state(tree: Any) -> Any:
    """Everything there is of a structure: types, order, items and attributes; leaves by identity."""
    if isinstance(tree, dict):
        return type(tree), [(key, state(value)) for key, value in tree.items()], attributes(tree)
    if isinstance(tree, list | tuple):
        return type(tree), [state(value) for value in tree]
    return id(tree)


def attributes(tree: Any) -> Any:
    return {name: state(value) for name, value in getattr(tree, "__dict__", {}).items()}


@pytest.mark.parametrize("name", STRUCTURES)
def test_it_is_what_pytorch_builds(name: str) -> None:
    leaves, spec = pytree.tree_flatten(STRUCTURES[name])
    build = builder(spec)
    for turn in range(4):
        values = [randn(1 + turn) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        assert state(build(values)) == state(pytree.tree_unflatten(values, spec))


def test_the_number_of_values_is_checked() -> None:
    build = builder(pytree.tree_structure([0, (0, 0)]))
    for count in (2, 4):
        with pytest.raises(ValueError, match=f"{count} values do not fill a structure of 3"):
            build([0] * count)


def test_an_output_made_by_copying_behaves_like_one_that_was_constructed() -> None:
    leaves, spec = pytree.tree_flatten(encoder())
    build = builder(spec)
    first, second = build(leaves), build([randn(5), randn(6)])
    assert isinstance(second, ModelOutput)
    assert second.last_hidden_state is second["last_hidden_state"] is second[0]
    assert second.hidden_states is None
    assert [value.shape for value in second.to_tuple()] == [(5,), (6,)]
    second.last_hidden_state = None
    second["attentions"] = leaves[0]
    assert second.attentions is leaves[0]
    assert first.last_hidden_state is leaves[0], "each has its own fields"
    assert build(leaves).attentions is None


def test_values_of_another_kind_are_left_to_the_constructor() -> None:
    """Which takes a first field apart, when it is the only one and no tensor."""
    _, spec = pytree.tree_flatten(QuestionAnsweringModelOutput(loss=randn(1)))
    build = builder(spec)
    assert build([randn(1)]).start_logits is None
    start, end = randn(2), randn(3)
    taken = build([{"start_logits": start, "end_logits": end}])
    assert (taken.loss, taken.start_logits, taken.end_logits) == (None, start, end)


def test_only_the_first_is_constructed(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, spec = pytree.tree_flatten(encoder())
    constructed: list[Any] = []
    init = BaseModelOutputWithPooling.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        constructed.append(kwargs)
        init(self, *args, **kwargs)

    monkeypatch.setattr(BaseModelOutputWithPooling, "__init__", counted)
    build = builder(spec)
    for _ in range(5):
        build(leaves)
    assert len(constructed) == 1
