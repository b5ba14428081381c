"""``graphopt check`` as a user drives it: verdicts, budgets, exit codes, judging again, the cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from graphopt.cli._gate import budgets_of
from graphopt.cli._subject import Config, prepare
from graphopt.errors import InputError, LoweringError
from graphopt.gate import cache
from graphopt.gate.budgets import FIELDS, Budgets
from graphopt.gate.finding import Finding, Result, exit_code, require_compared, worst
from graphopt.gate.judge import judge
from tests.gate.conftest import Project, told

SAMPLES = {"baseline": [10.0] * 64, "candidate": [5.0] * 64}


def judged(regressed: Path, **changes: Any) -> list[dict[str, Any]]:
    """Saved results judged with other samples, as rows."""
    row = json.loads(regressed.read_text())["results"][0]
    budgets = Budgets(**changes.pop("budgets", {}))
    for name, value in changes.pop("locked", {}).items():
        row["locked"]["facts"][name] = value
    row["facts"]["serve"]["load_ms"] = 50.0
    made = Result(
        row["model"],
        [],
        row["locked"],
        row["facts"],
        changes.pop("samples", SAMPLES),
        changes.pop("waiting", 0.0),
    )
    return [finding.to_dict() for finding in judge(made, budgets).findings]


LATENCY = {
    "baseline": "eager",
    "ratio": 0.5,
    "low": 0.495,
    "high": 0.505,
    "baseline_ms": 10.0,
    "waiting": 0.0,
}


CONTROL = {"ratio": 0.9, "low": 0.89, "high": 0.91}


def times(candidate: float, baseline: float = 10.0, **others: float) -> dict[str, list[float]]:
    given = {"baseline": baseline, "candidate": candidate, **others}
    return {side: [ms] * 64 for side, ms in given.items()}


@pytest.mark.parametrize(
    ("candidate", "slowdown", "ratio"),
    [
        (5.0, "passed", "passed"),
        (5.5, "failed", "passed"),
        (4.0, "improved", "passed"),
        (11.0, "failed", "failed"),
    ],
)
def test_latency_is_held_against_the_baseline_and_the_lock(
    regressed: Path, candidate: float, slowdown: str, ratio: str
) -> None:
    rows = judged(regressed, samples=times(candidate), locked={"latency": LATENCY})
    assert told(rows, "slowdown", slowdown)
    assert told(rows, "latency-ratio", ratio)


@pytest.mark.parametrize(
    ("candidate", "control", "slowdown", "baseline_slowdown"),
    [
        (4.5, 5.0, "passed", "improved"),
        (5.0, 5.0, "failed", "passed"),  # a tenth more of the control's time
        (5.5, 6.11, "passed", "passed"),  # the machine slows the executor, and both with it
        (6.0, 6.67, "passed", "failed"),  # the executor is slower, and more than a machine explains
        (4.0, 5.0, "improved", "improved"),
    ],
)
def test_the_lock_is_held_against_the_control_closely_and_the_baseline_widely(
    regressed: Path, candidate: float, control: float, slowdown: str, baseline_slowdown: str
) -> None:
    samples = times(candidate, control=control)
    rows = judged(regressed, samples=samples, locked={"latency": {**LATENCY, "control": CONTROL}})
    found = told(rows, "slowdown", slowdown)
    assert "times the time of the graph as captured, 0.900 in the lock, 0.936 is allowed" in found["message"]
    assert "0.500 in the lock, 0.575" in told(rows, "baseline-slowdown", baseline_slowdown)["message"]
    assert told(rows, "latency-ratio", "passed")


def test_without_a_control_on_both_sides_the_baseline_serves(regressed: Path) -> None:
    for samples, locked in (
        (times(5.5), {**LATENCY, "control": CONTROL}),
        (times(5.5, control=6.0), LATENCY),
    ):
        rows = judged(regressed, samples=samples, locked={"latency": locked})
        assert "times the time of eager, 0.500 in the lock" in told(rows, "slowdown")["message"]
        assert not [row for row in rows if row["rule"] == "baseline-slowdown"]
    controlled = {**LATENCY, "control": CONTROL}
    off = {"max_slowdown": None}
    rows = judged(regressed, samples=times(9, control=5.0), locked={"latency": controlled}, budgets=off)
    assert not [row for row in rows if "slowdown" in row["rule"]]
    other = {**LATENCY, "control": CONTROL, "baseline": "ort"}
    rows = judged(regressed, samples=times(5.5, control=5.5), locked={"latency": other})
    assert told(rows, "slowdown")  # the control is what it was, whatever the baseline
    assert not [row for row in rows if row["rule"] == "baseline-slowdown"]


def test_a_slow_down_says_what_changed(regressed: Path) -> None:
    rows = judged(regressed, samples=times(5.5), locked={"latency": LATENCY})
    found = told(rows, "slowdown")
    said = "0.550 [0.550, 0.550] times the time of eager, 0.500 in the lock, 0.520 is allowed"
    assert found["message"].startswith(said)
    assert any("model.py changed" in words for words in found["because"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"samples": times(11.0, 20.0)}, "the baseline itself takes 2.00 times as long as for the lock"),
        ({"samples": times(5.5), "waiting": 0.6}, "its threads waited for a core 60% of the time"),
        (
            {"samples": {"baseline": [10.0] * 32, "candidate": [4.0] * 16 + [7.0] * 16}},
            "too noisy to tell",
        ),
    ],
)
def test_what_cannot_be_told_is_inconclusive(regressed: Path, change: dict[str, Any], said: str) -> None:
    rows = judged(regressed, **change, locked={"latency": LATENCY})
    assert said in told(rows, "slowdown", "inconclusive")["message"]


def test_the_ratio_of_another_machine_or_baseline_is_not_compared(regressed: Path) -> None:
    rows = judged(regressed, locked={"latency": {**LATENCY, "baseline": "ort"}})
    assert "no ratio to this baseline" in told(rows, "slowdown", "skipped")["message"]
    rows = judged(regressed, locked={"latency": LATENCY, "machine": {"cpu": "Z80"}})
    assert "another CPU: Z80" in told(rows, "slowdown", "skipped")["message"]
    assert told(rows, "latency-ratio", "passed")


@pytest.mark.parametrize(("least", "status"), [(300.0, "passed"), (500.0, "failed")])
def test_throughput(regressed: Path, least: float, status: str) -> None:
    rows = judged(regressed, budgets={"min_throughput": least})
    assert told(rows, "throughput", status)["message"].startswith("400 items a second")


@pytest.mark.parametrize(
    ("budget", "rule"),
    [
        ("max_memory", "memory-limit"),
        ("max_size", "size-limit"),
        ("max_load_ms", "load"),
        ("max_error", "error"),
    ],
)
def test_absolute_budgets(regressed: Path, budget: str, rule: str) -> None:
    assert told(judged(regressed, budgets={budget: 1e12}), rule, "passed")
    assert told(judged(regressed, budgets={budget: 1e-12}), rule, "failed")


def test_a_metric_is_held_against_the_original_and_the_lock(locked: Project) -> None:
    args = ("--metric", "model:accuracy")
    assert told(locked.check(*args)[1], "metric", "passed")
    locked.change(
        lambda entry: entry["facts"].update(
            metric={"name": "model:accuracy", "original": 1.0, "optimized": 1.0}
        )
    )
    code, findings = locked.check(*args)
    assert code == 1
    assert (
        "the lock has 1: 1 less" in told(findings, "metric")["message"]
        or "less, 0.001 is allowed" in told(findings, "metric")["message"]
    )


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("model:nothing", "has no 'nothing'"),
        ("accuracy", "names no function"),
        ("model:make", "model:make raises on the original model"),
    ],
)
def test_a_metric_that_does_not_work(locked: Project, metric: str, said: str) -> None:
    done = locked.run("check", "--no-time", "--metric", metric)
    assert (done.exit_code, said in done.stderr) == (2, True)


def test_saved_results_are_judged_under_other_budgets(project: Project, regressed: Path) -> None:
    for options, code in (((), 1), (("--max-latency-ratio", "1e9"), 1)):
        assert project.run("check", "--judge", regressed, *options).exit_code == code
    done = project.run("check", "--judge", regressed, "--max-size", "1")
    assert "1 B is allowed" in done.stdout
    for path, said in (("nowhere.json", "cannot be read"), (__file__, "holds no results")):
        done = project.run("check", "--judge", path)
        assert (done.exit_code, said in done.stderr) == (2, True)
    assert project.run("check", "model:make", "--judge", regressed).exit_code == 2


def test_update_shows_the_difference_and_writes_it(locked: Project) -> None:
    locked.edit("range(3)", "range(2)")
    done = locked.run("check", "--no-time", "--update")
    assert done.exit_code == 0, done.output
    gone, new = '-     "fuse_attention": 3,', '+     "fuse_attention": 2,'
    assert done.stdout.index("attention fused 3 -> 2") < done.stdout.index(gone) < done.stdout.index(new)
    assert locked.check()[0] == 0
    before = locked.lock.read_text()
    assert "is up to date" in locked.run("check", "--no-time", "--update").stdout
    assert locked.lock.read_text() == before


def test_a_check_that_passed_is_cached(locked: Project) -> None:
    def check(*args: str) -> Any:
        done = locked.run("check", "--no-time", *args)
        assert done.exit_code == 0, done.output
        return done

    assert "cached" not in check().stdout
    assert "cached: nothing has changed since" in check().stdout
    folder = locked.folder / ".graphopt" / "check"
    (kept,) = folder.glob("*.json")
    kept.write_text(kept.read_text()[:100])
    assert "cached" not in check().stdout
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("in the way")
    assert "the result was not cached" in check().stderr


def test_the_cache_sees_every_change(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(**settings: Any) -> str:
        sys.modules.pop("model", None)
        made = prepare(Config("model:make"))
        return cache.key(made.captured, made.inputs, made.passes, made.host, settings)

    keys = [key(), key(max_size=1.0)]
    assert key() == keys[0]
    edits = {
        "a comment": ("torch.manual_seed(0)", "torch.manual_seed(0)  # a comment"),
        "an input": ("randn(2, 3, 8),)", "randn(2, 3, 8).mul(2),)"),
        "a weight": (
            "model = Model().eval()",
            "model = Model().eval(); model.layers[0].up.bias.data[0] += 1e-6",
        ),
        "the graph": ("F.gelu", "F.silu"),
        "what is asked of the host": ("x = layer(x)", "x = layer(x.cpu())"),
    }
    for old, new in edits.values():
        project.edit(old, new)
        keys.append(key())
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_the_cache_sees_a_file_that_the_model_imports(project: Project) -> None:
    """It is in no frame of the graph: only the factory uses it."""
    keys = []
    for text in ("SIZE = 3  # one", "SIZE = 3  # two"):
        (project.folder / "sizes.py").write_text(text)
        project.edit("def make():", "def make():\n    import sizes\n    assert sizes.SIZE")
        for name in ("model", "sizes"):
            sys.modules.pop(name, None)
        made = prepare(Config("model:make"))
        keys.append(cache.key(made.captured, made.inputs, made.passes, made.host))
    sys.modules.pop("sizes")
    assert keys[0] != keys[1]


def test_a_gpu_that_is_not_here_is_checked_by_its_graph(project: Project) -> None:
    assert project.run("lock", "model:make", "--target", "h100").exit_code == 0
    facts = json.loads(project.lock.read_text())["models"]["model:make"]["facts"]
    assert (facts["plan"], facts["latency"], facts["cost"]["device"]) == (None, None, "h100")
    assert facts["gpu"]["fused"]["graphopt.attention"] == 3
    assert facts["gpu"]["launches"] < facts["captured"]["places"].__len__() * 3
    done = project.run("check", "--json")
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["results"]
    assert "h100 is not here" in told(found["findings"], "latency-ratio", "skipped")["message"]
    project.edit("k = self.memory.expand(2, 2, 5, 4)", "k = self.memory")
    code, findings = project.check()
    assert code == 1
    assert told(findings, "fusions")["message"].startswith("attention fused 3 -> 0")
    assert project.run("lock", "model:make", "--name", "x", "--target", "h900").exit_code == 2


def test_budgets_come_from_four_places(locked: Project) -> None:
    def found(**options: Any) -> Budgets:
        entry = json.loads(locked.lock.read_text())["models"]["model:make"]
        return budgets_of(entry, "model:make", options)

    assert found() == Budgets(seconds=0.1)  # the lock was written with it
    settings = "max_size = 1\nmax_slowdown = false\nmax_memory = 7"
    (locked.folder / "pyproject.toml").write_text(f"[tool.graphopt.check]\n{settings}\n")
    assert found() == Budgets(seconds=0.1, max_size=1.0, max_slowdown=None, max_memory=7.0)
    locked.change(lambda entry: entry["budgets"].update(max_size=2))
    assert found(max_memory=None) == Budgets(seconds=0.1, max_size=2.0, max_slowdown=None)
    assert locked.check("--max-memory", "off")[0] == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_sped = 1", "the budget 'max_sped' is unknown"),
        ("max_slowdown = 'x'", "max_slowdown = 'x' is not a number of at least 0"),
        ("max_slowdown = -1", "is not a number of at least 0"),
        ("max_slowdown = nan", "is not a number of at least 0"),
        ("max_slowdown = true", "is not a number of at least 0"),
        ("seconds = false", "seconds cannot be switched off"),
        ("on_inconclusive = 'maybe'", "is not one of exit, pass, fail"),
        ("metric = 3", "metric = 3 is not a text"),
    ],
)
def test_a_bad_budget_is_said_with_its_place(locked: Project, text: str, said: str) -> None:
    (locked.folder / "pyproject.toml").write_text(f"[tool.graphopt.check]\n{text}\n")
    done = locked.run("check")
    assert done.exit_code == 2
    assert said in done.stderr
    assert "[tool.graphopt.check] of " in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--max-slowdown", "fast"), "'fast' is no number"),
        (("--on-inconclusive", "maybe"), "is not one of exit, pass, fail"),
        (("--baseline", "abacus"), "unknown executor 'abacus'"),
    ],
)
def test_a_bad_option_is_said(locked: Project, args: tuple[str, ...], said: str) -> None:
    done = locked.run("check", *args)
    assert (done.exit_code, said in done.stderr) == (2, True), done.output


@pytest.mark.parametrize(("mode", "code"), [("exit", 3), ("pass", 0), ("fail", 1)])
def test_what_inconclusive_does_is_configured(mode: str, code: int) -> None:
    unsure = Result("m", [Finding("a", "passed", ""), Finding("b", "inconclusive", "")], {}, {})
    assert (unsure.verdict, exit_code(unsure, mode)) == ("inconclusive", code)
    wrong = Result("m", [*unsure.findings, Finding("c", "failed", "")], {}, {})
    assert exit_code(wrong, mode) == 1
    assert worst([0, 3]) == 3
    assert worst([0, 1, 3]) == 1


def test_a_check_that_checked_nothing_fails(locked: Project) -> None:
    with pytest.raises(InputError, match="no model was checked"):
        require_compared([])
    with pytest.raises(InputError, match="nothing of m was compared: because"):
        require_compared([Result("m", [Finding("a", "skipped", "because")], {}, {})])
    locked.edit("return model, (torch.randn(2, 3, 8),)", "return model, ()")
    done = locked.run("check")
    assert done.exit_code == 2


def test_a_model_that_no_executor_gets_right_fails(locked: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.runtime import scheduler

    real = scheduler.run
    monkeypatch.setattr(scheduler, "run", lambda plan, inputs: [2 * value for value in real(plan, inputs)])
    done = locked.run("check", "--no-time")
    assert done.exit_code == 1
    assert "no executor gives the right answer" in done.stderr


@pytest.mark.parametrize("command", ["lock", "check"])
def test_help_names_every_budget(project: Project, command: str) -> None:
    done = project.run(command, "--help")
    assert done.exit_code == 0
    for name in FIELDS:
        assert f"--{name.replace('_', '-')}"[:20] in done.stdout
    assert "Exit codes" in done.stdout


def test_another_candidate_may_be_the_baseline(locked: Project) -> None:
    done = locked.run("check", "--no-cache", "--baseline", "ort", "--json")
    (found,) = json.loads(done.stdout)["results"]
    (ratio,) = [row for row in found["findings"] if row["rule"] == "latency-ratio"]
    assert "times the time of ort" in ratio["message"]
    assert found["facts"]["latency"]["baseline"] == "ort"
    (slowdown,) = [row for row in found["findings"] if row["rule"] == "slowdown"]
    assert "times the time of the graph as captured" in slowdown["message"]
    assert not [row for row in found["findings"] if row["rule"] == "baseline-slowdown"]
    assert {len(row) >= 12 for row in found["samples"].values()} == {True}
    assert found["samples"].keys() == {"baseline", "candidate", "control"}


def test_executors_that_cannot_run_the_graph_as_captured_make_no_control(
    locked: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise LoweringError("not without its fusions")

    monkeypatch.setattr("graphopt.cli._gate.partition", refuse)
    done = locked.run("check", "--no-cache", "--json", "--seconds", "0.1")
    (found,) = json.loads(done.stdout)["results"]
    assert found["samples"].keys() == {"baseline", "candidate"}
    assert "control" not in found["facts"]["latency"]
    (slowdown,) = [row for row in found["findings"] if row["rule"] == "slowdown"]
    assert "times the time of eager" in slowdown["message"]
