from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphopt.passes import fold_constants
from graphopt.passes.remove_dead_code import PASS as REMOVE_DEAD_CODE
from graphopt.passes.remove_noops import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 5, 8)

NOOPS = {
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "cast": lambda x: x.to(torch.float32),
    "cast to another's type": lambda x: x.type_as(x.sum()),
    "reshape": lambda x: x.reshape(2, -1, 8),
    "expand": lambda x: x.expand(2, 5, -1),
    "slice": lambda x: x[:, :, 0:8],
    "slice beyond the end": lambda x: x[:, 0 : 2**63 - 1],
    "transposed twice": lambda x: x.transpose(1, 2).transpose(-1, 1),
    "0 added": lambda x: x + 0,
    "0 added first": lambda x: 0.0 + x,
    "zeros added": lambda x: x + torch.zeros(8),
    "0 subtracted": lambda x: x - 0,
    "times 1": lambda x: 1.0 * x,
    "times ones": lambda x: torch.ones(5, 1) * x,
    "times ones of its own shape": lambda x: torch.ones_like(x) * x,
    "times a fill of its own shape": lambda x: x * torch.full_like(x, 1.0),
    "zeros of its own shape added": lambda x: torch.zeros_like(x) + x,
    "through ones of its own kind": lambda x: x / x.new_ones(x.shape),
    "through 1": lambda x: x / 1,
    "through full": lambda x: x / torch.full((2, 5, 8), 1.0),
    "feature dropout": lambda x: F.dropout1d(x, 0.5, training=False),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, training=False),
    "wider and back": lambda x: x.double().float(),
    "a choice of one side": lambda x: torch.where(torch.ones(8, dtype=torch.bool), x, 0.0),
    "a choice of the other": lambda x: torch.where(torch.zeros(5, 8, dtype=torch.bool), x.sin(), x),
    "filled nowhere": lambda x: x.masked_fill(torch.zeros(8, dtype=torch.bool), 1.0),
    "repeated once": lambda x: x.repeat(1, 1, 1),
    "padded with nothing": lambda x: F.pad(x, (0, 0, 0, 0)),
    "nothing squeezed": lambda x: x.squeeze().squeeze(1),
    "one part": lambda x: x.split(5, dim=1)[0],
    "one piece": lambda x: torch.cat([x], dim=1),
}
OTHERS = {
    "dropout in training": lambda x: F.dropout(x, 0.0, training=True),
    "cast": lambda x: x.to(torch.float64),
    "reshape": lambda x: x.reshape(5, 2, 8),
    "reshape with one more": lambda x: x.reshape(1, 2, 5, 8),
    "expand": lambda x: x.expand(3, 2, 5, 8),
    "slice": lambda x: x[:, 1:],
    "slice to the last but one": lambda x: x[:, :-1],
    "every second": lambda x: x[:, ::2],
    "transposed": lambda x: x.transpose(0, 1),
    "transposed two ways": lambda x: x.transpose(0, 1).transpose(1, 2),
    "1 added": lambda x: x + 1,
    "0 times": lambda x: torch.add(x, x, alpha=0),
    "added 0 times": lambda x: torch.add(torch.zeros_like(x), x, alpha=2),
    "subtracted from 0": lambda x: 0 - x,
    "zeros subtract": lambda x: torch.zeros_like(x) - x,
    "1 through": lambda x: torch.ones_like(x) / x,
    "times -1": lambda x: x * -1,
    "zeros that broadcast": lambda x: x + torch.zeros(3, 1, 1, 1),
    "ones of a wider type": lambda x: x * torch.ones(8, dtype=torch.float64),
    "nearly zeros": lambda x: x + torch.full((8,), 1e-30),
    "not all ones": lambda x: x * torch.eye(8)[0],
    "an input of zeros": lambda x: x + (x * 0),
    "0 times an input": lambda x: x * 0,
    "narrower and back": lambda x: x.half().float(),
    "a choice that broadcasts": lambda x: torch.where(torch.ones(3, 1, 1, 1, dtype=torch.bool), x, 0.0),
    "a choice": lambda x: torch.where(torch.arange(8) > 3, x, 0.0),
    "filled here and there": lambda x: x.masked_fill(torch.arange(8) > 3, 1.0),
    "repeated": lambda x: x.repeat(1, 2, 1),
    "padded": lambda x: F.pad(x, (0, 1)),
    "one of two parts": lambda x: x.split(4, dim=1)[0],
    "rectified": lambda x: F.relu(x.abs()),
}


def each(functions):
    """A program that computes each; several in one, since capturing is what takes the time."""

    def forward(m, x):
        return [function(x).sin() for function in functions.values()]

    return program(forward)


@pytest.mark.parametrize("passes", [[PASS], [fold_constants.PASS, PASS]], ids=["computed", "folded"])
def test_what_returns_its_input_goes(passes) -> None:
    ran = run(passes, each(NOOPS), X)
    calls = [node for node in ran.graph.calls if node.users]
    assert {str(node.target) for node in calls} == {"aten.sin.default"}
    assert {node.args for node in calls} == {(ran.graph.placeholders[0],)}


def test_what_does_something_stays() -> None:
    run(PASS, each(OTHERS), X).stays()


def test_masks_that_are_true_everywhere() -> None:
    def forward(m, x, y):
        full = torch.ones(5, dtype=torch.bool)
        return x & full, full & x, x.logical_and(full), x.bitwise_and(torch.arange(5) >= 0), x & y

    x, y = randn(2, 5) > 0, randn(2, 5, seed=1) > 0
    ran = run([PASS, REMOVE_DEAD_CODE], program(forward), x, y)
    ran.becomes("%0 = __and__(x, y)\nreturn x, x, x, x, %0")


def test_masks_that_are_false_everywhere() -> None:
    def forward(m, x, y):
        none = torch.zeros(5, dtype=torch.bool)
        return x | none, none | x, x.logical_or(none), x.bitwise_or(torch.arange(5) < 0), x | y

    x, y = randn(2, 5) > 0, randn(2, 5, seed=1) > 0
    ran = run([fold_constants.PASS, PASS, REMOVE_DEAD_CODE], program(forward), x, y)
    ran.becomes("%0 = __or__(x, y)\nreturn x, x, x, x, %0")


def test_what_is_done_twice_is_done_once() -> None:
    def forward(m, x):
        return F.relu(x.relu()), x.abs().abs(), x.floor().floor(), x.relu().abs()

    run(PASS, program(forward), X).counts(relu=2, abs=2, floor=1)


def test_integers_that_a_float_rounds_stay() -> None:
    def forward(m, x, y):
        return x.float().long(), y.float().to(torch.int8)

    x = torch.tensor([2**24 + 1, 3])
    ran = run(PASS, program(forward), x, torch.arange(3, dtype=torch.int8))
    ran.becomes("%0 = to(x, float32)\n%1 = to(%0, int64)\nreturn %1, y")


def test_an_and_of_bits_stays() -> None:
    """With only zeros and ones among the examples, verification alone would let it pass."""

    def forward(m, x):
        return x & torch.ones(5, dtype=torch.long)

    ran = run(PASS, program(forward), torch.tensor([0, 1, 1, 0, 1]))
    ran.stays().agrees(torch.tensor([0, 1, 2, 3, 4]))


def test_truth_of_numbers_stays() -> None:
    def forward(m, x):
        return x.logical_and(torch.ones(5, dtype=torch.bool))

    run(PASS, program(forward), torch.tensor([0, 1, 1, 0, 1])).stays()


def test_integer_arithmetic() -> None:
    def forward(m, x):
        return x + 0, x * 1, x / 1, x * 1.0

    run(PASS, program(forward), torch.arange(5)).counts(add=0, mul=1, div=1)


def test_positions_without_a_gap_are_one_sequence() -> None:
    """How transformers looks for packed sequences: where positions do not go up by one, another begins."""

    def forward(m, x):
        positions = torch.arange(x.shape[1])[None].expand(x.shape[0], -1)
        sequence = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        same = sequence[:, :, None] == sequence[:, None, :]
        return (x[:, :, None] > x[:, None, :]) & same

    dynamic = {"x": {0: "batch", 1: "seq"}}
    ran = run(PASS, program(forward), randn(2, 5), dynamic=dynamic)
    assert ran.graph.output.args[0][0].name.startswith("gt")
    ran.agrees(randn(3, 4)).agrees(randn(1, 9))


def test_positions_with_a_gap_are_not() -> None:
    def forward(m, x):
        positions = torch.arange(5)[None] + m.gap
        sequence = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        shifted = (torch.diff(torch.arange(5)[None], prepend=torch.ones(1, 1).long(), dim=-1) != 1).cumsum(-1)
        return (x > 0) & (sequence[:, :, None] == sequence[:, None]), (x > 0) & (shifted == 0)

    run(PASS, program(forward, gap=torch.tensor([0, 0, 3, 3, 3])), randn(2, 5, 5)).stays()


def test_an_inner_transpose_that_others_read() -> None:
    def forward(m, x):
        y = x.transpose(1, 2)
        return y.transpose(1, 2).sin(), y

    run(PASS, program(forward), X).becomes("%0 = transpose(x, 1, 2)\n%1 = sin(x)\nreturn %1, %0")


def test_a_chain_of_them() -> None:
    def forward(m, x):
        return ((x + 0) * 1).reshape(2, 5, 8) / 1

    run(PASS, program(forward), X).becomes("return x")


def test_dynamic_sizes() -> None:
    def forward(m, x, y):
        return (
            x[:, 0 : x.shape[1]].sin(),
            x.reshape(x.shape[0], -1).sin(),
            x.expand(x.shape[0], x.shape[1]).sin(),
            (x + torch.zeros(x.shape[1])).sin(),
            (x[:, : y.shape[1]]).sin(),
        )

    dynamic = {"x": {0: "batch", 1: "seq"}, "y": {1: "other"}}
    ran = run(PASS, program(forward), randn(2, 5), randn(1, 4), dynamic=dynamic)
    ran.counts(slice=1, reshape=0, expand=0, add=0)
    ran.agrees(randn(3, 4), randn(1, 3)).agrees(randn(1, 9), randn(1, 2))
