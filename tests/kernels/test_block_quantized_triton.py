"""Products with a scale a block of the weight in Triton, in every kind of tile: samples are too small."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from graphopt.kernels import _block_quantized_triton, _triton, block_quantized_linear
from graphopt.kernels._linear_configs import Chip
from graphopt.kernels._quantized_configs import PIECE, block_configs, block_tiles
from graphopt.kernels._triton import recorded_launches
from graphopt.kernels._tuning import Config
from graphopt.kernels.block_quantized_linear import OP, TRITON, dequantized
from graphopt.runtime.implementations import implementations
from tests.kernels._faces import fenced

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),  # `pytest -m gpu` runs them there, compiled
]

CONFIGS = [
    pytest.param(block_tiles(16, 32, 4, 4, 3), id="few rows"),
    pytest.param(block_tiles(16, 32, 2, 2, 2, splits=2), id="2 parts"),
    pytest.param(block_tiles(32, 64, 4, 4, 2, splits=5), id="parts without any depth"),
]


def given(M: int, N: int, K: int, block: int, bits: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Rows, weight, scales of either sign, and a bias."""
    blocks = -(-K // block)
    weight = torch.randint(256, (N, blocks, block * bits // 8), dtype=torch.uint8)
    found = torch.randn(M, K), torch.randn(N, blocks) / 2**bits, torch.randn(N)
    x, scale, bias = (v.to(DEVICE, dtype) for v in found)
    return [x, weight.to(DEVICE), scale, bias]


def exact(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    bits = 8 * weight.shape[2] * weight.shape[1] // x.shape[1]
    return F.linear(x.double(), dequantized(weight, scale.double(), bits, x.shape[1]), bias.double())


def assert_rounded(found: torch.Tensor, truth: torch.Tensor) -> None:
    """Sums in float32, rounded once: half an ulp of the largest number; the interpreter cuts bfloat16 off."""
    most = 1.01 if DEVICE == "cpu" and found.dtype == torch.bfloat16 else 0.51
    assert (found.double() - truth).abs().max() <= most * torch.finfo(found.dtype).eps * truth.abs().max()


@pytest.mark.parametrize(("M", "N", "block", "K"), [(5, 24, 32, 160), (20, 40, 128, 256), (3, 40, 16, 80)])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.float16), (4, torch.bfloat16), (8, torch.float16)])
def test_a_product(
    bits: int,
    dtype: torch.dtype,
    config: Config,
    M: int,
    N: int,
    block: int,
    K: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_block_quantized_triton, "choose", lambda *_: config)
    x, weight, scale, bias = args = given(M, N, K, block, bits, dtype)
    if TRITON.refuses(x, weight, scale, bits, bias) is not None:
        pytest.skip("this version of Triton lays it out wrong")
    found = TRITON.launch(x, weight, scale, bits, bias)
    assert (found.dtype, found.shape) == (dtype, (M, N))
    assert_rounded(found, exact(*args))
    assert torch.equal(found, TRITON.launch(x, weight, scale, bits, bias))


@pytest.mark.parametrize(
    ("version", "bits", "block", "refused"),
    [((3, 6), 4, 16, True), ((3, 9), 4, 16, False), ((3, 6), 8, 16, False), ((3, 6), 4, 32, False)],
)
def test_the_shortest_blocks_are_refused_where_they_come_out_wrong(
    version: tuple[int, int], bits: int, block: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_quantized_linear, "INTERPRETED", False)
    monkeypatch.setattr(block_quantized_linear, "version", lambda: version)
    x, weight, scale, bias = given(3, 40, 80, block, bits, torch.float16)
    reason = TRITON.refuses(x, weight, scale, bits, bias)
    assert (reason == "Triton before 3.9 lays out a product of 16 codes of 4 bits wrong") == refused


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_byte_is_unpacked_exactly(bits: int, dtype: torch.dtype) -> None:
    """All 256 of them, by products with rows of the unit matrix; a scale is that of its own block."""
    weight = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(8, 2, 16).contiguous()
    features = 2 * 128 // bits
    scale = torch.tensor([[1.0, -0.5]] * 8).to(DEVICE, dtype)
    found = TRITON.launch(torch.eye(features, dtype=dtype, device=DEVICE), weight, scale, bits)
    assert torch.equal(found.T.double(), dequantized(weight, scale.double(), bits, features))


@pytest.mark.parametrize("config", CONFIGS[1:])
def test_an_activation_is_that_of_all_parts(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_block_quantized_triton, "choose", lambda *_: config)
    x, weight, scale, bias = args = given(6, 24, 160, 32, 4, torch.float16)
    found = TRITON.launch(x.view(2, 3, 160), weight, scale, 4, bias, activation="silu")
    assert_rounded(found.view(6, 24), F.silu(exact(*args)))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_last_block_that_is_not_full(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """x lies between NaN, and what fills up the weight is no zero."""
    monkeypatch.setattr(_block_quantized_triton, "choose", lambda *_: block_tiles(16, 16, 2, 2, 2, splits=2))
    x, weight, scale, bias = given(3, 17, 160, 32, bits, torch.float16)
    for features in (159, 129):
        shorter = fenced(x[:, :features].contiguous(), float("nan"))[1]
        found = TRITON.launch(shorter, weight, scale, bits, bias)
        rest = F.pad(x[:, :features], (0, 160 - features))
        assert torch.equal(found, TRITON.launch(rest, weight, scale, bits, bias))


def test_x_is_not_rounded() -> None:
    x, weight, scale, bias = args = given(6, 24, 160, 32, 4, torch.float16)
    found = TRITON.launch(x, weight, scale, 4, bias, rounds_input=True)
    assert_rounded(found, exact(*args))


def test_weights_are_prefetched_where_they_fit_into_l2() -> None:
    with FakeTensorMode():
        for rows, outputs, wanted in ((1, 4096, True), (1, 32768, False), (512, 4096, False)):
            x, scale = torch.empty(rows, 4096).half(), torch.empty(outputs, 128).half()
            with recorded_launches() as launches:
                TRITON.launch(x, torch.empty(outputs, 128, 16, dtype=torch.uint8), scale, 4)
            assert launches[0].constants["PREFETCH"] is wanted


def test_the_executor_is_offered_the_kernel_and_the_widened_weight() -> None:
    x, weight, scale, bias = given(5, 24, 160, 32, 4, torch.float16)
    ways, refused = implementations(OP.overload, (x, weight, scale, 4, bias), {"activation": "gelu"})
    assert [way.name for way in ways] == ["triton", "aten"]
    assert refused == {}
    wide = x.double(), weight, scale.double(), 4
    _, refused = implementations(OP.overload, wide, {})
    assert "float64" in refused["triton"]


@pytest.mark.parametrize(
    "shape", [(1, 4096, 4096), (16, 768, 3072), (40, 768, 768), (4096, 4096, 4096), (9, 8, 5)]
)
@pytest.mark.parametrize("shared", [99 * 1024, 227 * 1024])
@pytest.mark.parametrize("bits", [4, 8])
def test_configurations_fit_a_processor(bits: int, shared: int, shape: tuple[int, int, int]) -> None:
    found = block_configs(*shape, PIECE, bits, 2, Chip(132, shared))
    assert found
    assert all(config not in found[:place] for place, config in enumerate(found))
    for config in found:
        m, n, pieces, splits = (config.tiles[name] for name in ("BLOCK_M", "BLOCK_N", "PIECES", "SPLITS"))
        assert pieces >= config.num_warps  # each makes products of its own
        assert pieces * PIECE * (2 * m + n * bits // 8) * config.num_stages <= shared
        assert (splits - 1) * pieces * PIECE < shape[2]
