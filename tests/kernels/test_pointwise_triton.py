"""The generator of pointwise kernels: functions over hostile numbers, types, layouts, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from graphopt.ir.op import Sample
from graphopt.kernels import _triton, pointwise
from graphopt.kernels._activations import TORCH
from graphopt.kernels._pointwise_triton import merged_axes
from graphopt.kernels._program import COMPARISONS, FUNCTIONS
from tests.kernels.test_ops import assert_right, cast, outputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),  # `pytest -m gpu` runs them there, compiled
]

UNARY = [name for name, function in FUNCTIONS.items() if function.arity == 1]
ACTIVATIONS = [name for name in TORCH if name != "none"]
ARITHMETIC = ["add", "sub", "mul", "div", "maximum", "minimum"]
NEVER = [math.nan, math.inf, -math.inf]


def hostile(positive: bool = False) -> torch.Tensor:
    """Magnitudes from 1e-30 to 60, either sign, so that no ratio of two of them overflows."""
    size = torch.logspace(-30, math.log10(60), 400, dtype=torch.float64).float()
    return (size if positive else torch.cat([-size, size])).to(DEVICE)


def launched(inputs: list[torch.Tensor], program: str) -> torch.Tensor:
    assert pointwise.TRITON.refuses(inputs, program) is None
    result: torch.Tensor = pointwise.TRITON.launch(inputs, program)
    return result


def assert_close_everywhere(mine: torch.Tensor, inputs: list[torch.Tensor], program: str, ulp: float) -> None:
    """Each element by itself: within so many ulp of its own exact value, or of the smallest normal number."""
    exact = pointwise.OP.reference([x.double() for x in inputs], program)
    finest = torch.finfo(mine.dtype)
    allowed = ulp * finest.eps * exact.abs().clamp_min(finest.tiny)
    assert ((mine.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("name", UNARY)
def test_functions_are_within_ulps_of_every_value(name: str) -> None:
    x = hostile(positive=name in ("log", "sqrt", "rsqrt"))
    if name == "square":
        x = x[x.abs() > 1e-18]
    assert_close_everywhere(launched([x], f"%1 = {name}(%0)"), [x], f"%1 = {name}(%0)", 4)


# How far below 0 an activation ends in a difference of nearly equal numbers: there it is torch's, no better.
CANCELS = {"gelu": -0.5, "gelu_tanh": -0.5, "mish": -40, "softplus": -60, "sigmoid": -60}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_within_ulps_of_every_value(name: str) -> None:
    x = hostile()
    x = x[x > CANCELS.get(name, -math.inf)]
    program = f"%1 = {name}(%0, 0.75)"
    assert_close_everywhere(launched([x], program), [x], program, 16)


@pytest.mark.parametrize("name", [*ARITHMETIC, "pow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_arithmetic_is_right(name: str, dtype: torch.dtype) -> None:
    x, y = torch.rand(400) * 4 + 0.1, torch.randn(400)
    programs = [f"%2 = {name}(%0, %1)"]
    if name not in ("maximum", "minimum"):  # which take tensors only
        programs += [f"%2 = {name}(%1, 3)\n%3 = add(%2, %0)", f"%2 = {name}(2.5, %1)"]
    for program in programs:
        sample = cast(Sample(([x.to(DEVICE), y.to(DEVICE)], program)), dtype)
        assert_right(pointwise.OP, sample, outputs(pointwise.TRITON.launch, sample))


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 8, -1, -2, 0.5, -0.5, 1.5, 0.3, 17])
def test_powers_are_right(exponent: float) -> None:
    x = torch.rand(400, device=DEVICE) * 2 + 0.2
    x = torch.cat([x, -x]) if isinstance(exponent, int) else x
    program = f"%1 = pow(%0, {exponent})"
    assert_close_everywhere(launched([x], program), [x], program, 8)


@pytest.mark.parametrize("name", [*UNARY, *ACTIVATIONS, *ARITHMETIC])
def test_what_is_not_a_number_and_what_is_infinite_is_torch_s(name: str) -> None:
    x = torch.tensor([*NEVER, 0.0, 1.0], device=DEVICE)
    arity = FUNCTIONS[name].arity
    rest = "" if arity == 1 else ", 0.5" if name in TORCH else ", %1"
    inputs = [x.repeat_interleave(5), x.repeat(5)]
    program = f"%2 = {name}(%0{rest})"
    if name == "gelu":  # torch has NaN for infinity on the CPU, and infinity on a GPU
        inputs = [x[x != math.inf] for x in inputs]
    expected, mine = pointwise.OP.reference(inputs, program), launched(inputs, program)
    assert torch.equal(mine.isnan(), expected.isnan())
    assert torch.equal(mine.isinf(), expected.isinf())
    assert torch.equal(mine.isinf() & (mine > 0), expected.isinf() & (expected > 0))


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_comparisons_see_what_torch_sees(name: str, dtype: torch.dtype) -> None:
    """A number in the values' type: 0.1 is no float16, and equal to what is next to it there."""
    x = torch.tensor([0.1, -0.1, 0.0999, 0.2, math.nan], device=DEVICE).to(dtype)
    for condition in (f"{name}(%0, 0.1)", f"{name}(%0, %1)", f"{name}(0.1, %1)"):
        program = f"%2 = {condition}\n%3 = where(%2, 1.0, %0)"
        found = launched([x, x.flip(0)], program)
        expected = pointwise.OP.reference([x, x.flip(0)], program)
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


def test_a_comparison_sees_a_sum_rounded() -> None:
    x = torch.tensor([2048.0], device=DEVICE, dtype=torch.float16)
    program = "%1 = add(%0, 1.0)\n%2 = eq(%1, %0)\n%3 = where(%2, %0, 0.0)"  # 2049 is no float16
    assert launched([x], program) == pointwise.OP.reference([x], program) == 2048


def test_booleans_choose() -> None:
    x, seen = torch.randn(7, 9, device=DEVICE), torch.rand(7, 9, device=DEVICE) < 0.5
    for program in ("%2 = where(%1, %0, 0.0)", "%2 = to(%1, float32)\n%3 = mul(%2, %0)"):
        assert torch.equal(launched([x, seen], program), pointwise.OP.reference([x, seen], program))


LAYOUTS = {
    "a vector": lambda: torch.randn(6),
    "a column": lambda: torch.randn(5, 1),
    "a number": lambda: torch.randn(()),
    "a plane": lambda: torch.randn(4, 1, 6),
    "transposed": lambda: torch.randn(6, 5, 4).permute(2, 1, 0),
    "every other": lambda: torch.randn(4, 5, 12)[..., ::2],
    "one value seen everywhere": lambda: torch.randn(1, 1, 1).expand(4, 5, 6),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_in_its_place(layout: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 5, 6, device=DEVICE), LAYOUTS[layout]().to(DEVICE)
    for inputs in ([x, y], [y, x], [x.transpose(0, 1).contiguous().transpose(0, 1), y]):
        assert torch.equal(launched(inputs, "%2 = sub(%0, %1)"), inputs[0] - inputs[1])


def test_axes_are_merged_as_far_as_all_inputs_allow() -> None:
    assert merged_axes((4, 5, 6), [(30, 6, 1)]) == ((), ((1,),))
    assert merged_axes((4, 5, 6), [(30, 6, 1), (0, 0, 1)]) == ((6,), ((1, 6), (1, 0)))
    assert merged_axes((4, 1, 6), [(6, 99, 1)]) == ((), ((1,),))
    assert merged_axes((), [()]) == ((), ((0,),))


def test_refusals_name_the_reason() -> None:
    x, seen = torch.randn(3, device=DEVICE), torch.ones(3, dtype=torch.bool, device=DEVICE)
    refusals = [
        ([x.double()], "%1 = exp(%0)", "computes in float64"),
        ([x], "%1 = to(%0, float64)\n%2 = to(%1, float32)", "computes in float64"),
        ([x, x], "%2 = elu(%0, %1)", "the parameter of elu is a tensor"),
        ([seen, seen, x], "%3 = lt(%0, %1)\n%4 = where(%3, %2, 0.0)", "lt reads booleans"),
    ]
    for inputs, program, reason in refusals:
        said = pointwise.TRITON.refuses(inputs, program)
        assert said is not None
        assert reason in said
