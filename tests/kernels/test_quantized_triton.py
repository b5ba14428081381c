"""Products with a weight in 8 bits in Triton, in every kind of tile; samples are too small for that."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from graphopt.kernels import _linear_triton, _quantized_triton, _triton
from graphopt.kernels._linear_configs import Chip
from graphopt.kernels._quantized_configs import quantized_configs, quantized_tiles
from graphopt.kernels._triton import Gpu, recorded_launches, standing_in_for
from graphopt.kernels._tuning import Config
from graphopt.kernels.quantized_linear import OP, TRITON
from graphopt.runtime.implementations import implementations
from tests.kernels._faces import fenced

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),  # `pytest -m gpu` runs them there, compiled
]

H100 = Gpu((9, 0), 132, 232448)
CONFIGS = [
    pytest.param(quantized_tiles(16, 32, 64, 2, 3), id="few rows"),
    pytest.param(quantized_tiles(16, 32, 32, 2, 2, splits=3), id="few rows, 3 parts"),
    pytest.param(quantized_tiles(32, 64, 32, 4, 2, group=1), id="many rows"),
    pytest.param(quantized_tiles(32, 64, 32, 4, 2, splits=7), id="parts without any depth"),
]


def given(M: int, N: int, K: int, dtype: torch.dtype, weight: torch.dtype = torch.int8) -> list[torch.Tensor]:
    """Every argument, the codes from end to end of their range."""
    info = torch.iinfo(weight)
    codes, zero = (torch.randint(info.min, info.max + 1, size, dtype=weight) for size in ((N, K), (N,)))
    codes[0, :2], zero[0] = torch.tensor([info.min, info.max]), info.max
    x, scale, bias = torch.randn(M, K), torch.rand(N) / 100, torch.randn(N)
    x, scale, bias = (v.to(DEVICE, dtype) for v in (x, scale, bias))
    return [x, codes.to(DEVICE), scale, bias, zero.to(DEVICE)]


def exact(args: list[torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = OP.reference(*(v.double() if v.is_floating_point() else v for v in args))
    return found


def assert_rounded(found: torch.Tensor, truth: torch.Tensor) -> None:
    """Sums in float32, rounded once: half an ulp of the largest number; the interpreter cuts bfloat16 off."""
    most = 1.01 if DEVICE == "cpu" and found.dtype == torch.bfloat16 else 0.51
    assert (found.double() - truth).abs().max() <= most * torch.finfo(found.dtype).eps * truth.abs().max()


@pytest.mark.parametrize(("M", "N", "K"), [(5, 24, 40), (20, 40, 144)])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("dtype", "weight"), [(torch.float16, torch.int8), (torch.bfloat16, torch.uint8)], ids=str
)
def test_a_product(
    dtype: torch.dtype,
    weight: torch.dtype,
    config: Config,
    M: int,
    N: int,
    K: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_quantized_triton, "choose", lambda *_: config)
    args = given(M, N, K, dtype, weight)
    found = TRITON.launch(*args)
    assert (found.dtype, found.shape) == (dtype, (M, N))
    assert_rounded(found, exact(args))
    assert torch.equal(found, TRITON.launch(*args))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("weight", [torch.int8, torch.uint8], ids=str)
def test_every_code_is_widened_exactly(weight: torch.dtype, dtype: torch.dtype) -> None:
    """The 256 codes less the zero points at both ends and in the middle, by a product with ones."""
    if DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("is refused there")
    info = torch.iinfo(weight)
    codes = torch.arange(info.min, info.max + 1, device=DEVICE).to(weight)[:, None]
    one = torch.ones(1, 1, device=DEVICE, dtype=dtype)
    scale = torch.ones(256, device=DEVICE, dtype=dtype)
    for point in (info.min, -1 if info.min else 127, info.max):
        zero = torch.full((256,), point, dtype=weight, device=DEVICE)
        found = TRITON.launch(one, codes, scale, None, zero)
        assert torch.equal(found[0].double(), (codes[:, 0].double() - point))
    assert torch.equal(TRITON.launch(one, codes, scale)[0].double(), codes[:, 0].double())


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_a_transposed_weight_is_read_as_it_is(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_quantized_triton, "choose", lambda *_: config)
    x, codes, *rest = given(5, 24, 40, torch.float16)
    transposed = codes.T.contiguous().T
    assert transposed.stride() == (1, 24)
    with recorded_launches() as launches:
        TRITON.launch(x, transposed, *rest)
    assert launches[0].args[2] is transposed
    assert torch.equal(TRITON.launch(x, transposed, *rest), TRITON.launch(x, codes, *rest))


def test_nothing_past_the_depth_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between fences of NaN, of a depth that is no multiple of a step, and cut."""
    monkeypatch.setattr(_quantized_triton, "choose", lambda *_: quantized_tiles(16, 16, 16, 2, 2, splits=2))
    x, *rest = given(3, 17, 39, torch.float16)
    assert torch.equal(TRITON.launch(fenced(x, float("nan"))[1], *rest), TRITON.launch(x, *rest))


@pytest.mark.parametrize("few", [True, False])
def test_weights_are_prefetched_where_they_fit_into_l2(few: bool) -> None:
    with FakeTensorMode():
        for depth, fits in ((4096, True), (8192, False)):
            x = torch.empty(16 if few else 4096, depth, dtype=torch.float16)
            with recorded_launches() as launches:
                TRITON.launch(x, torch.empty(4096, depth, dtype=torch.int8), torch.empty(4096).half())
            assert launches[0].constants["PREFETCH"] is (few and fits)


def test_what_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_triton, _linear_triton):
        monkeypatch.setattr(module, "INTERPRETED", False, raising=False)
    with FakeTensorMode(), standing_in_for(H100):

        def reason(dtype: torch.dtype, features: int = 40) -> str | None:
            x, scale = torch.empty(3, features, device="cuda"), torch.empty(24, device="cuda")
            codes = torch.empty(24, features, device="cuda", dtype=torch.int8)
            return TRITON.refuses(x.to(dtype), codes, scale.to(dtype))

        assert reason(torch.float16) is None
        assert reason(torch.bfloat16) is None
        assert "in float32" in str(reason(torch.float32))
        assert "float64" in str(reason(torch.float64))
        assert "no depth" in str(reason(torch.float16, 0))


def test_the_executor_is_offered_the_kernel_and_the_widened_weight() -> None:
    args = given(5, 24, 40, torch.float16)
    ways, refused = implementations(OP.overload, tuple(args), {})
    assert [way.name for way in ways] == ["triton", "aten"]
    assert refused == {}
    for way in ways:
        assert way.run(*args).shape == (5, 24)


@pytest.mark.parametrize(
    "shape", [(1, 64, 64), (16, 4096, 4096), (40, 768, 3072), (128, 3072, 768), (9, 8, 5)]
)
@pytest.mark.parametrize("shared", [99 * 1024, 227 * 1024])
def test_configurations_fit_a_processor(shape: tuple[int, int, int], shared: int) -> None:
    for rows in (shape[0], 1024 * shape[0]):
        found = quantized_configs(rows, *shape[1:], 2, Chip(132, shared))
        assert found
        assert all(config not in found[:place] for place, config in enumerate(found))
        for config in found:
            m, n, k, splits = (config.tiles[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS"))
            assert (2 * m + n) * k * config.num_stages <= shared
            assert (splits - 1) * k < shape[2]


def test_the_depth_is_cut_where_tiles_leave_processors_idle() -> None:
    """Two programs for each of 132 processors; of a depth that is not worth it, narrow tiles instead."""
    chip = Chip(132, 227 * 1024)
    assert quantized_configs(1, 4096, 4096, 2, chip)[0] == quantized_tiles(16, 64, 256, 2, 4, 4)
    assert quantized_configs(16, 3072, 768, 2, chip)[0] == quantized_tiles(16, 32, 256, 4, 4)
    assert quantized_configs(128, 4096, 4096, 2, chip)[0] == quantized_tiles(128, 64, 128, 4, 4, 2)
    assert quantized_configs(4096, 4096, 4096, 2, chip)[0] == quantized_tiles(256, 128, 64, 8, 3)
    assert quantized_configs(512, 4096, 4096, 2, chip)[0] == quantized_tiles(128, 128, 64, 8, 4)
