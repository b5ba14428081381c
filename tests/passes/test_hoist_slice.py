from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.ir.graph import op_name
from graphopt.passes import fold_constants, fuse_linear, merge_permutes, remove_noops
from graphopt.passes.fold_linear_reshape import PASS as FOLD_LINEAR_RESHAPE
from graphopt.passes.hoist_slice import PASS
from tests import _models as models
from tests._models import padding, randn, tokens
from tests.passes._harness import Ran, program, run

X = randn(2, 5, 8)
DYNAMIC = {"x": {0: "batch", 1: "seq"}}
BEFORE = [
    *(remove_noops.PASS, fold_constants.PASS, remove_noops.PASS, fuse_linear.PASS, FOLD_LINEAR_RESHAPE),
    merge_permutes.PASS,
]


def rows(ran: Ran) -> list[int]:
    """How many positions every linear layer computes."""
    return [n.meta["val"].shape[1] for n in ran.graph.calls if op_name(n) == "aten.linear"]


def test_the_last_position() -> None:
    def forward(m, x):
        return m.head(F.layer_norm(x, (8,)))[:, -1]

    run(PASS, program(forward, head=nn.Linear(8, 12)), X).becomes(
        """
            %0 = slice(x, 1, -1, end)
            %1 = layer_norm(%0, [8], None, None, 1e-05, False)
            %2 = linear(%1, head.weight, head.bias)
            %3 = select(%2, 1, 0)
            return %3
        """,
        before="""
            %0 = layer_norm(x, [8], None, None, 1e-05, False)
            %1 = linear(%0, head.weight, head.bias)
            %2 = select(%1, 1, -1)
            return %2
        """,
    )


POSITIONS = {
    "the last": (lambda y: y[:, -1], 1),
    "the last, kept": (lambda y: y[:, -1:], 1),
    "the last of 5": (lambda y: y.select(1, 4), 1),
    "the first": (lambda y: y[:, 0, :], 1),
    "all but the first": (lambda y: y[:, 1:], 4),
    "every second": (lambda y: y[:, ::2], 3),
    "narrowed": (lambda y: y.narrow(1, 2, 2), 2),
    "listed": (lambda y: y[:, [3, 0]], 2),
    "selected": (lambda y: y.index_select(1, torch.tensor([1])), 1),
    "in the middle": (lambda y: y[:, -2, :4], 1),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_and_operations(name: str) -> None:
    take, count = POSITIONS[name]

    def forward(m, x):
        y = m.up(x * m.scale + x.flip(-1)).relu()
        y = y.view(2, 5, 3, 4).transpose(1, 2).softmax(-1).transpose(1, 2).reshape(2, 5, 12)
        return take(m.down(F.rms_norm(y, (12,))) + x)

    model = program(forward, up=nn.Linear(8, 12), down=nn.Linear(12, 8), scale=randn(1, 5, 8))
    passes = [remove_noops.PASS, fold_constants.PASS, PASS, fold_constants.PASS]  # the scale is sliced too
    assert rows(run(passes, model, X)) == [count, count]


def attend(m, x, mask=None, causal=False, spelled=False):
    def split(y):
        return y.reshape(*y.shape[:2], 2, 4).transpose(1, 2)

    q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
    if spelled:
        scores = q @ k.transpose(-1, -2) / 2 + (0 if mask is None else mask)
        y = scores.softmax(-1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    return x + m.o(y.transpose(1, 2).reshape(x.shape))


LAYERS = {"q": nn.Linear(8, 8), "k": nn.Linear(8, 8), "v": nn.Linear(8, 8), "o": nn.Linear(8, 8)}
ATTENTIONS = {
    "plain": attend,
    "causal": lambda m, x: attend(m, x, causal=True),
    "masked": lambda m, x: attend(m, x, m.bias > 0),
    "biased": lambda m, x: attend(m, x, m.bias),
    "a mask over keys": lambda m, x: attend(m, x, m.bias[:1] > -9),
    "spelled out": lambda m, x: attend(m, x, m.bias, spelled=True),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_query_of_an_attention(name: str) -> None:
    function = ATTENTIONS[name]

    def forward(m, x):
        return m.head(function(m, x))[:, -1]

    model = program(forward, **LAYERS, head=nn.Linear(8, 12), bias=randn(5, 5))
    assert sorted(rows(run([merge_permutes.PASS, PASS], model, X))) == [1, 1, 1, 5, 5]


def test_a_causal_attention_is_computed_whole_for_other_positions() -> None:
    def forward(m, x):
        return attend(m, x, causal=True)[:, 2:4]

    assert sorted(rows(run(PASS, program(forward, **LAYERS), X))) == [2, 5, 5, 5]


def test_positions_that_others_need_are_refused() -> None:
    def forward(m, x):
        y = m.head(x)
        return y[:, -1], y.sum()

    run(PASS, program(forward, head=nn.Linear(8, 12)), X).refuses(
        "linear is also read by sum_1, which needs the other positions"
    )


def test_as_many_positions_as_there_are_are_refused() -> None:
    def forward(m, x):
        return m.head(x)[:, [0, 0, 1, 1, 2, 3, 4]]

    model = program(forward, head=nn.Linear(8, 12))
    run([fold_constants.PASS, PASS], model, X).refuses("it takes 7 of 5 positions")


def test_the_same_slice_twice() -> None:
    def forward(m, x):
        y = m.head(x)
        return y[:, -1].sin(), y[:, -1].cos()

    assert rows(run(PASS, program(forward, head=nn.Linear(8, 12)), X)) == [1]


OTHERS = {
    "features": lambda m, x: m.head(x)[..., :4],
    "mixed": lambda m, x: x.softmax(1)[:, -1],
    "reshaped": lambda m, x: x.sin().reshape(10, 8)[-1],
    "summed up": lambda m, x: x.cumsum(1)[:, -1],
    "views": lambda m, x: x.reshape(2, 5, 2, 4).transpose(1, 2)[:, :, -1],
    "an input": lambda m, x: x[:, -1],
}


def test_what_mixes_positions_stays() -> None:
    def forward(m, x):
        return [function(m, x) for function in OTHERS.values()]

    run(PASS, program(forward, head=nn.Linear(8, 12)), X).stays()


def test_dynamic_sizes() -> None:
    def forward(m, x):
        y = F.gelu(m.up(x.transpose(0, 1))).transpose(0, 1)
        y = attend(m, m.down(y) + x, causal=True)
        return m.down(m.up(y))[:, -1], m.up(x)[:, 1:]

    model = program(forward, up=nn.Linear(8, 12), down=nn.Linear(12, 8), **LAYERS)
    ran = run([remove_noops.PASS, PASS], model, X, dynamic=DYNAMIC)
    assert [size for size in rows(ran) if isinstance(size, int)] == [1] * 4
    ran.agrees(randn(3, 4, 8)).agrees(randn(1, 9, 8))


class Last(nn.Module):
    """The logits of the last position of a causal language model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, **kwargs: torch.Tensor) -> torch.Tensor:
        return self.model(**kwargs).logits[:, -1, :]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_last_logits_of_a_language_model(family: str) -> None:
    """The head, the last feed-forward block, and the last attention's query are left with one position."""
    example = models.FAMILIES[family]()
    ran = run(
        [*BEFORE, PASS], Last(example.model), kwargs=example.kwargs, dynamic=example.dynamic, redraw=False
    )
    sizes = rows(ran)
    assert sizes.count(1) == {"llama": 6, "gpt2": 4}[family]
    sizes = [tokens(3, 4), padding((4, 4, 4), 4)][: len(example.kwargs)]
    ran.agrees(*sizes)
