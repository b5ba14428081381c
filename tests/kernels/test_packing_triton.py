"""The kernels that pack tokens and put them back, on batches of many blocks; the list of tokens of a mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from graphopt.ir.op import OPS, Sample
from graphopt.kernels import _aten, _rows, pack_tokens, unpack_tokens
from graphopt.kernels._tuning import Config
from tests.kernels._faces import DEVICE, FENCE, MARKS, assert_fences_hold, fenced, launched
from tests.kernels.test_ops import mapped

pytestmark = MARKS
aten = torch.ops.aten
NONZERO = _aten.FACES[aten.nonzero_static.default]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that few positions are several blocks."""
    sizes = {"BLOCK": 16, "BLOCK_R": 4, "COUNTED": 32}

    def smallest(kernel, device, key, candidates):  # type: ignore[no-untyped-def]
        return Config({**candidates[0].tiles, **{n: sizes[n] for n in candidates[0].tiles if n in sizes}}, 1)

    for module in (_aten, pack_tokens, unpack_tokens):
        monkeypatch.setattr(module, "choose", smallest)


def mask_of(*size: int, share: float = 0.5) -> torch.Tensor:
    return (torch.rand(size) < share).to(DEVICE)


def positions(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten().nonzero().squeeze(1)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("numel", [1, 16, 43])
def test_positions_in_order_and_a_filling_behind_them(numel: int, share: float) -> None:
    x = mask_of(numel, share=share)
    tokens = int(x.count_nonzero())
    for size in {0, max(tokens - 1, 0), tokens, tokens + 20}:
        expected = aten.nonzero_static(x, size=size, fill_value=0)
        found = NONZERO.launch(x, size=size, fill_value=0)
        assert torch.equal(found, expected)
        assert found.dtype == torch.int64


def test_positions_of_a_mask_with_gaps() -> None:
    x = mask_of(43)
    wide = x.repeat_interleave(2)[::2]
    assert not wide.is_contiguous()
    assert torch.equal(NONZERO.launch(wide, size=40), aten.nonzero_static(x, size=40))


def test_positions_are_written_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than there is room for, and ones on both sides of the mask."""
    _, x = fenced(mask_of(90, share=0.6), 1)
    buffer = torch.full((30 + 2 * FENCE,), -7, dtype=torch.int64, device=DEVICE)
    inside = buffer[FENCE : FENCE + 30].view(30, 1)
    new_empty = torch.Tensor.new_empty

    def ours(x: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        return new_empty(x, *size, **options) if "device" in options else inside  # the interpreter's own

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", ours)
        NONZERO.launch(x, size=30)
    assert torch.equal(inside, aten.nonzero_static(x, size=30))
    assert (buffer[:FENCE] == -7).all()
    assert (buffer[FENCE + 30 :] == -7).all()


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.ones(2, 3).bool(), "positions are those of a vector"),
        (torch.ones(0).bool(), "positions are those of a vector"),
        (torch.ones(3), "it is of torch.float32, not of bool"),
    ],
)
def test_what_has_no_positions_here_is_refused(x: torch.Tensor, reason: str) -> None:
    assert reason in str(NONZERO.refuses(x.to(DEVICE), size=3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rest", [(), (1,), (24,), (3, 5)])
def test_tokens_go_there_and_back(dtype: torch.dtype, rest: tuple[int, ...]) -> None:
    """In a buffer with room to spare, whose other rows nobody sees again."""
    mask = mask_of(3, 9)
    tokens = int(mask.sum())
    x = torch.randint(1, 100, (3, 9, *rest)).to(dtype).to(DEVICE)
    indices = NONZERO.launch(mask.flatten(), size=tokens + 9, fill_value=0).squeeze(1)
    packed = pack_tokens.TRITON.launch(x, indices)
    assert torch.equal(packed[0, :tokens], x[mask])
    assert torch.equal(packed[0, tokens:], x[:1, 0].expand(9, *rest))
    packed[:, tokens:] = True if dtype == torch.bool else 77
    back = unpack_tokens.TRITON.launch(packed, mask)
    seen = mask.view(3, 9, *(1 for _ in rest))
    assert torch.equal(back, torch.where(seen, x, torch.zeros((), dtype=dtype, device=DEVICE)))


def test_rows_of_no_token_are_not_read() -> None:
    mask = mask_of(4, 11)
    tokens = int(mask.sum())
    x = torch.full((1, tokens + 6, 8), math.nan, device=DEVICE)
    x[:, :tokens] = torch.randn(tokens, 8)
    found = unpack_tokens.TRITON.launch(x, mask)
    assert found.isfinite().all()
    assert torch.equal(found[mask], x[0, :tokens])


@pytest.mark.parametrize("stride", [(0, 1, 0), (1, 0, 0), (1, 1, 0)])
def test_values_that_are_expanded_are_packed_where_they_are(stride: tuple[int, ...]) -> None:
    whole = torch.randn(6, 9, 4).to(DEVICE)
    x = whole[: 6 if stride[0] else 1, : 9 if stride[1] else 1].expand(6, 9, 4)
    indices = positions(mask_of(6, 9))
    assert torch.equal(pack_tokens.TRITON.launch(x, indices), OPS["pack_tokens"].reference(x, indices))


def test_a_position_that_is_none_gives_zeros() -> None:
    x = torch.randn(2, 3, 4).to(DEVICE)
    indices = torch.tensor([5, 6, -1, 2**33, 0], device=DEVICE)
    found = pack_tokens.TRITON.launch(x, indices)[0]
    assert torch.equal(found[[0, 4]], x.flatten(0, 1)[[5, 0]])
    assert not found[1:4].any()


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_nothing_outside_of_a_buffer_is_read_or_written(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = mask_of(3, 11, share=share)
    tokens = int(mask.sum())
    samples = {
        "pack_tokens": (torch.randn(3, 11, 5), positions(mask)),
        "unpack_tokens": (torch.randn(1, tokens, 5), mask),
    }
    for name, args in samples.items():
        if tokens:
            sample = mapped(Sample(args), lambda x: x.to(DEVICE))
            assert_fences_hold(OPS[name], sample, monkeypatch)
    empty = Sample((torch.randn(1, 0, 5).to(DEVICE), mask & False))
    assert not launched(OPS["unpack_tokens"], empty)[0].any()


@pytest.mark.parametrize("name", ["pack_tokens", "unpack_tokens"])
def test_what_the_kernels_cannot_hold_is_refused(name: str) -> None:
    face = OPS[name].triton
    assert face is not None
    other = torch.zeros(3, dtype=torch.int64) if name == "pack_tokens" else torch.ones(1, 3).bool()
    for size, dtype, reason in (
        ((1, 3, _rows.LONGEST + 1), torch.float32, "a row has 32769 elements"),
        ((1, 3, 2), torch.complex64, "complex numbers"),
        ((1, 3, 2), torch.float64, "float64"),
    ):
        assert reason in str(face.refuses(torch.zeros(size, dtype=dtype).to(DEVICE), other.to(DEVICE)))
    many = torch.empty(2**16, 2**15, 1, device="meta")
    assert "more than 32 bits number" in str(face.refuses(many, many.squeeze(2).bool()))
