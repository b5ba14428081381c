"""Configurations: the heuristic's until tuned, then kept on disk for just those circumstances."""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.kernels import _triton, _tuning, linear_activation
from graphopt.kernels._triton import Launch, launch
from graphopt.kernels._tuning import Config, cache_folder, choose, tune

CPU = torch.device("cpu")
SLOW, FAST, BROKEN = Config({"BLOCK": 1}), Config({"BLOCK": 2}, 8, 3), Config({"BLOCK": 3})


class Kernel:
    """A stand-in that remembers what it was launched with, and refuses one configuration."""

    __name__ = "_toy_kernel"

    def __init__(self, source: str = "one") -> None:
        self.cache_key = source
        self.launched: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(x: torch.Tensor, **options: Any) -> None:
            if options["BLOCK"] == 3:
                raise RuntimeError("out of resources: shared memory\nRequired: lots")
            self.launched.append(options["BLOCK"])

        return run


def launcher(
    kernel: Kernel, candidates: Sequence[Config] = (SLOW, FAST, BROKEN), key: Any = 7
) -> Callable[..., None]:
    def run(x: torch.Tensor) -> None:
        launch(kernel, (1,), x, **choose(kernel, x.device, (key, x.dtype), candidates).options)

    return run


def timed(kernel: Kernel) -> Callable[[Sequence[Callable[[], Any]]], list[float]]:
    """A timer that finds every larger block faster."""

    def timer(thunks: Sequence[Callable[[], Any]]) -> list[float]:
        found = []
        for thunk in thunks:
            thunk()
            found.append(10.0 / kernel.launched[-1])
        return found

    return timer


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process knows: only what is on disk."""
    monkeypatch.setattr(_tuning, "_known", {})
    monkeypatch.setattr(_tuning, "_near", {})


def files() -> list[Path]:
    return sorted((cache_folder() / "tuning").glob("*"))


X = torch.ones(3)


def test_the_heuristic_chooses_and_nothing_is_measured_unasked() -> None:
    kernel = Kernel()
    launcher(kernel)(X)
    assert kernel.launched == [1]
    assert files() == []


def test_the_fastest_is_kept_for_this_process_and_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    (found,) = tune(launcher(kernel), X, timer=timed(kernel))
    assert (found.kernel, found.config, found.us) == ("_toy_kernel", FAST, [10.0, 5.0, None])
    assert found.failures == {2: "RuntimeError: out of resources: shared memory"}
    launcher(kernel)(X)
    forget(monkeypatch)
    launcher(kernel)(X)
    assert kernel.launched[-2:] == [2, 2]
    assert [path.suffix for path in files()] == [".json"]


def test_what_is_known_is_not_measured_again_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    tune(launcher(kernel), X, timer=timed(kernel))
    forget(monkeypatch)
    assert tune(launcher(kernel), X, timer=timed(kernel)) == []
    assert len(tune(launcher(kernel), X, timer=timed(kernel), again=True)) == 1


def test_a_heuristic_that_fails_does_not_end_the_tuning() -> None:
    kernel = Kernel()
    (found,) = tune(launcher(kernel, (BROKEN, SLOW)), X, timer=timed(kernel))
    assert found.config == SLOW


def test_a_kernel_without_a_candidate_that_runs_says_why() -> None:
    kernel = Kernel()
    with pytest.raises(RuntimeError, match=r"_toy_kernel: no configuration runs at .*out of resources"):
        tune(launcher(kernel, (BROKEN,)), X, timer=timed(kernel))
    assert files() == []


@pytest.mark.parametrize(
    ("key", "near"),
    [(7, True), (13, True), (4, True), (15, False), (3, False), (0, False), ("a", False), (True, False)],
)
def test_a_size_that_is_near_takes_what_was_measured(key: Any, near: bool) -> None:
    """The same size wherever it stands in a key, and at most twice as large or small."""
    kernel = Kernel()
    tune(launcher(kernel), X, timer=timed(kernel))
    launcher(kernel, key=key)(X)
    assert kernel.launched[-1] == (2 if near else 1)
    assert len(files()) == 1


def test_the_nearest_of_two_is_taken_as_soon_as_it_is_measured() -> None:
    kernel = Kernel()
    tune(launcher(kernel, key=8), X, timer=timed(kernel))
    launcher(kernel, key=10)(X)
    assert kernel.launched[-1] == 2
    tune(launcher(kernel, (FAST, SLOW), key=9), X, timer=lambda thunks: [2.0, 1.0])
    launcher(kernel, key=10)(X)
    assert kernel.launched[-1] == 1
    assert len(tune(launcher(kernel, key=10), X, timer=timed(kernel))) == 1  # it is none's own measurement


def test_what_is_no_candidate_here_is_not_taken_from_near() -> None:
    kernel = Kernel()
    tune(launcher(kernel), X, timer=timed(kernel))
    launcher(kernel, (SLOW, BROKEN), key=8)(X)
    assert kernel.launched[-1] == 1


def test_keys_that_differ_in_two_sizes_are_not_near() -> None:
    assert _tuning._ratio((8, 8, "a"), (9, 9, "a")) == 9 / 8
    assert _tuning._ratio((8, 8, "a"), (9, 10, "a")) is None
    assert _tuning._ratio((8, 8, "a"), (9, 8, "b")) is None
    assert _tuning._ratio((8, 8), (8, 8, 8)) is None


@pytest.mark.parametrize("other", ["key", "dtype", "source", "torch"])
def test_another_circumstance_is_another_measurement(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    tune(launcher(kernel), X, timer=timed(kernel))
    forget(monkeypatch)
    if other == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    changed = Kernel("two" if other == "source" else "one")
    run = launcher(changed, key=8 if other == "key" else 7)
    run(X.half() if other == "dtype" else X)
    assert changed.launched == [1]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"for": {}}', "for", "tiles", "warps"],
    ids=["empty", "half written", "a list", "another's", "no config", "no tiles", "text for warps"],
)
def test_a_file_that_cannot_be_read_is_said_and_measured_again(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    tune(launcher(kernel), X, timer=timed(kernel))
    (path,) = files()
    whole = json.loads(path.read_text())
    damaged = {
        "for": {"for": whole["for"]},
        "tiles": {**whole, "config": {"tiles": 3}},
        "warps": {**whole, "config": {**whole["config"], "num_warps": "8"}},
    }
    path.write_text(json.dumps(damaged[text]) if text in damaged else text)
    forget(monkeypatch)
    with pytest.warns(RuntimeWarning, match="passed over, tune again"):
        launcher(kernel)(X)
    assert kernel.launched[-1] == 1
    tune(launcher(kernel), X, timer=timed(kernel))
    forget(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launcher(kernel)(X)
    assert kernel.launched[-1] == 2


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "file"))
    kernel = Kernel()
    with pytest.warns(RuntimeWarning, match=r"passed over|cannot be written, the tuning lasts this process"):
        tune(launcher(kernel), X, timer=timed(kernel))
    launcher(kernel)(X)
    assert kernel.launched[-1] == 2


def test_a_full_disk_is_said_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    kernel = Kernel()
    with pytest.warns(RuntimeWarning, match="cannot be written, the tuning lasts this process: .*No space"):
        tune(launcher(kernel), X, timer=timed(kernel))
    assert files() == []


def test_the_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("GRAPHOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "graphopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "somebody")
    assert cache_folder() == tmp_path / "somebody" / ".cache" / "graphopt"


@pytest.mark.gpu
def test_candidates_are_timed_on_the_gpu() -> None:
    x = torch.randn(2**24, device="cuda")
    short, long = _tuning.interleaved([x[:1024].neg, x.neg])
    assert 0 < short < long


@pytest.mark.gpu
def test_candidates_are_compiled_ahead_of_their_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = (torch.randn(size, device="cuda").half() for size in ((96, 160), (224, 160), (224,)))
    compiled: list[str] = []
    counted = _tuning.compile_ahead

    def compile_ahead(launches: Sequence[Launch]) -> None:
        counted(launches)
        monkeypatch.setattr(
            _triton.triton.knobs.runtime, "jit_cache_hook", lambda **_: compiled.append("late")
        )

    monkeypatch.setattr(_tuning, "compile_ahead", compile_ahead)
    (result,) = tune(linear_activation.FACE.launch, x, weight, bias, "relu", again=True)
    assert sum(us is not None for us in result.us) > 1
    assert compiled == []


def test_of_a_second_kernel_only_the_one_is_tuned_that_the_first_ones_choice_brings() -> None:
    """As the norm behind a product: in how many parts it adds up, the product's choice says."""
    first, second = Kernel(), Kernel()

    def run(x: torch.Tensor) -> None:
        config = choose(first, x.device, ("product",), (SLOW, FAST))
        launch(first, (1,), x, **config.options)
        launch(
            second,
            (1,),
            x,
            **choose(second, x.device, ("norm", *config.tiles.values()), (SLOW, FAST)).options,
        )

    found = tune(run, X, timer=lambda thunks: [10.0 - place for place, _ in enumerate(thunks)])
    assert [(result.key, result.config) for result in found] == [(("product",), FAST), (("norm", 2), FAST)]
    assert tune(run, X, timer=lambda thunks: pytest.fail("all is known")) == []
