"""pack_tokens and unpack_tokens together, and at their ends; quick_gelu where its sigmoid is 0 or 1."""

from __future__ import annotations

import pytest
import torch

from graphopt.kernels.pack_tokens import OP as PACK
from graphopt.kernels.quick_gelu import OP as QUICK_GELU
from graphopt.kernels.unpack_tokens import OP as UNPACK
from tests._models import generator, padding, randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_there_and_back(dtype: torch.dtype) -> None:
    x = (10 * randn(3, 5, 4)).to(dtype)
    mask = padding((5, 0, 2), 5).bool()
    packed = PACK(x, mask.flatten().nonzero().flatten())
    assert packed.shape == (1, 7, 4)
    found = UNPACK(packed, mask)
    assert torch.equal(found[mask], x[mask])
    assert not found[~mask].any()


def test_holes_keep_the_order() -> None:
    mask = torch.rand(4, 9, generator=generator()) < 0.5
    x = torch.arange(36.0).view(4, 9, 1)
    packed = PACK(x, mask.flatten().nonzero().flatten())
    assert packed.flatten().tolist() == sorted(packed.flatten().tolist())
    assert torch.equal(UNPACK(packed, mask), x * mask[..., None])


def test_no_token_at_all() -> None:
    x, none = randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)
    packed = PACK(x, none.flatten().nonzero().flatten())
    assert packed.shape == (1, 0, 4)
    assert torch.equal(UNPACK(packed, none), torch.zeros(2, 3, 4))


def test_what_lies_behind_the_last_token_is_not_read() -> None:
    mask = padding((2, 1), 3).bool()
    x = torch.cat([randn(1, 3, 4), torch.full((1, 5, 4), torch.nan)], dim=1)
    assert UNPACK(x, mask).isfinite().all()


def test_infinities_stay_at_their_tokens() -> None:
    mask = padding((2, 1), 3).bool()
    x = randn(1, 3, 4)
    x[0, 1] = torch.inf
    found = UNPACK(x, mask)
    assert found[0, 1].isposinf().all()
    assert found.isfinite().all(-1).sum() == 5


def test_an_index_out_of_the_batch_is_an_error() -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        PACK(randn(2, 3, 4), torch.tensor([6]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_quick_gelu_is_linear_far_out_and_zero_on_the_other_side(dtype: torch.dtype) -> None:
    x = torch.tensor([-torch.finfo(dtype).max, -1000.0, 0.0, 1000.0, torch.finfo(dtype).max / 2]).to(dtype)
    found = QUICK_GELU(x, 1.702)
    assert torch.equal(found[2:], x[2:])
    assert not found[:2].any()


def test_quick_gelu_with_a_slope_of_one_is_silu_and_of_zero_a_half() -> None:
    x = randn(100)
    torch.testing.assert_close(QUICK_GELU(x, 1.0), torch.nn.functional.silu(x))
    assert torch.equal(QUICK_GELU(x, 0.0), x / 2)
