"""The cross-entropy of a projection in Triton, its logits cut up in every way; samples are one tile."""

from __future__ import annotations

import math

import pytest
import torch

from graphopt.ir.op import OPS, Sample
from graphopt.kernels import _cross_entropy_triton as module
from graphopt.kernels._linear_configs import EACH, RESIDENT, Chip, loss_configs, tiles, tma_tiles
from graphopt.kernels._tuning import Config
from tests.kernels._faces import DEVICE, MARKS, assert_fences_hold, fenced_allocations, launched
from tests.kernels.test_ops import assert_right, cast, mapped

pytestmark = MARKS
OP = OPS["linear_cross_entropy"]
HAS_TMA = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)  # the interpreter has it, too
needs_tma = pytest.mark.skipif(not HAS_TMA, reason="needs sm_90")
CUTS = {
    "tiles of 32": tiles(16, 32, 16, 4, 2, group=2),
    "tiles of 16": tiles(32, 16, 32, 4, 2),
    "TMA": tma_tiles(64, 32, 32, 4, 2, tma=RESIDENT),
    "TMA, a program a tile": tma_tiles(64, 16, 64, 4, 2, tma=EACH),
}
# Rows, depth and classes: no multiple of a tile, yet TMA's 16 bytes.
SIZES = [(5, 24, 40), (67, 136, 104), (1, 8, 1)]
over_cuts = pytest.mark.parametrize(
    "cut", [pytest.param(c, id=name, marks=[needs_tma] * ("TMA" in name)) for name, c in CUTS.items()]
)
over_halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
over_reductions = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


def use(monkeypatch: pytest.MonkeyPatch, cut: Config, rows: int = 4, parts: int = 2) -> None:
    """Have the logits cut so, and the losses made of so many rows and tiles at a time."""
    near = Config({"BLOCK_R": rows, "BLOCK_P": parts}, 4)
    chosen = {module._row_losses_kernel: near}
    monkeypatch.setattr(module, "choose", lambda kernel, *_: chosen.get(kernel, cut))
    monkeypatch.setattr(module, "SUMMED", 4)


def drawn(M: int, K: int, N: int, dtype: torch.dtype = torch.float16, bias: bool = True) -> Sample:
    factors = torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(N) if bias else None
    target = torch.randint(N, (M,)).where(torch.arange(M) % 5 != 3, -100)
    return mapped(cast(Sample((*factors, target, -100, "none")), dtype), lambda x: x.to(DEVICE))


def changed(sample: Sample, **values: object) -> Sample:
    names = ("x", "weight", "bias", "target", "ignore_index", "reduction", "float32")
    return Sample(tuple({**dict(zip(names, sample.args, strict=False)), **values}.values()))


@over_cuts
@over_halves
@pytest.mark.parametrize(("M", "K", "N"), SIZES)
def test_every_cut_is_right(
    cut: Config, dtype: torch.dtype, M: int, K: int, N: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, cut)
    for bias in (True, False):
        sample = drawn(M, K, N, dtype, bias)
        (found,) = launched(OP, sample)
        assert_right(OP, sample, [found])
        assert (found >= 0).all()
        assert torch.equal(found, launched(OP, sample)[0])


@over_reductions
@over_halves
@pytest.mark.parametrize("float32", [False, True])
def test_every_reduction_is_right(
    reduction: str, dtype: torch.dtype, float32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are more than are added at a time."""
    use(monkeypatch, CUTS["tiles of 32"])
    sample = changed(drawn(67, 24, 104, dtype), reduction=reduction, float32=float32)
    (found,) = launched(OP, sample)
    assert found.dtype == (torch.float32 if float32 else dtype)
    assert_right(OP, sample, [found])


def test_logits_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for in float32, losses are exact to float32; those of torch are of logits in half precision."""
    use(monkeypatch, CUTS["tiles of 16"])
    sample = changed(drawn(67, 24, 104), float32=True)
    assert_right(OP, sample, launched(OP, sample), torch_is_the_measure=False)
    with pytest.raises(AssertionError):
        assert_right(OP, sample, [OP(*sample.args)], torch_is_the_measure=False)


@pytest.mark.parametrize(("rows", "parts"), [(1, 1), (2, 8), (16, 4), (8, 1)])
def test_every_cut_of_the_losses_is_right(rows: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, CUTS["tiles of 16"], rows, parts)
    sample = drawn(13, 24, 104)
    assert_right(OP, sample, launched(OP, sample))


@needs_tma
def test_programs_go_on_from_tile_to_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU of one processor all tiles are those of one program."""
    use(monkeypatch, CUTS["TMA"])
    monkeypatch.setattr(module, "processors", lambda device: 1)
    sample = drawn(200, 24, 104)
    assert_right(OP, sample, launched(OP, sample))


@over_cuts
@over_reductions
def test_every_cut_stays_inside_its_buffers(
    cut: Config, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, cut)
    assert_fences_hold(OP, changed(drawn(13, 40, 104), reduction=reduction), monkeypatch)


def test_logits_are_never_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, CUTS["tiles of 32"])
    with fenced_allocations(monkeypatch) as made:
        launched(OP, drawn(67, 24, 104))
    assert sum(x.numel() for x in made) < 67 * 104


@over_cuts
def test_rows_that_do_not_count(cut: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the index of those is a class or none; a mean of no rows is NaN."""
    use(monkeypatch, cut)
    sample = drawn(13, 24, 104)
    for index, target in ((-100, torch.full((13,), -100)), (40, torch.full((13,), 40)), (2**40, None)):
        for reduction in ("none", "sum", "mean"):
            given = changed(sample, ignore_index=index, reduction=reduction)
            if target is None:  # one that no row has
                given = changed(given, target=sample.args[3].clamp(min=0))
                assert_right(OP, given, launched(OP, given))
                continue
            (found,) = launched(OP, changed(given, target=target.to(DEVICE)))
            assert found.isnan() if reduction == "mean" else (found == 0).all()
    mixed = torch.arange(13).where(torch.arange(13) % 2 == 0, 40).to(DEVICE)
    for reduction in ("none", "sum", "mean"):
        given = changed(sample, target=mixed, ignore_index=40, reduction=reduction)
        assert_right(OP, given, launched(OP, given))


@over_cuts
def test_classes_that_cannot_be(cut: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of -inf forbids whole tiles of classes, the first one too; a target among them costs inf."""
    use(monkeypatch, cut, parts=1)
    sample = drawn(13, 24, 104)
    bias = sample.args[2].clone()
    bias[:40], bias[64:] = -math.inf, -math.inf
    target = (40 + torch.arange(13)).to(DEVICE)
    given = changed(sample, bias=bias, target=target)
    (found,) = launched(OP, given)
    assert_right(OP, given, [found])
    forbidden = changed(given, target=target.where(target != 45, 3))
    (with_one,) = launched(OP, forbidden)
    assert with_one[5] == math.inf
    assert torch.equal(with_one[target != 45], found[target != 45])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the numbers that it is about
def test_what_is_not_a_number_stays_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row with a NaN or an infinite logit has no loss, nor has one that can be of no class; others do."""
    use(monkeypatch, CUTS["tiles of 32"])
    sample = drawn(13, 24, 104, bias=False)
    x = sample.args[0].clone()
    x[0, 5], x[6, 0] = math.nan, math.inf
    expected, (found,) = OP(*sample.args), launched(OP, changed(sample, x=x))
    bad = torch.tensor([n in (0, 6) for n in range(13)], device=DEVICE)
    assert found[bad].isnan().all()
    assert torch.equal(found[~bad].isnan(), expected[~bad].isnan())
    nothing = torch.full((104,), -math.inf, device=DEVICE).half()
    (none,) = launched(OP, changed(sample, bias=nothing))
    assert torch.equal(none.isnan(), sample.args[3] != -100)


@over_cuts
def test_a_target_that_is_no_class_has_no_loss(cut: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, cut)
    sample = drawn(13, 24, 104)
    target = sample.args[3].clamp(min=0)
    wrong = target.clone()
    wrong[1], wrong[4], wrong[7], wrong[12] = 104, -1, 2**40, -(2**62)
    with fenced_allocations(monkeypatch):
        (found,) = launched(OP, changed(sample, target=wrong))
    (right,) = launched(OP, changed(sample, target=target))
    assert torch.equal(found.isnan(), wrong != target)
    assert torch.equal(found[wrong == target], right[wrong == target])
    assert launched(OP, changed(sample, target=wrong, reduction="mean"))[0].isnan()


@over_reductions
def test_no_rows(reduction: str) -> None:
    sample = drawn(5, 24, 40)
    x, *_, target, _, _ = sample.args
    given = changed(sample, x=x[:0], target=target[:0], reduction=reduction)
    torch.testing.assert_close(launched(OP, given)[0], OP(*given.args), equal_nan=True)


def test_what_is_refused() -> None:
    assert OP.triton is not None
    x, weight, bias, target, *rest = drawn(5, 24, 40).args
    assert OP.triton.refuses(x, weight, bias, target, *rest) is None
    assert OP.triton.refuses(x, weight[:0], None, target, *rest) == "there are no classes"
    assert OP.triton.refuses(x[:, :0], weight[:, :0], bias, target, *rest) == "the product has no depth"
    said = OP.triton.refuses(x.double(), weight.double(), None, target, *rest)
    assert said is not None
    assert "float64" in said


@pytest.mark.parametrize("rows", [1, 17, 64, 65, 8192])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_configurations_fit_a_processor(rows: int, tma: bool, itemsize: int) -> None:
    """Of an H100 and of a GPU with 100 KiB of shared memory; some are always left, by pointers too."""
    for shared in (227 * 1024, 100 * 1024):
        found = loss_configs(rows, 32000, itemsize, Chip(132, shared), tma)
        assert len(set(map(str, found))) == len(found)
        assert any(not config.tiles["TMA"] for config in found)
        for config in found:
            m, n, k = (config.tiles[f"BLOCK_{letter}"] for letter in "MNK")
            assert (m + n) * k * itemsize * config.num_stages <= shared
            assert config.tiles["SPLITS"] == 1
            assert tma or not config.tiles["TMA"]


def test_the_likeliest_configuration() -> None:
    """The largest tile, unless processors would be idle or addresses take too many registers."""
    chip, largest = Chip(132, 227 * 1024), tiles(128, 256, 64, 8, 3, group=16)
    assert loss_configs(2048, 32000, 2, chip, True)[0] == tma_tiles(128, 256, 64, 8, 3, group=16)
    assert loss_configs(2048, 32000, 2, chip, False)[0] == largest
    for rows in (16, 2048):
        apart = loss_configs(rows, 32000, 2, chip, False, whole=False)
        assert all(config.tiles["BLOCK_K"] == 32 for config in apart)
    assert loss_configs(512, 1000, 2, chip, False)[0] == tiles(64, 128, 64, 4, 4, group=16)
    assert loss_configs(16, 32000, 2, chip, False)[0] == tiles(16, 128, 64, 4, 5)
