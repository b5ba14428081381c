"""The generator of kernels over rows: long rows, errors of sums, hostile numbers, layouts, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from graphopt.ir.op import Sample
from graphopt.kernels import _reduction_triton, _triton, pointwise
from graphopt.kernels._pointwise_triton import steps_of
from graphopt.kernels._program import REDUCTIONS
from graphopt.kernels._reduction_triton import levels_of, taken_apart
from graphopt.kernels._tuning import Config
from tests.kernels._faces import DEVICE, MARKS, assert_fences_hold, launched
from tests.kernels.test_ops import assert_right, cast, outputs

pytestmark = MARKS

CENTRED = "%1 = mean(%0)\n%2 = sub(%0, %1)\n%3 = square(%2)\n%4 = mean(%3)\n%5 = sqrt(%4)\n%6 = div(%2, %5)"
SCORES = "%2 = mul(%0, 0.5)\n%3 = add(%2, %1)\n%4 = softmax(%3)"


def run(inputs: list[torch.Tensor], program: str, dims: int = 1, keepdim: bool = True) -> torch.Tensor:
    assert pointwise.TRITON.refuses(inputs, program, dims, keepdim) is None
    result: torch.Tensor = pointwise.TRITON.launch(inputs, program, dims, keepdim)
    return result


def in_blocks(monkeypatch: pytest.MonkeyPatch, block: int, rows: int = 1) -> None:
    """Let rows be read in blocks, as long ones are."""
    config = Config({"BLOCK_R": rows, "BLOCK_D": block}, 1)
    monkeypatch.setattr(_reduction_triton, "_configs", lambda *sizes: [config])


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("length", [1, 5, 16, 33])
@pytest.mark.parametrize("block", [None, 16])
def test_every_reduction_is_right(
    name: str, length: int, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block is not None:
        in_blocks(monkeypatch, block, rows=2)
    x = torch.randn(3, length, device=DEVICE)
    program = f"%1 = mul(%0, 1.25)\n%2 = {name}(%1)\n%3 = sub(%2, 0.5)"
    sample = Sample(([x], program, 1))
    assert_right(pointwise.OP, sample, outputs(pointwise.TRITON.launch, sample))


@pytest.mark.parametrize("program", [CENTRED, SCORES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", ["whole rows", "a value a row"])
def test_long_rows_are_read_in_blocks(
    program: str, dtype: torch.dtype, keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks(monkeypatch, 32)
    inputs = [torch.randn(3, 100, device=DEVICE) for _ in range(1 + (program is SCORES))]
    if keep == "a value a row":
        last = program.count("\n") + len(inputs)
        program += f"\n%{last + 1} = amax(%{last})"
    sample = cast(Sample((inputs, program, 1)), dtype)
    assert_right(pointwise.OP, sample, outputs(pointwise.TRITON.launch, sample))


def test_nothing_outside_of_rows_in_blocks_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    in_blocks(monkeypatch, 16, rows=2)
    x, y = torch.randn(3, 37, device=DEVICE), torch.randn(3, 1, device=DEVICE)
    assert_fences_hold(pointwise.OP, Sample(([x, y], SCORES, 1)), monkeypatch)
    assert_fences_hold(pointwise.OP, Sample(([x], "%1 = mean(%0)", 1, False)), monkeypatch)


def test_rows_that_no_program_can_hold() -> None:
    x = torch.randn(2, 40000, device=DEVICE)
    for program in ("%1 = square(%0)\n%2 = sum(%1)", "%1 = norm(%0)\n%2 = div(%0, %1)"):
        sample = Sample(([x], program, 1))
        assert_right(pointwise.OP, sample, outputs(pointwise.TRITON.launch, sample))


@pytest.mark.parametrize("length", [7, 1000, 12000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sums_keep_the_stated_bound(length: int, dtype: torch.dtype) -> None:
    """(n / 32 + 10) * 2**-24 of the magnitudes, of numbers that cancel; and the rounding at the end."""
    x = torch.randn(4, length, device=DEVICE).to(dtype)
    x = torch.cat([x, -x.flip(-1), 1e-3 * x], -1)
    exact = x.double().sum(-1)
    allowed = (x.shape[-1] / 32 + 10) * 2.0**-24 * x.double().abs().sum(-1)
    allowed += torch.finfo(dtype).eps * exact.abs()
    assert ((run([x], "%1 = sum(%0)", keepdim=False).double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("never", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_and_what_is_infinite_is_torch_s(
    name: str, block: int | None, never: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block is not None:
        in_blocks(monkeypatch, block)
    x = torch.randn(3, 21, device=DEVICE)
    x[0, 2] = x[1, 20] = never
    x[2, 3], x[2, 18] = math.inf, -math.inf
    program = f"%1 = {name}(%0)"
    found, expected = run([x], program), pointwise.OP.reference([x], program, 1)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    assert torch.equal(found.isinf() & (found > 0), expected.isinf() & (expected > 0))


def test_half_precision_is_rounded_once() -> None:
    """torch rounds the squares, whose sum is then infinite in float16; the kernel's is in float32."""
    x = torch.full((2, 64), 300.0, device=DEVICE, dtype=torch.float16)
    found = run([x], "%1 = square(%0)\n%2 = sum(%1)\n%3 = sqrt(%2)")
    assert torch.equal(found, torch.full_like(found, 2400.0))


LAYOUTS = {
    "a vector": lambda: torch.randn(6),
    "a value a row": lambda: torch.randn(4, 5, 1),
    "a row for all": lambda: torch.randn(1, 5, 6),
    "a number": lambda: torch.randn(()),
    "transposed": lambda: torch.randn(6, 5, 4).permute(2, 1, 0),
    "every other": lambda: torch.randn(4, 5, 12)[..., ::2],
    "one value seen everywhere": lambda: torch.randn(1, 1, 1).expand(4, 5, 6),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_layout_is_read_in_its_place(layout: str, dims: int) -> None:
    x, y = torch.randn(4, 5, 6, device=DEVICE), LAYOUTS[layout]().to(DEVICE)
    for inputs in ([x, y], [y, x], [x.transpose(0, 1).contiguous().transpose(0, 1), y]):
        sample = Sample((inputs, "%2 = sub(%0, %1)\n%3 = sum(%2)\n%4 = add(%3, %2)", dims))
        assert_right(pointwise.OP, sample, outputs(pointwise.TRITON.launch, sample))


def test_one_value_seen_everywhere_counts_as_often_as_it_is_seen() -> None:
    x = torch.ones(1, 1, device=DEVICE).expand(3, 6)
    assert torch.equal(run([x], "%1 = sum(%0)"), torch.full((3, 1), 6.0, device=DEVICE))
    assert torch.equal(run([x], "%1 = softmax(%0)"), torch.full((3, 6), 1 / 6, device=DEVICE))


def test_powers_of_a_value_a_row() -> None:
    x = torch.rand(3, 6, device=DEVICE) + 0.5
    sample = Sample(([x], "%1 = sum(%0)\n%2 = pow(%1, 0.3)\n%3 = pow(2.0, %2)\n%4 = pow(%3, %1)", 1))
    assert_right(pointwise.OP, sample, outputs(pointwise.TRITON.launch, sample))


def test_a_softmax_is_two_turns_over_its_rows() -> None:
    plain = taken_apart("%1 = exp(%0)\n%2 = softmax(%1)\n%3 = mean(%2)", 1, 8)
    assert plain == (
        "%1 = exp(%0)\n%2 = amax(%1)\n%3 = sub(%1, %2)\n%4 = exp(%3)\n%5 = sum(%4)\n%6 = div(%4, %5)\n"
        "%7 = sum(%6)\n%8 = div(%7, 8)"
    )
    levels, reductions = levels_of(steps_of(plain, (torch.float32,)), 1)
    assert levels == (0, 0, 1, 1, 1, 2, 2, 3)
    assert reductions == ((1,), (4,), (6,))


def test_reductions_that_do_not_need_each_other_share_a_turn() -> None:
    program = "%2 = amax(%0)\n%3 = amin(%0)\n%4 = sub(%2, %3)\n%5 = sum(%1)\n%6 = mul(%5, %4)"
    assert levels_of(steps_of(program, (torch.float32,) * 2), 2)[1] == ((0, 1, 3),)


def test_rows_of_nothing_are_refused() -> None:
    x = torch.randn(3, 0, device=DEVICE)
    assert pointwise.TRITON.refuses([x], "%1 = sum(%0)", 1) == "rows have no elements"
    assert _triton.triton is not None
    empty = torch.randn(0, 3, device=DEVICE)
    assert run([empty], "%1 = sum(%0)").shape == (0, 1)
    assert launched(pointwise.OP, Sample(([empty], "%1 = sum(%0)", 1)))[0].numel() == 0
