from __future__ import annotations

import torch

from graphopt.passes import fold_constants
from graphopt.passes.simplify_arithmetic import PASS
from tests._models import randn
from tests.passes._harness import program, run

X, Y = randn(2, 5, 8), randn(2, 5, 8, seed=1).abs() + 0.5

SIMPLER = {
    "neg": [lambda x, y: x * -1, lambda x, y: -1.0 * x, lambda x, y: x / -1],
    "mul": [
        *(lambda x, y: y**2, lambda x, y: torch.pow(y, 2.0), lambda x, y: y.pow(torch.tensor(2.0))),
        *(lambda x, y: x / 8, lambda x, y: x / torch.tensor(-0.25), lambda x, y: x / torch.full((8,), 4.0)),
        *(lambda x, y: 2 * x * 3, lambda x, y: 2 * (3.5 * x), lambda x, y: x * 5 / 0.25),
        lambda x, y: x * torch.tensor(0.3) * 0.2 * 0.1,
    ],
    "sub": [lambda x, y: x + -y, lambda x, y: -y + x, lambda x, y: x + torch.negative(y)],
    "add": [lambda x, y: x - -y],
    "sqrt": [lambda x, y: y**0.5],
    "rsqrt": [lambda x, y: y**-0.5, lambda x, y: y.sqrt().reciprocal()],
    "reciprocal": [lambda x, y: y**-1],
    "div": [lambda x, y: x * y.reciprocal(), lambda x, y: y.reciprocal() * x],
}
OTHERS = {
    "times 0": lambda x: x * 0,
    "0 minus": lambda x: 0 - x,
    "a third": lambda x: x / 3,
    "a reciprocal that is denormal": lambda x: x / 2.0**127,
    "rounded on purpose": lambda x: (x + 12582912.0) - 12582912.0,
    "cubed": lambda x: x**3,
    "rounded quotient": lambda x: torch.div(x, 2, rounding_mode="floor"),
    "added twice": lambda x: torch.sub(x, -x, alpha=2),
    "wider": lambda x: x * torch.full((8,), -1.0, dtype=torch.float64),
    "broadcast": lambda x: x * torch.full((3, 1, 1, 1), -1.0),
    "negated once": lambda x: -x,
}


def test_simpler_forms() -> None:
    def forward(m, x, y):
        return [function(x, y).sin() for functions in SIMPLER.values() for function in functions]

    ran = run([fold_constants.PASS, PASS], program(forward), X, Y)
    ran.counts(**{op: len(functions) for op, functions in SIMPLER.items()}, pow=0)


def test_what_is_already_there() -> None:
    def forward(m, x):
        return (-x.neg()).sin(), (x**1).sin(), torch.negative(-x).sin()

    run(PASS, program(forward), X).becomes("""
        %0 = sin(x)
        %1 = sin(x)
        %2 = sin(x)
        return %0, %1, %2
    """)


def test_what_becomes_of_the_graph() -> None:
    def forward(m, x, y):
        return x / torch.sqrt(y)

    run(PASS, program(forward), X, Y).becomes(
        "%0 = rsqrt(y)\n%1 = mul(x, %0)\nreturn %1",
        before="%0 = sqrt(y)\n%1 = div(x, %0)\nreturn %1",
    )


def test_what_would_change_a_number_stays() -> None:
    def forward(m, x):
        return [function(x) for function in OTHERS.values()]

    run(PASS, program(forward), X).stays()


def test_integers_stay() -> None:
    def forward(m, x):
        return x * 2 * 3, x**2, x / 2, x * 1.5 * 2

    ran = run(PASS, program(forward), torch.arange(5)).counts(pow=1, div=1)
    assert ran.graph.op_counts()["aten.mul"] == 4


def test_a_value_that_others_read_is_refused() -> None:
    def forward(m, x, y):
        z, root = x * 3, y.sqrt()
        return z * 5, z, x / root, root

    ran = run(PASS, program(forward), X, Y).refuses("mul is also read by output")
    ran.refuses("sqrt is also read by output")


def test_factors_that_undo_each_other_are_refused() -> None:
    def forward(m, x):
        return x * 1e30 * 1e-30

    run(PASS, program(forward), X).refuses("one factor enlarges, the other shrinks")


def test_the_ends_of_the_range() -> None:
    """Zeros, infinities, NaN and denormals come out as they did."""

    def forward(m, x):
        return x**0.5, x**-0.5, x**2, 1 / x.sqrt(), x * 0, x / 4, x * 3 * 5

    inputs = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1.0, 3e38])
    run(PASS, program(forward), inputs)


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return (x**2).mean(-1, keepdim=True), x / x.shape[1], x + -x

    ran = run(PASS, program(forward), X, dynamic={"x": {0: "batch", 1: "seq"}})
    ran.counts(pow=0, neg=0, div=1).agrees(randn(3, 4, 8)).agrees(randn(1, 9, 8))
