"""The openvino executor: by OpenVINO itself, and by its plugin where only that is installed."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.capture.export import capture_any
from graphopt.compiler.compare import compare
from graphopt.compiler.remarks import Remarks
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.errors import ExecutionError, InputError, LoweringError
from graphopt.runtime import executors, scheduler, ways
from graphopt.runtime.executors import EXECUTORS, absent
from graphopt.runtime.executors.openvino import OpenVino, OpenVinoProgram, executor, reading
from graphopt.runtime.executors.ort.providers import OPENVINO
from graphopt.runtime.partition import partition
from graphopt.runtime.target import Target
from tests._models import FAMILIES, MLP, randn, randomised

HOST = Target(torch.device("cpu"))
NOT_INSTALLED = "OpenVINO is not installed"


@pytest.fixture
def itself() -> None:
    """OpenVINO runs here, without ONNX Runtime."""
    if reason := executor.problem():
        pytest.skip(reason)


@pytest.fixture(params=["itself", "plugin"])
def here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to have it, where they run; the name of the provider in the plan's row."""
    if request.param == "itself":
        request.getfixturevalue("itself")
        return "OpenVINO"
    monkeypatch.setattr(executor, "problem", lambda: NOT_INSTALLED)
    if reason := absent(EXECUTORS["openvino"], HOST):
        pytest.skip(reason)
    return OPENVINO


class Wide(nn.Module):
    """Sums that are long enough for the precision of their terms to show."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


def error_of(precision: Any) -> float:
    """The largest error of a model in a precision, relative to float64."""
    model, x = randomised(Wide()), randn(16, 256)
    graph, inputs = capture_any(model, (x,), None)
    plan = partition(graph, [OpenVino(precision)], HOST, Remarks())
    (found,) = scheduler.run(plan, inputs)
    with torch.no_grad():
        wanted = model.double()(x.double())
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.usefixtures("here")
def test_it_computes_in_the_precision_that_was_asked_for() -> None:
    assert error_of("f32") < 5e-6


@pytest.mark.usefixtures("here")
def test_bf16_is_had_on_request_alone() -> None:
    try:
        found = error_of("bf16")
    except LoweringError as error:
        pytest.skip(error.message)
    if found < 5e-6:
        pytest.skip("this processor does not compute in bf16")
    assert 1e-4 < found < 5e-2


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_model_is_as_exact_as_before(family: str, here: str) -> None:
    example = FAMILIES[family]()
    opt = graphopt.optimize(
        example.model, example.args, example.kwargs, executors=("openvino", "eager"), effort="fast"
    )
    rows = [row for row in opt.report.plan if row["executor"] == "openvino"]
    assert rows
    assert all(row["provider"] == here for row in rows)
    assert opt.report.chosen.error < 1e-5
    for row in rows if here == OPENVINO else ():
        assert row["providers"][OPENVINO] > 0
        for fallback in row["fallbacks"]:
            assert OPENVINO in fallback["reason"] or "ONNX Runtime made it" in fallback["reason"]


@pytest.mark.usefixtures("here")
def test_sizes_may_vary() -> None:
    model = randomised(MLP())
    opt = graphopt.optimize(
        model, (randn(4, 8),), dynamic={"x": {0: "batch"}}, executors=("openvino",), effort="fast"
    )
    for batch in (1, 4, 9):
        x = randn(8, batch, seed=batch).t()
        with torch.no_grad():
            before, reference = model(x), model.double()(x.double())
            model.float()
        verdict = compare(before, opt(x), reference, MODEL_FLOOR_ULPS)
        assert verdict.ok, verdict.reason


@pytest.mark.openvino
@pytest.mark.usefixtures("here")
def test_it_is_a_candidate_by_itself() -> None:
    opt = graphopt.optimize(randomised(MLP()), (randn(4, 8),))
    names = [row.name for row in opt.report.candidates]
    assert names[:2] == ["ort", "openvino"]


@pytest.mark.parametrize("here", ["plugin"], indirect=True)
def test_a_region_of_which_the_plugin_takes_nothing_is_refused(
    here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.runtime.executors.ort import placement

    monkeypatch.setattr(placement.Placement, "counts", lambda self: {"CPUExecutionProvider": 3})
    with pytest.raises(LoweringError, match=f"{OPENVINO} takes no node of the region"):
        graphopt.optimize(randomised(MLP()), (randn(4, 8),), executors=("openvino",))


# OpenVINO itself


def program_of(model: nn.Module, *args: torch.Tensor) -> tuple[OpenVinoProgram, Any]:
    """The program of a whole model, and the graph's inputs."""
    graph, inputs = capture_any(model, args, None)
    plan = partition(graph, [OpenVino()], HOST, Remarks())
    (step,) = plan.steps
    assert isinstance(step.program, OpenVinoProgram)
    return step.program, inputs


class Layout(nn.Module):
    """Reads and gives what small and large tensors, strides and views are made of."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.where(mask, x * scale, 0.0)
        return y, y.sum(-1), mask & (x > 0), x.mean()


@pytest.mark.usefixtures("itself")
@pytest.mark.parametrize("rows", [3, 300], ids=["copied", "in place"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_goes_in_and_out_is_the_callers_own(rows: int, dynamic: bool) -> None:
    x, mask = randn(rows, 128), randn(rows, 128, seed=1) > 0
    model, scale = Layout().eval(), torch.tensor(3.0)
    opt = graphopt.optimize(
        model,
        (x, mask, scale),
        dynamic={"x": {0: "rows"}, "mask": {0: "rows"}} if dynamic else None,
        executors=("openvino",),
        effort="fast",
    )
    assert [row["provider"] for row in opt.report.plan] == ["OpenVINO"]
    first = opt(x, mask, scale)
    kept = [value.clone() for value in first]
    strided = x.flip(0).t().contiguous().t()
    second = opt(strided, mask, scale)
    for got, wanted in zip(second, model(strided, mask, scale), strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted)
    for value, before, wanted in zip(first, kept, model(x, mask, scale), strict=True):
        assert torch.equal(value, before)  # a later call writes into no older result
        torch.testing.assert_close(value, wanted)


@pytest.mark.usefixtures("itself")
def test_inputs_that_record_gradients_leave_nothing_behind() -> None:
    program, _ = program_of(randomised(MLP()), randn(4, 8))
    x = randn(4, 8).requires_grad_()
    (found,) = program.run([x])
    assert not found.requires_grad
    (request,) = program._compiled.get()._idle
    assert not any(own is not None and own.requires_grad for own in request._inputs)


@pytest.mark.usefixtures("itself")
def test_calls_of_several_threads_do_not_meet() -> None:
    model = randomised(MLP())
    program, _ = program_of(model, randn(4, 8))
    given = [randn(4, 8, seed=seed) for seed in range(64)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: program.run([x])[0], given * 4))
    with torch.no_grad():
        for x, got in zip(given * 4, found, strict=True):
            torch.testing.assert_close(got, model(x))


@pytest.mark.usefixtures("itself")
def test_weights_are_read_where_the_model_has_them_and_live_as_long() -> None:
    model = randomised(Wide())
    x = randn(16, 256)
    with torch.no_grad():
        wanted = model(x)
    program, _ = program_of(model, x)
    del model
    gc.collect()
    for _ in range(2):
        torch.testing.assert_close(program.run([x])[0], wanted)
        program.rest()
    again = program.with_threads(1)
    assert again.settings.threads == 1
    assert program.with_threads(program.settings.threads) is program
    torch.testing.assert_close(again.run([x])[0], wanted)


@pytest.mark.usefixtures("itself")
def test_its_own_counters_are_the_profile() -> None:
    program, inputs = program_of(randomised(Wide()), randn(16, 256))
    results, times = program.profile(inputs)
    assert torch.equal(results[0], program.run(inputs)[0])
    assert sum(row.ms for row in times) > 0
    assert any("FullyConnected" in row.op or "MatMul" in row.op for row in times), times


@pytest.mark.usefixtures("itself")
def test_what_takes_openvino_down_takes_only_a_process_of_its_own_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crash = f"{reading._TRIAL}\nimport os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(reading, "_TRIAL", crash)
    opt = graphopt.optimize(randomised(MLP()), (randn(4, 8),), executors=("openvino", "ort"), effort="fast")
    assert [row["executor"] for row in opt.report.plan] == ["ort"]
    (reason,) = (row.reason for row in opt.report.remarks if "took down" in row.reason)
    assert "OpenVINO took down the process that tried the region first: Segmentation fault" in reason


@pytest.mark.usefixtures("itself")
def test_a_trial_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_TRIAL", "import time; time.sleep(60)")
    monkeypatch.setattr(reading, "_PATIENCE", 0.2)
    with pytest.raises(LoweringError, match="cannot be tried in a process of its own: TimeoutExpired"):
        graphopt.optimize(randomised(MLP()), (randn(4, 8),), executors=("openvino",), effort="fast")


class Perceptrons(nn.Module):
    """What OpenVINO 2026.4 falls over on processors with AVX-512: small products in a row, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(8, 96) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(96, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


@pytest.mark.usefixtures("itself")
def test_a_model_that_openvino_falls_over_is_run_by_another() -> None:
    model, x = randomised(Perceptrons()), randn(2, 3, 8)
    opt = graphopt.optimize(model, (x,), executors=("openvino", "eager"), effort="fast")
    with torch.no_grad():
        torch.testing.assert_close(opt(x), model(x))


class Stubborn:
    """An OpenVINO that fails in one way."""

    def __init__(self, given: str = "f32", refuses: str = "", fails: str = "") -> None:
        self.given, self.refuses, self.fails = given, refuses, fails
        self.inputs = self.outputs = ()

    def read_model(self, text: bytes) -> bytes:
        if self.refuses:
            raise RuntimeError(f"Exception from src/inference/core.cpp:126:\n{self.refuses}\n\n")
        return text

    def compile_model(self, model: bytes, device: str, settings: Any) -> Stubborn:
        return self

    def get_property(self, name: str) -> Any:
        return SimpleNamespace(get_type_name=lambda: self.given)

    def create_infer_request(self) -> Any:
        def infer() -> None:
            raise RuntimeError(self.fails)

        return SimpleNamespace(infer=infer)


@pytest.mark.parametrize(
    ("core", "reason"),
    [
        (Stubborn(refuses="no kernel for Einsum"), "OpenVINO refuses the region: no kernel for Einsum"),
        (Stubborn(given="bf16"), "OpenVINO computes in bf16 on this processor, not in f32"),
    ],
)
def test_what_it_refuses_is_said(core: Stubborn, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "core", lambda: core)
    monkeypatch.setattr(executor, "problem", lambda: None)
    monkeypatch.setattr(reading, "try_elsewhere", lambda model, settings: None)
    with pytest.raises(LoweringError, match=reason):
        graphopt.optimize(randomised(MLP()), (randn(4, 8),), executors=("openvino",))


def test_a_run_that_fails_is_an_error_and_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "core", lambda: Stubborn(fails="the arena is gone"))
    monkeypatch.setattr(executor, "problem", lambda: None)
    monkeypatch.setattr(reading, "try_elsewhere", lambda model, settings: None)
    program, _ = program_of(randomised(MLP()), randn(4, 8))
    with pytest.raises(ExecutionError, match="OpenVINO failed in the middle of a run: the arena is gone"):
        program._compiled.get().run([], [])


def test_one_that_does_not_load_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise ImportError("libtbb.so.12: cannot open shared object file")

    monkeypatch.setattr(reading, "core", fail)
    monkeypatch.setattr(executor, "plugin_is_installed", lambda: False)
    monkeypatch.setattr(executor.importlib.util, "find_spec", lambda name: object())
    assert "OpenVINO does not load: libtbb.so.12" in str(executor.problem.__wrapped__())


def test_one_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "problem", executor.problem.__wrapped__)
    monkeypatch.setattr(executor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(executor, "plugin_is_installed", lambda: False)
    assert "pip install 'graphopt[openvino]'" in str(absent(EXECUTORS["openvino"], HOST))


def test_it_is_for_the_cpu() -> None:
    gpu = Target(torch.device("cuda:1"))
    assert absent(EXECUTORS["openvino"], gpu) == "OpenVINO runs on the CPU, the target is cuda:1"


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match=r"precision 'int8' is unknown\s+try: one of: f32, bf16"):
        OpenVino("int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("installed", [True, False])
def test_what_does_not_load_is_remarked_and_none_is_no_news(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenVino, "absent", lambda self, target: "OpenVINO does not load: why")
    monkeypatch.setattr(executors, "openvino_is_installed", lambda: installed)
    graph, _ = capture_any(randomised(MLP()), (randn(4, 8),), None)
    remarks = Remarks()
    found = ways.plan_candidates(graph, graph, None, HOST, remarks)
    assert "openvino" not in [candidate.name for candidate in found]
    said = [row.reason for row in remarks.rows if "openvino" in row.reason]
    assert said == ["openvino is no candidate: OpenVINO does not load: why"] * installed
