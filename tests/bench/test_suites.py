"""The committed suites: cases that exist, commands that can be typed, devices that are said."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphopt
from bench import __main__ as command
from bench import models
from bench.suites import SUITES
from graphopt.bench.peers import named
from graphopt.bench.setting import Setting, command_of

Run = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``python -m bench`` in this process: its exit code, and what it said."""

    def ran(*args: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["bench", *args])
        with pytest.raises(SystemExit) as ended:
            command.main()
        return (ended.value.code, *capsys.readouterr())

    return ran


@pytest.mark.parametrize("name", SUITES)
def test_cases_name_factories_and_sizes_that_exist(name: str) -> None:
    suite = SUITES[name]
    assert named(suite.against)
    assert len({case.name for case in suite.cases}) == len(suite.cases)
    for case in suite.cases:
        module, _, factory = case.spec.partition(":")
        assert module == "bench.models"
        assert set(case.sizes) <= set(inspect.signature(getattr(models, factory)).parameters)
        assert case.device in ("cpu", "cuda")
        assert command_of(case, Setting()).startswith(f"graphopt bench {case.spec} --against ")


def test_gpu_suites_say_what_they_need(run: Run) -> None:
    """Both at once, as a machine with a GPU would be asked."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, said, _ = run("encoders", "ort", "vision", "--dry")
    assert code == 2
    for case in (case for name in ("encoders", "ort", "vision") for case in SUITES[name].cases):
        assert f"left out: {case.name}: needs a CUDA GPU and a CUDA build of PyTorch" in said
    assert said.count("nothing to measure here") == 3


def test_scaling_changes_one_size_at_a_time() -> None:
    base, *others = SUITES["scaling"].cases
    changed = [{n for n in base.sizes if case.sizes[n] != base.sizes[n]} for case in others]
    assert all(len(names) == 1 for names in changed)
    assert set().union(*changed) == {"layers", "width", "seq", "batch"}


def test_a_decode_step_appends_to_its_cache() -> None:
    model, args, kwargs = models.decode_step(batch=2, seq=5, layers=1)
    with torch.no_grad():
        logits, keys, values = model(*args, **kwargs)
    assert logits.shape == (2, 1, 49152)
    assert keys.shape == values.shape == (2, 3, 6, 64)
    assert torch.equal(keys[:, :, :5], args[1])
    optimized = graphopt.optimize(model, args, kwargs, effort="fast")
    torch.testing.assert_close(optimized(*args)[0], logits, rtol=1e-3, atol=1e-3)


def test_vision_models_are_of_the_sizes_that_they_say() -> None:
    for make, millions in ((models.vit_b16, 86), (models.resnet50, 25)):
        model, (image,), _ = make(batch=2)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)
        assert image.shape == (2, 3, 224, 224)
    assert image.is_contiguous(memory_format=torch.channels_last)


def test_an_unknown_suite_or_peer_is_refused(run: Run) -> None:
    for args, words in ((["cpus"], "invalid choice"), (["cpu", "--against", "egaer", "--dry"], "eager")):
        code, _, complained = run(*args)
        assert code == 2, complained
        assert words in complained


@pytest.mark.parametrize(
    ("only", "found"), [("", ["int8", "int8-static"]), ("int8", ["int8"]), ("static", ["int8-static"])]
)
def test_a_case_is_named_exactly_where_that_is_its_name(only: str, found: list[str]) -> None:
    assert command._named(["int8", "int8-static"], only) == found
