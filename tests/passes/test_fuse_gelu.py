from __future__ import annotations

import math

import torch
from transformers.activations import ACT2FN

from graphopt.passes.fuse_gelu import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(3, 7)
C = math.sqrt(2 / math.pi)

TANH = {
    "gelu_new": ACT2FN["gelu_new"],
    "gelu_fast": ACT2FN["gelu_fast"],
    "gelu_accurate": ACT2FN["gelu_accurate"],
    "gelu_python_tanh": lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.044715 * x**3))),
    "cube of products": lambda x: x * (0.5 * (1 + torch.tanh((0.044715 * (x * x * x) + x) * C))),
    "cube of a square": lambda x: 0.5 * (x * (torch.tanh(C * (x + 0.044715 * (x * x**2))) + 1)),
}
ERF = {
    "gelu_python": ACT2FN["gelu_python"],
    "divided": lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
    "multiplied": lambda x: (torch.erf(x * math.sqrt(0.5)) + 1) * x * 0.5,
    "rounded constant": lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.41421356)),
}
OTHERS = {
    "another cubic": lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.0447 * x**3))),
    "another slope": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
    "a square": lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.044715 * x**2))),
    "two more": lambda x: 0.5 * x * (2 + torch.tanh(C * (x + 0.044715 * x**3))),
    "not halved": lambda x: x * (1 + torch.tanh(C * (x + 0.044715 * x**3))),
    "one less": lambda x: 0.5 * x * (torch.erf(x / math.sqrt(2)) - 1),
    "another gate": lambda x: 0.5 * x * (1 + torch.erf((x + 1) / math.sqrt(2))),
    "a double alpha": lambda x: 0.5 * x * torch.add(1 + torch.erf(x / math.sqrt(2)), x, alpha=0),
    "erf of the logistic kind": lambda x: 0.5 * x * (1 + torch.erf(x / 1.702)),
    "quick_gelu": ACT2FN["quick_gelu"],
    "tanh of erf's argument": lambda x: 0.5 * x * (1 + torch.tanh(x / math.sqrt(2))),
}


def spelled(*functions):
    """A program that computes each; several in one, since capturing is what takes the time."""

    def forward(m, x):
        return tuple(function(x) for function in functions)

    return program(forward)


def test_the_tanh_form() -> None:
    ran = run(PASS, spelled(*TANH.values()), X)
    ran.becomes(
        "\n".join([f"%{i} = gelu(x, approximate=tanh)" for i in range(6)] + ["return %0, %1, %2, %3, %4, %5"])
    )


def test_the_exact_form() -> None:
    ran = run(PASS, spelled(*ERF.values()), X)
    ran.becomes(
        "\n".join([f"%{i} = gelu(x, approximate=none)" for i in range(4)] + ["return %0, %1, %2, %3"])
    )


def test_what_only_looks_like_it_stays() -> None:
    run(PASS, spelled(*OTHERS.values()), X).stays()


def test_a_gate_of_another_value_stays() -> None:
    def forward(m, x, y):
        return 0.5 * x * (1 + torch.erf(y / math.sqrt(2)))

    run(PASS, program(forward), X, randn(3, 7, seed=1)).stays()


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


def test_integers_are_refused() -> None:
    def forward(m, x):
        return x / 2 * (1 + torch.erf(x / math.sqrt(2)))

    run(PASS, program(forward), torch.arange(-3, 4)).refuses("the value is torch.int64, not floating")


def test_dynamic_sizes() -> None:
    ran = run(PASS, spelled(TANH["gelu_new"]), X, dynamic={"x": {0: "batch", 1: "width"}})
    ran.counts(gelu=1, tanh=0).agrees(randn(5, 2)).agrees(randn(1, 11))
