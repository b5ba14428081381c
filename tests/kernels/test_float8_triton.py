"""Products of float8 rows in Triton, in every kind of tile; samples are too small for that."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from graphopt.kernels import _float8_triton, _triton
from graphopt.kernels._float8_configs import float8_configs, float8_tiles
from graphopt.kernels._linear_configs import EACH, RESIDENT, Chip
from graphopt.kernels._triton import Gpu, standing_in_for
from graphopt.kernels._tuning import Config
from graphopt.kernels.float8_linear import OP, TRITON
from graphopt.kernels.quantize_rows import OP as QUANTIZE_ROWS
from graphopt.kernels.quantize_rows import TRITON as QUANTIZE
from graphopt.runtime.implementations import implementations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENOUGH = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
HAS_TMA = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)  # the interpreter has it, too

pytestmark = [
    pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed"),
    pytest.mark.skipif(not ENOUGH, reason="needs sm_89"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),  # `pytest -m gpu` runs them there, compiled
]
needs_tma = pytest.mark.skipif(not HAS_TMA, reason="needs sm_90")

H100 = Gpu((9, 0), 132, 232448)
CONFIGS = [
    pytest.param(float8_tiles(32, 32, 32, 4, 2), id="pointers"),
    pytest.param(float8_tiles(16, 64, 128, 4, 2, group=1), id="few rows"),
    pytest.param(float8_tiles(64, 32, 64, 4, 2, RESIDENT), id="TMA", marks=needs_tma),
    pytest.param(float8_tiles(64, 64, 128, 4, 2, EACH), id="TMA, a program a tile", marks=needs_tma),
]


def rows(M: int, N: int, K: int) -> tuple[Any, ...]:
    """The rows of a product and those of its weight, as codes and scales."""
    x, weight = torch.randn(M, K), torch.randn(N, K) / K**0.5
    (codes, scale), (weight, weight_scale) = QUANTIZE_ROWS(x), QUANTIZE_ROWS(weight)
    return tuple(v.to(DEVICE) for v in (codes, scale, weight, weight_scale.squeeze(1)))


@pytest.mark.parametrize(("M", "N", "K"), [(5, 32, 48), (67, 112, 144)])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_product(
    config: Config, M: int, N: int, K: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_float8_triton, "choose", lambda *_: config)
    given = *rows(M, N, K), dtype, torch.randn(N).to(DEVICE, dtype), "gelu"
    found = TRITON.launch(*given)
    exact = OP.reference(*(v.double() if isinstance(v, torch.Tensor) else v for v in given))
    assert (found.dtype, found.shape) == (dtype, (M, N))
    assert (found.double() - exact.double()).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert torch.equal(found, TRITON.launch(*given))


def numbers() -> torch.Tensor:
    """Rows of every magnitude of the format, the points half way between them, and what is next to those."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (grid[1:] + grid[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(end)) for end in (1e9, 0.0)]
    row = torch.cat([grid, middle, *near])
    return torch.stack([row, -row, row / 3, row * 1e-20])


def test_kernels_round_as_the_reference_does() -> None:
    x = torch.cat([numbers(), torch.randn(4, numbers().shape[1])]).to(DEVICE)
    codes, scale = QUANTIZE.launch(x)
    wanted, wanted_scale = QUANTIZE_ROWS.reference(x)
    assert torch.equal(codes.float(), wanted.float())
    assert torch.equal(scale, wanted_scale)
    assert scale[0] == 1
    assert torch.equal(codes[0, :127].view(torch.uint8), torch.arange(127, dtype=torch.uint8, device=DEVICE))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_spoils_its_row_alone(number: float) -> None:
    x = torch.randn(3, 32)
    x[1, 7] = number
    _, _, weight, weight_scale = rows(1, 16, 32)
    for quantize, multiply in ((QUANTIZE.launch, TRITON.launch), (QUANTIZE_ROWS, OP)):
        codes, scale = quantize(x.to(DEVICE))
        assert scale[1].isfinite().item() is False
        out = multiply(codes, scale, weight, weight_scale, torch.float32)
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


def test_rows_do_not_depend_on_each_other() -> None:
    x = torch.randn(9, 32).to(DEVICE)
    alone = QUANTIZE.launch(x[:3])
    together = QUANTIZE.launch(torch.cat([x[:3], 1e6 * x]))
    assert all(
        torch.equal(one.float(), other[:3].float()) for one, other in zip(alone, together, strict=True)
    )


def test_gpus_without_float8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_triton, _float8_triton):
        monkeypatch.setattr(module, "INTERPRETED", False)
    with FakeTensorMode():
        x = torch.empty(4, 32, device="cuda", dtype=torch.float16)
        codes, scale = QUANTIZE_ROWS(x)
        args = codes, scale, codes, scale.squeeze(1), torch.float16
        with standing_in_for(Gpu((8, 0), 108, 166912)):
            assert QUANTIZE.refuses(x) == "the GPU is sm_80: float8 takes sm_89"
            assert TRITON.refuses(*args) == "the GPU is sm_80: float8 takes sm_89"
        with standing_in_for(H100):
            assert QUANTIZE.refuses(x) is None
            assert TRITON.refuses(*args) is None
            assert "float64" in str(TRITON.refuses(*args[:-1], torch.float64))


@pytest.mark.parametrize(
    ("outputs", "features", "dtype", "offered"),
    [
        (48, 32, torch.float16, True),
        (48, 32, torch.bfloat16, True),
        (48, 32, torch.float32, False),
        (40, 32, torch.float16, False),
        (48, 40, torch.float16, False),
    ],
)
def test_where_cublaslt_is_offered(outputs: int, features: int, dtype: torch.dtype, offered: bool) -> None:
    """PyTorch's own checks of layout, sizes and types accept what it is given."""
    with FakeTensorMode(), standing_in_for(H100):
        codes, scale = QUANTIZE_ROWS(torch.empty(2, 3, features, device="cuda", dtype=torch.float16))
        weight, weight_scale = QUANTIZE_ROWS(torch.empty(outputs, features, device="cuda"))
        bias = torch.empty(outputs, device="cuda", dtype=dtype)
        args = codes, scale, weight, weight_scale.squeeze(1), dtype, bias, "relu", 1.0
        ways, _ = implementations(OP.overload, args, {})
        found = [way for way in ways if way.name == "cublaslt"]
        assert len(found) == offered
        for way in found:
            out = way.run(*args)
            assert (out.shape, out.dtype) == ((2, 3, outputs), dtype)


@pytest.mark.parametrize("shape", [(1, 64), (128, 768), (4096, 3072), (9, 16)])
@pytest.mark.parametrize("tma", [False, True])
def test_configurations_fit_a_processor(shape: tuple[int, int], tma: bool) -> None:
    for shared in (99 * 1024, 227 * 1024):
        found = float8_configs(*shape, 2, Chip(132, shared), tma)
        assert found
        for config in found:
            m, n, k = (config.tiles[f"BLOCK_{letter}"] for letter in "MNK")
            assert (m + n) * k * config.num_stages + m * n * 2 * bool(config.tiles["TMA"]) <= shared
            assert tma or not config.tiles["TMA"]
