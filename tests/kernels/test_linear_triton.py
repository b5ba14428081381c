"""Products in Triton, cut up in every way that a configuration can say; samples are too small for that."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from graphopt.kernels import _linear_gluon, _linear_triton, _triton
from graphopt.kernels._linear_configs import (
    BY_CUBLAS,
    EACH,
    RESIDENT,
    Chip,
    linear_configs,
    roles,
    tiles,
    tma_tiles,
)
from graphopt.kernels._linear_triton import products, project
from graphopt.kernels._tuning import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TMA = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)  # the interpreter has it, too

pytestmark = [
    pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),  # `pytest -m gpu` runs them there, compiled
]
needs_tma = pytest.mark.skipif(not HAS_TMA, reason="needs sm_90")
needs_wgmma = pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability() != (9, 0),
    reason="needs sm_90: Gluon has no interpreter",
)


def named(config: Config) -> str:
    return " ".join(f"{name}={size}" for name, size in config.tiles.items())


POINTERS = [tiles(16, 16, 16, 4, 2), tiles(16, 32, 32, 4, 2, group=1), tiles(32, 16, 64, 4, 3)]
TMA = [
    tma_tiles(64, 32, 32, 4, 2, tma=RESIDENT),
    tma_tiles(64, 16, 64, 4, 2, tma=EACH),
]
WHOLE = [pytest.param(c, id=named(c)) for c in POINTERS]
WHOLE += [pytest.param(c, id=named(c), marks=needs_tma) for c in TMA]
ROLES = (
    roles(128, 128, 64),
    roles(128, 128, 64, 2),
    roles(128, 128, 16, stages=5),
    roles(64, 64, 32, stages=8),
)
WITH_ROLES = [pytest.param(config, id=named(config), marks=needs_wgmma) for config in ROLES]
PARTS = [pytest.param(tiles(16, 32, 32, 4, 2, splits=s), id=f"{s} parts") for s in (2, 3, 7)]
PARTS += [
    pytest.param(tma_tiles(64, 32, 32, 4, 2, s, tma=EACH), id=f"{s} by TMA", marks=needs_tma) for s in (2, 5)
]
CHIP = Chip(132, 227 * 1024)
SIZES = [(5, 24, 40), (67, 104, 136)]  # no multiple of any tile, yet TMA's 16 bytes
over_sizes = pytest.mark.parametrize(("M", "N", "K"), SIZES)
over_halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def factors(M: int, N: int, K: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = torch.randn(M, K), torch.randn(N, K) / K**0.5
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype)


def assert_as_exact(mine: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor) -> None:
    """Twice torch's error in the same dtype, or two ulp of the largest number."""
    floor = 2 * torch.finfo(mine.dtype).eps * exact.abs().max().item()
    allowed = max(2 * (torchs.double() - exact).abs().max().item(), floor)
    assert (mine.double() - exact).abs().max().item() <= allowed


@over_sizes
@over_halves
@pytest.mark.parametrize("config", [*WHOLE, *WITH_ROLES])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_finished_product(
    config: Config, activation: str, M: int, N: int, K: int, dtype: torch.dtype
) -> None:
    x, weight = factors(M, N, K, dtype)
    bias, residual = (torch.randn(size).to(DEVICE, dtype) for size in ((N,), (M, N)))
    mine = products(x, weight, config, bias, activation, 1.0, residual)

    def torchs(*given: torch.Tensor) -> torch.Tensor:
        x, weight, bias, residual = given
        out = F.linear(x, weight, bias)
        return (F.gelu(out) if activation == "gelu" else out) + residual

    given = x, weight, bias, residual
    assert_as_exact(mine, torchs(*given), torchs(*(v.double() for v in given)))


@over_sizes
@over_halves
@pytest.mark.parametrize("config", PARTS)
def test_parts_of_the_depth_add_up(config: Config, M: int, N: int, K: int, dtype: torch.dtype) -> None:
    x, weight = factors(M, N, K, dtype)
    parts = products(x, weight, config)
    assert parts.shape == (config.tiles["SPLITS"], M, N)
    assert parts.dtype == torch.float32
    exact = x.double() @ weight.double().T
    assert (parts.sum(0).double() - exact).abs().max() < 1e-5 * exact.abs().max()
    assert all(torch.equal(parts, products(x, weight, config)) for _ in range(2))


@needs_tma
@pytest.mark.parametrize("config", [config for config in TMA if config.tiles["TMA"] == RESIDENT], ids=named)
def test_programs_go_on_from_tile_to_tile(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU of one processor all tiles are those of one program, or two."""
    monkeypatch.setattr(_linear_triton, "processors", lambda device: 1)
    x, weight = factors(200, 104, 136, torch.float16)
    exact = F.linear(x.double(), weight.double())
    assert_as_exact(products(x, weight, config), exact.half(), exact)


@over_halves
@pytest.mark.parametrize("config", WITH_ROLES)
@pytest.mark.parametrize("programs", [1, 5, 132])
@pytest.mark.parametrize("K", [64, 264, 1032])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_roles_go_on_from_tile_to_tile(
    config: Config,
    programs: int,
    K: int,
    activation: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """18 tiles of one step, of more than are under way, and of many times as many; again, the same bits."""
    monkeypatch.setattr(_linear_gluon, "processors", lambda device: programs)
    x, weight = factors(700, 400, K, dtype)
    bias, residual = (torch.randn(size).to(x) for size in ((400,), (700, 400)))
    for added in (None, residual, torch.randn(700, 403).to(x)[:, 1:401]):
        exact = F.linear(x.double(), weight.double(), bias.double())
        exact = F.gelu(exact) if activation == "gelu" else exact
        exact = exact if added is None else exact + added.double()
        mine = products(x, weight, config, bias, activation, 1.0, added)
        assert_as_exact(mine, exact.to(dtype), exact)
        assert all(
            torch.equal(mine, products(x, weight, config, bias, activation, 1.0, added)) for _ in range(3)
        )


def test_a_single_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number is known when the kernels are compiled."""
    monkeypatch.setattr(_linear_triton, "choose", lambda *_: PARTS[0].values[0])
    x, weight = factors(1, 48, 72, torch.float16)
    exact = F.linear(x.double(), weight.double())
    assert_as_exact(project(x, weight), exact.half(), exact)


@pytest.mark.parametrize("config", [*PARTS, pytest.param(BY_CUBLAS, id="cuBLAS")])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_a_launcher_finishes_what_was_cut(
    config: Config, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_linear_triton, "choose", lambda *_: config)
    x, weight = factors(66, 48, 72, torch.float16)
    bias, residual = torch.randn(48).to(x), torch.randn(2, 33, 48).to(x)
    mine = project(x.view(2, 33, 72), weight, bias, activation, 1.0, residual)
    exact = F.linear(x.double(), weight.double(), bias.double()).view(2, 33, 48)
    exact = (F.silu(exact) if activation == "silu" else exact) + residual.double()
    assert_as_exact(mine, exact.half(), exact)


def test_a_transposed_weight_is_read_as_it_is() -> None:
    x, weight = factors(33, 24, 40, torch.float16)
    transposed = weight.T.contiguous().T
    assert transposed.stride() == (1, 24)
    assert torch.equal(products(x, transposed, POINTERS[0]), products(x, weight, POINTERS[0]))


@pytest.mark.parametrize(
    "x", [torch.linspace(-12, 12, 4097), torch.tensor([-math.inf, -1e30, math.inf, 0.0])]
)
def test_gelu_of_the_epilogue(x: torch.Tensor) -> None:
    """Against float64, as close as float16 can tell; and beyond every number."""
    x = x.half().float()
    one = torch.ones(1, 1, dtype=torch.float16, device=DEVICE)
    mine = products(x.half().to(DEVICE)[:, None], one, POINTERS[0], None, "gelu")[:, 0].cpu()
    exact = F.gelu(x.double())
    seen = x > -math.inf  # -inf times zero is NaN in torch, and zero, its limit, here
    near = torch.isclose(mine.double(), exact, rtol=2**-11 + 1e-5, atol=2**-25 + 6e-7)
    assert (near | (mine == exact))[seen].all()


@pytest.mark.parametrize(
    "shape", [(1, 64, 64), (128, 768, 768), (197, 3072, 768), (4096, 768, 3072), (9, 8, 5)]
)
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("then_summed", [False, True])
def test_configurations_fit_a_processor(shape: tuple[int, int, int], tma: bool, then_summed: bool) -> None:
    """227 KiB of shared memory hold the tiles under way, and no part of the depth is empty."""
    found = linear_configs(*shape, 2, CHIP, tma, then_summed, then_summed)
    assert 1 <= len(found) <= 12
    assert (BY_CUBLAS in found) == then_summed
    for config in (config for config in found if config != BY_CUBLAS):
        cut = config.tiles
        assert (cut["BLOCK_M"] + cut["BLOCK_N"]) * cut["BLOCK_K"] * 2 * config.num_stages <= 227 * 1024
        assert cut["TMA"] == 0 or tma
        assert (cut["SPLITS"] - 1) * cut["BLOCK_K"] < shape[2] or cut["SPLITS"] == 1


CHIP = Chip(132, 227 * 1024)


def test_a_residual_leaves_no_room_for_the_largest_tile_of_a_resident_program() -> None:
    """128x256 beside the next tile's factors needs 64 KB, and as much again for the residual's way."""
    plain, added = (
        linear_configs(4096, 3072, 768, 2, CHIP, True, False, True, residual) for residual in (False, True)
    )
    assert plain[0] == tma_tiles(128, 256, 64, 8, 3)
    assert set(map(str, plain)) - set(map(str, added)) == {str(plain[0])}


@pytest.mark.parametrize(
    ("M", "K", "wgmma", "cublas"),
    [
        (12608, 768, True, False),
        (12608, 3072, True, True),
        (12608, 768, False, True),
        (1024, 3072, True, False),
    ],
)
def test_a_product_that_a_norm_follows_is_cublass_where_that_is_faster(
    M: int, K: int, wgmma: bool, cublas: bool
) -> None:
    chip = Chip(132, 227 * 1024, wgmma)
    found = linear_configs(M, 768, K, 2, chip, True, True, True, M >= 4096)
    assert (found[0] == BY_CUBLAS) == cublas
    assert BY_CUBLAS in found


@pytest.mark.parametrize(
    ("M", "N", "K", "expected"),
    [
        (1024, 3072, 768, ROLES[0]),  # 128 tiles for 132 processors
        (12608, 2304, 768, ROLES[1]),  # nine for each
        (1024, 2304, 768, ROLES[2]),  # 128, where larger ones are 96
        (1024, 768, 3072, ROLES[3]),  # 128
        (1024, 768, 768, tma_tiles(64, 128, 128, 4, 4)),  # too little for as many
        (4096, 768, 768, ROLES[0]),  # 128; of the smallest, four for each
        (8832, 768, 768, tma_tiles(128, 256, 64, 8, 3)),  # 276, three for some
    ],
)
def test_warps_get_roles_where_the_busiest_has_the_least_to_do(
    M: int, N: int, K: int, expected: Config
) -> None:
    sm_90 = Chip(132, 227 * 1024, wgmma=True)
    assert linear_configs(M, N, K, 2, sm_90, True, False, False)[0] == expected
    for itemsize in (2, 4):
        found = linear_configs(M, N, K, itemsize, sm_90, True, True, True, True)
        assert all((config in found) == (itemsize == 2) for config in ROLES)
        assert len(found) <= 14


@pytest.mark.parametrize(
    ("M", "N", "expected"),
    [
        (4096, 3072, tma_tiles(128, 256, 64, 8, 3)),  # 384 tiles for 132 processors
        (1024, 3072, tma_tiles(128, 128, 64, 4, 3, tma=EACH)),  # 192, two on a processor
        (1024, 768, tma_tiles(64, 128, 128, 4, 4)),  # 96
    ],
)
def test_the_first_choice_leaves_few_processors_idle(M: int, N: int, expected: Config) -> None:
    assert linear_configs(M, N, 768, 2, CHIP, True, False, False)[0] == expected
