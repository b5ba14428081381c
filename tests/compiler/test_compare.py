from __future__ import annotations

import math

import pytest
import torch

from graphopt.compiler import compare as module
from graphopt.compiler.compare import Comparison, compare, relative_error
from graphopt.compiler.tolerance import FACTOR, limit
from tests._models import randn

INF, NAN = math.inf, math.nan
FLOOR = 8.0


def judge(before: torch.Tensor, after: torch.Tensor, reference: torch.Tensor | None = None) -> Comparison:
    return compare(before, after, before.double() if reference is None else reference, FLOOR)


def test_the_error_is_relative_to_the_largest_value_of_the_row() -> None:
    reference = torch.tensor([[1.0, -8.0], [0.5, 0.25]], dtype=torch.float64).repeat(1, 8)
    actual = (reference + torch.tensor([[0.0, 0.5], [0.125, 0.0]], dtype=torch.float64).repeat(1, 8)).float()
    assert relative_error(actual, reference) == 0.25
    assert relative_error(reference.float(), reference) == 0.0
    assert relative_error(torch.tensor(3.0), torch.tensor(2.0, dtype=torch.float64)) == 0.5


def test_short_rows_are_measured_together() -> None:
    """Images of one pixel: a value near 0 by chance is as exact as its neighbours."""
    reference = torch.tensor([1.0, 0.001, 2.0, -1.0], dtype=torch.float64).reshape(1, 4, 1, 1)
    actual = (reference + 1e-6).float()
    assert relative_error(actual, reference) == pytest.approx(5e-7, rel=0.2)


def test_complex_values_are_measured_by_their_distance() -> None:
    reference = torch.tensor([3 + 4j, 1j], dtype=torch.complex128)
    actual = (reference + torch.tensor([1j, 0])).to(torch.complex64)
    assert relative_error(actual, reference) == pytest.approx(0.2)
    assert not compare(reference.to(torch.complex64), actual, reference, FLOOR).ok


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_floor_is_counted_in_the_units_of_the_dtype(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    before = torch.ones(4, dtype=dtype)
    good, bad = before.clone(), before.clone()
    good[0], bad[0] = 1 + 8 * eps, 1 + 9 * eps
    assert judge(before, good).ok
    found = judge(before, bad)
    assert not found.ok
    assert found.error_after == 9 * eps
    assert "exceeds" in found.reason


def test_a_candidate_may_err_twice_as_much_as_the_original() -> None:
    reference = torch.ones(4, dtype=torch.float64)
    before = torch.full((4,), 1.001)
    assert judge(before, torch.full((4,), 1.0019), reference).ok
    assert not judge(before, torch.full((4,), 1.0021), reference).ok
    assert limit(0.25, torch.float32, FLOOR) == FACTOR * 0.25
    assert limit(0.0, torch.int64, FLOOR) == 0.0


def test_integers_and_booleans_are_exact() -> None:
    before = torch.tensor([1, 2, 3])
    assert judge(before, before.clone()).ok
    assert judge(before, torch.tensor([1, 2, 4])).reason == "1 values differ"
    assert not judge(before > 1, before > 2).ok


def test_shape_dtype_and_count_must_stay() -> None:
    before = randn(2, 3)
    assert "float64 [2, 3] instead of torch.float32 [2, 3]" in judge(before, before.double()).reason
    assert not judge(before, before[:, :2]).ok
    assert not judge(before, before[None]).ok
    assert "2 outputs instead of 1" in compare([before], [before, before], [before], FLOOR).reason


def test_the_first_wrong_output_decides_and_else_the_worst() -> None:
    one = torch.ones(3)
    slightly = one + 2 * torch.finfo(torch.float32).eps
    wide = one.double()
    assert compare([one, one], [slightly, one], [wide, wide], FLOOR).error_after > 0
    found = compare({"a": one, "b": one}, {"a": one, "b": one + 1}, {"a": wide, "b": wide}, FLOOR)
    assert (found.ok, found.error_after) == (False, 1.0)


def test_what_is_no_tensor_must_be_the_same() -> None:
    assert compare([3, None, "a", NAN], [3, None, "a", NAN], [3, None, "a", NAN], FLOOR).ok
    for before, after in ((3, 4), (3, 3.0), (True, 1), (None, 0), (3, torch.tensor(3))):
        assert not compare([before], [after], [before], FLOOR).ok


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), ()])
def test_empty_tensors_and_numbers(shape: tuple[int, ...]) -> None:
    before = torch.ones(shape)
    assert judge(before, before.clone()).ok
    assert judge(before, before + 1).ok is (before.numel() == 0)


def test_nan_and_infinity_hide_no_error() -> None:
    for odd in (NAN, INF, -INF):
        before = torch.tensor([[1.0, odd, 2.0]])
        assert judge(before, before.clone()).ok
        assert judge(before, torch.tensor([[1.0, odd, 2.5]])).error_after == 0.25
    for before, after in (
        (NAN, 1.0),
        (1.0, NAN),
        (INF, 1.0),
        (1.0, INF),
        (INF, -INF),
        (INF, NAN),
        (NAN, INF),
    ):
        found = judge(torch.tensor([before, 1.0]), torch.tensor([after, 1.0]))
        assert found.error_after == INF, (before, after)
        assert "finite on one side" in found.reason


def test_where_the_original_overflowed_the_candidate_may_be_finite() -> None:
    reference = torch.tensor([1e5, 1.0], dtype=torch.float64)
    before = reference.half()
    assert before[0] == INF
    assert judge(before, torch.tensor([65504.0, 1.0]).half(), reference).ok
    assert not judge(before, torch.tensor([65504.0, 1.5]).half(), reference).ok


def test_without_a_finite_reference_the_original_is_the_reference() -> None:
    reference = torch.tensor([NAN, 1.0], dtype=torch.float64)
    before = torch.tensor([2.0, 1.0])
    assert judge(before, before.clone(), reference).ok
    assert not judge(before, torch.tensor([3.0, 1.0]), reference).ok
    assert not judge(before, torch.tensor([3.0, 1.0]), torch.ones(3, dtype=torch.float64)).ok


def test_the_fill_of_a_mask_hides_no_error_beside_it() -> None:
    fill = torch.finfo(torch.float32).min
    before = torch.tensor([[1.0, fill, -2.0]])
    assert judge(before, before.clone()).ok
    assert judge(before, torch.tensor([[1.0, fill, -1.0]])).error_after == 0.5
    assert judge(before, torch.tensor([[1.0, fill / 2, -2.0]])).error_after == 0.5


def test_denormals_may_be_flushed_to_zero() -> None:
    before = torch.full((4,), torch.finfo(torch.float32).tiny / 2)
    assert before[0] > 0
    assert judge(before, torch.zeros(4)).ok
    assert not judge(before, torch.full((4,), 1e-30)).ok


def test_large_tensors_are_compared_in_parts_to_the_same_end(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = torch.randn(7, 5, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, after = reference.float(), reference.float()
    after[6, 4, 3] += 1e-3
    whole = compare(before, after, reference, FLOOR)
    monkeypatch.setattr(module, "_BLOCK", 40)  # a row at a time
    assert compare(before, after, reference, FLOOR) == whole
    assert not whole.ok and whole.error_after == relative_error(after, reference) > 1e-4
    after[0, 0, 0], after[6, 4, 32] = INF, NAN
    assert "2 values are finite on one side" in compare(before, after, reference, FLOOR).reason


def test_codes_of_a_byte_may_be_a_step_apart_and_no_more() -> None:
    before = torch.tensor([[448.0, 416.0, -3.5, 0.25] * 4]).to(torch.float8_e4m3fn)
    for largest, near, ok in ((416.0, 448.0, True), (384.0, 416.0, False), (448.0, NAN, False)):
        after = torch.tensor([[largest, near, -3.5, 0.25] * 4]).to(torch.float8_e4m3fn)
        assert judge(before, after, before.double()).ok is ok
    assert judge(before, before.clone(), before.double()) == Comparison(0.0, 0.0, True)
    assert not judge(before, before.float(), before.double()).ok
