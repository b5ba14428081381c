from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from graphopt.passes.fuse_activation import PASS
from tests._models import randn
from tests.passes._harness import program, run, text

X = randn(3, 7)
C = math.sqrt(2 / math.pi)

SPELLINGS: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {
    "gelu(x, approximate=tanh)": [
        ACT2FN["gelu_new"],
        ACT2FN["gelu_fast"],
        ACT2FN["gelu_accurate"],
        lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.044715 * x**3))),
        lambda x: x * (0.5 * (1 + torch.tanh((0.044715 * (x * x * x) + x) * C))),
        lambda x: 0.5 * (x * (torch.tanh(C * (x + 0.044715 * (x * x**2))) + 1)),
        lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x.square()))),
        lambda x: x * torch.sigmoid(2 * C * (x + 0.044715 * x.pow(3))),
        lambda x: x / (1 + torch.exp(-2 * C * x * (1 + 0.044715 * x * x))),
    ],
    "gelu(x, approximate=none)": [
        ACT2FN["gelu_python"],
        lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
        lambda x: (torch.erf(x * math.sqrt(0.5)) + 1) * x * 0.5,
        lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.41421356)),
        lambda x: 0.5 * x * torch.erfc(-x / math.sqrt(2)),
        lambda x: x * torch.special.ndtr(x),
        lambda x: x - x * torch.special.ndtr(-x),
        lambda x: 0.5 * x * (1 + torch.erf(x / torch.tensor(math.sqrt(2)))),
    ],
    "silu(x)": [
        lambda x: x * torch.sigmoid(x),
        lambda x: torch.sigmoid(x) * x,
        lambda x: x / (1 + torch.exp(-x)),
        lambda x: x * (1 + (-x).exp()).reciprocal(),
        lambda x: 0.5 * x * (1 + torch.tanh(x / 2)),
    ],
    "graphopt.quick_gelu(x, 1.702)": [ACT2FN["quick_gelu"], lambda x: x / (1 + torch.exp(-1.702 * x))],
    "graphopt.quick_gelu(x, 0.75)": [
        lambda x: x * torch.sigmoid(0.75 * x),
        lambda x: 0.5 * x * (1 + torch.tanh(0.375 * x)),
    ],
    "sigmoid(x)": [
        lambda x: 1 / (1 + torch.exp(-x)),
        lambda x: (1 + torch.exp(-x)) ** -1,
        lambda x: 0.5 * (torch.tanh(0.5 * x) + 1),
        lambda x: 1 - torch.sigmoid(-x),
    ],
    "tanh(x)": [lambda x: 2 * torch.sigmoid(2 * x) - 1, lambda x: 1 - 2 / (1 + torch.exp(2 * x))],
    "mish(x)": [
        lambda x: x * torch.tanh(F.softplus(x)),
        lambda x: x * torch.log1p(torch.exp(x)).tanh(),
        lambda x: torch.tanh(torch.logaddexp(x, torch.zeros_like(x))) * x,
    ],
    "softplus(x, 1)": [
        lambda x: torch.logaddexp(x, torch.zeros_like(x)),
        lambda x: torch.relu(x) + torch.log1p(torch.exp(-x.abs())),
        lambda x: -F.logsigmoid(-x),
    ],
    "softplus(x, 2)": [lambda x: torch.logaddexp(2 * x, torch.zeros_like(x)) / 2],
    "hardswish(x)": [
        lambda x: x * F.relu6(x + 3) / 6,
        lambda x: x * (F.relu6(x + 3) / 6),
        lambda x: x * F.hardtanh(x + 3, 0, 6) * (1 / 6),
        lambda x: x * F.hardsigmoid(x),
        lambda x: torch.clamp(x / 6 + 0.5, 0, 1) * x,
    ],
    "hardsigmoid(x)": [
        lambda x: F.relu6(x + 3) / 6,
        lambda x: (x + 3).clamp(0, 6) / 6,
        lambda x: torch.clamp(x / 6 + 0.5, min=0, max=1),
    ],
    "relu(x)": [
        lambda x: x.clamp(min=0),
        lambda x: torch.maximum(x, torch.zeros_like(x)),
        lambda x: torch.max(x, torch.tensor(0.0)),
        lambda x: (x + x.abs()) / 2,
        lambda x: x * (x > 0),
        lambda x: F.threshold(x, 0, 0),
        lambda x: x.masked_fill(x < 0, 0),
    ],
    "relu6(x)": [
        lambda x: x.clamp(0, 6),
        lambda x: F.hardtanh(x, 0, 6),
        lambda x: torch.relu(x).clamp(max=6),
        lambda x: torch.minimum(torch.relu(x), torch.full_like(x, 6)),
    ],
    "leaky_relu(x, 0.1)": [
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: torch.maximum(x, 0.1 * x),
        lambda x: torch.relu(x) - 0.1 * torch.relu(-x),
    ],
    "elu(x, 1)": [
        lambda x: torch.where(x > 0, x, torch.expm1(x)),
        lambda x: torch.relu(x) + torch.expm1(x.clamp(max=0)),
        lambda x: torch.where(x < 0, torch.exp(x) - 1, x),
    ],
    "elu(x, 0.5)": [lambda x: torch.where(x > 0, x, 0.5 * torch.expm1(x))],
    "celu(x, 2)": [lambda x: torch.relu(x) + torch.clamp(2 * torch.expm1(x / 2), max=0)],
    "selu(x)": [
        lambda x: 1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * torch.expm1(x)),
        lambda x: 1.0507009873554805 * F.elu(x, 1.6732632423543772),
    ],
    "log_sigmoid(x)": [
        lambda x: -F.softplus(-x),
        lambda x: torch.minimum(x, 0 * x) - (-x.abs()).exp().log1p(),
    ],
}

OTHERS = {
    "another slope": lambda x: 0.5 * x * (1 + torch.tanh(0.9 * (x + 0.044715 * x**3))),
    "a square": lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.044715 * x**2))),
    "two more": lambda x: 0.5 * x * (2 + torch.tanh(C * (x + 0.044715 * x**3))),
    "not halved": lambda x: x * (1 + torch.tanh(C * (x + 0.044715 * x**3))),
    "one less": lambda x: 0.5 * x * (torch.erf(x / math.sqrt(2)) - 1),
    "another gate": lambda x: 0.5 * x * (1 + torch.erf((x + 1) / math.sqrt(2))),
    "erf of the logistic kind": lambda x: 0.5 * x * (1 + torch.erf(x / 1.702)),
    "the square of relu": lambda x: torch.relu(x).square(),
    "softsign": F.softsign,
    "twice silu": lambda x: 2 * x * torch.sigmoid(x),
    "an absolute value": lambda x: torch.where(x > 0, x, -x),
}


def spelled(*functions):
    """A program that computes each; several in one, since capturing is what takes the time."""

    def forward(m, x):
        return tuple(function(x) for function in functions)

    return program(forward)


def refused(function, x: torch.Tensor, reason: str) -> None:
    def forward(m, x):
        return function(x)

    ran = run(PASS, program(forward), x).stays()
    reasons = [row.reason for row in ran.remarks.of_kind("missed")]
    assert any(re.search(reason, found) for found in reasons), reasons


@pytest.mark.parametrize("expected", SPELLINGS)
def test_spellings(expected: str) -> None:
    functions = SPELLINGS[expected]
    ran = run(PASS, spelled(*functions), X)
    assert text(ran.graph).splitlines()[:-1] == [f"%{i} = {expected}" for i in range(len(functions))]


def test_what_only_looks_like_it_stays() -> None:
    ran = run(PASS, spelled(*OTHERS.values()), X).stays()
    assert not ran.remarks.of_kind("missed")


def test_named_activations_stay() -> None:
    named = (F.relu, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.celu, F.selu, F.softplus, F.hardswish)
    ran = run(PASS, spelled(*named, F.hardsigmoid, F.leaky_relu, F.logsigmoid, torch.tanh), X).stays()
    assert not ran.remarks.of_kind("missed")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.0447 * x**3))), r"differs from gelu \(tanh\) by"),
        (lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.0455 * x**3))), r"differs from gelu \(tanh\) by"),
        (lambda x: torch.log(1 + torch.exp(x)), "is inf at .*, where softplus is"),
        (lambda x: torch.where(x > 0, x, torch.zeros_like(x)), "is 0 at nan, where relu is nan"),
        (lambda x: torch.exp(x) / (1 + torch.exp(x)), "is nan at .*, where sigmoid is 1"),
    ],
)
def test_what_differs_somewhere_is_refused(function, reason: str) -> None:
    refused(function, X, reason)


def test_a_gate_of_another_value_stays() -> None:
    def forward(m, x, y):
        return 0.5 * x * (1 + torch.erf(y / math.sqrt(2)))

    run(PASS, program(forward), X, randn(3, 7, seed=1)).stays()


def test_a_gate_for_a_row_stays() -> None:
    def forward(m, x):
        return x * torch.sigmoid(x.mean(-1, keepdim=True))

    run(PASS, program(forward), X).stays()


def test_an_intermediate_that_is_read_twice_is_refused() -> None:
    def forward(m, x):
        gate = 1 + torch.erf(x / math.sqrt(2))
        return 0.5 * x * gate, gate

    run(PASS, program(forward), X).refuses(r"add is also read by output")


def test_the_input_may_be_read_by_others() -> None:
    def forward(m, x):
        y = x.sin()
        return ACT2FN["gelu_new"](y) + y

    run(PASS, program(forward), X).counts(gelu=1, tanh=0, add=1)


def test_one_inside_another() -> None:
    def forward(m, x):
        return F.silu(x.clamp(min=0)) * torch.sigmoid(x / (1 + torch.exp(-x)))

    run(PASS, program(forward), X).counts(silu=2, relu=1, sigmoid=1, exp=0)


def test_computed_in_float32_between_casts() -> None:
    def forward(m, x):
        wide = x.float()
        return (wide * torch.sigmoid(wide)).to(x.dtype)

    run(PASS, program(forward), X.bfloat16()).becomes("""
        %0 = silu(x)
        return %0
    """)


def test_a_step_in_lower_precision_stays() -> None:
    def forward(m, x):
        return x * torch.sigmoid(x.half()).float()

    run(PASS, program(forward), X).stays()


def test_float64_wants_exact_constants() -> None:
    ran = run(PASS, spelled(ACT2FN["gelu_new"], F.silu), X.double())
    ran.counts(gelu=1, tanh=0)
    refused(SPELLINGS["gelu(x, approximate=none)"][3], X.double(), "differs from gelu by")


def test_integers_are_refused() -> None:
    def forward(m, x):
        return x / 2 * (1 + torch.erf(x / math.sqrt(2)))

    run(PASS, program(forward), torch.arange(-3, 4)).refuses("the value is torch.int64, not floating")


def test_dynamic_sizes() -> None:
    ran = run(PASS, spelled(ACT2FN["gelu_new"]), X, dynamic={"x": {0: "batch", 1: "width"}})
    ran.counts(gelu=1, tanh=0).agrees(randn(5, 2)).agrees(randn(1, 11))
