"""The end of a transformer's block in Triton, its product cut and its rows taken in every way."""

from __future__ import annotations

import pytest
import torch

from graphopt.ir.op import OPS, Sample
from graphopt.kernels import _linear_triton
from graphopt.kernels import linear_add_layer_norm as module
from graphopt.kernels._linear_configs import BY_CUBLAS, tiles
from graphopt.kernels._rows import power_of_two
from graphopt.kernels._triton import recorded_launches
from graphopt.kernels._tuning import Config
from tests.kernels._faces import DEVICE, MARKS, assert_fences_hold, launched
from tests.kernels.test_ops import assert_right, cast, error, mapped, outputs

pytestmark = MARKS
OP = OPS["linear_add_layer_norm"]
HALVES = (torch.float16, torch.bfloat16)
PRODUCTS = {
    "cuBLAS": BY_CUBLAS,
    "whole": tiles(32, 32, 16, 4, 2),
    "2 parts": tiles(16, 32, 32, 4, 2, splits=2),
    "3 parts": tiles(32, 32, 16, 4, 2, splits=3),
}
SIZES = [(1, 1, 1), (13, 33, 37), (35, 40, 67)]  # M, K, D: no multiple of a tile
over_products = pytest.mark.parametrize("product", PRODUCTS)
over_halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def cut(monkeypatch: pytest.MonkeyPatch, product: str, D: int, rows: int = 4) -> None:
    """Have the product cut so, and so many rows taken by a program of the norm."""
    monkeypatch.setattr(_linear_triton, "choose", lambda *_: PRODUCTS[product])
    config = Config({"BLOCK_R": rows, "BLOCK_D": power_of_two(D)}, 4)
    monkeypatch.setattr(module, "choose", lambda *_: config)


def drawn(M: int, K: int, D: int, dtype: torch.dtype) -> Sample:
    factors = torch.randn(M, K), torch.randn(D, K) / K**0.5, torch.randn(D)
    sample = Sample((*factors, torch.randn(M, D), torch.randn(D), torch.randn(D), 1e-5))
    return mapped(cast(sample, dtype), lambda x: x.to(DEVICE))


@over_products
@over_halves
@pytest.mark.parametrize(("M", "K", "D"), SIZES)
def test_every_cut_is_right(
    product: str, dtype: torch.dtype, M: int, K: int, D: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, product, D)
    sample = drawn(M, K, D, dtype)
    found = launched(OP, sample)
    assert_right(OP, sample, found)
    assert all(torch.equal(once, again) for once, again in zip(found, launched(OP, sample), strict=True))


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_every_number_of_rows_is_right(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, "2 parts", 37, rows)
    sample = drawn(13, 33, 37, torch.float16)
    assert_right(OP, sample, launched(OP, sample))


@over_products
@over_halves
def test_of_many_rows_the_product_adds_all(
    product: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its depth is not cut: then the norm reads nothing but the sum, which is rounded as torch's is."""
    cut(monkeypatch, product, 37)
    monkeypatch.setattr(module, "MANY_ROWS", 13)
    for rows, whole in ((12, False), (13, product == "whole")):
        sample = drawn(rows, 33, 37, dtype)
        assert_right(OP, sample, launched(OP, sample))
        with recorded_launches() as launches:
            launched(OP, sample)
        assert (launches[-1].args[1] is None) == whole
    assert_fences_hold(OP, sample, monkeypatch)


@pytest.mark.parametrize("bias", [True, False])
def test_a_single_row(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number is known when the kernel is compiled."""
    cut(monkeypatch, "3 parts", 37, 1)
    args = list(drawn(1, 33, 37, torch.float16).args)
    args[2] = args[2] if bias else None
    assert_right(OP, Sample(tuple(args)), launched(OP, Sample(tuple(args))))


@over_products
@pytest.mark.parametrize("rows", [1, 4])
def test_every_cut_stays_inside_its_buffers(product: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, product, 37, rows)
    assert_fences_hold(OP, drawn(13, 33, 37, torch.float16), monkeypatch)


@over_products
def test_no_rows_give_none(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, product, 20)
    for shape in ((0,), (0, 3), (2, 0)):
        sample = drawn(1, 12, 20, torch.float16)
        x, weight, bias, residual, *rest = sample.args
        empty = x.new_empty((*shape, 12)), weight, bias, residual.new_empty((*shape, 20)), *rest
        for mine in launched(OP, Sample(empty)):
            assert (mine.shape, mine.dtype) == ((*shape, 20), torch.float16)


@pytest.mark.parametrize("product", [name for name in PRODUCTS if name != "cuBLAS"])
@over_halves
def test_the_norm_reads_the_sum_before_it_is_rounded(
    product: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A residual far from zero: torch rounds the sum, and with it what tells one feature from another."""
    cut(monkeypatch, product, 37)
    sample = drawn(13, 33, 37, dtype)
    x, weight, bias, residual, *rest = sample.args
    sample = Sample((x, weight, bias, residual + 64, *rest))
    normed, total = launched(OP, sample)
    exact = outputs(OP.reference, cast(sample, torch.float64))
    eps = torch.finfo(dtype).eps
    assert error(normed, exact[0]) <= 2 * eps * exact[0].abs().max().item()
    assert error(total, exact[1]) <= eps * exact[1].abs().max().item()
    assert error(outputs(OP.reference, sample)[0], exact[0]) > 8 * error(normed, exact[0])


@over_products
def test_rows_of_equal_features_leave_the_norms_bias(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their variance is zero, and eps all that is divided by."""
    cut(monkeypatch, product, 37)
    x, weight, _, residual, norm_weight, norm_bias, eps = drawn(5, 33, 37, torch.float16).args
    sample = Sample((0 * x, weight, None, torch.full_like(residual, 0.5), norm_weight, norm_bias, eps))
    normed, total = launched(OP, sample)
    assert torch.equal(normed, norm_bias.expand(5, 37))
    assert torch.equal(total, sample.args[3])


@over_products
def test_rows_that_lie_apart_are_read_where_they_are(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of x and of the residual as columns of something wider; a weight that lies transposed."""
    cut(monkeypatch, product, 37)
    sample = drawn(13, 33, 37, torch.float16)
    x, weight, bias, residual, *rest = sample.args
    wide_x, wide = torch.cat([x, x + 1], 1)[:, :33], torch.cat([residual + 1, residual], 1)[:, 37:]
    apart = Sample((wide_x, weight.T.contiguous().T, bias, wide, *rest))
    assert wide_x.stride() == (66, 1)
    assert wide.stride() == (74, 1)
    for found, expected in zip(launched(OP, apart), launched(OP, sample), strict=True):
        assert torch.equal(found, expected)
