"""``graphopt.lock`` as a file: what is in it, and everything that can be wrong with it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from graphopt.errors import InputError
from graphopt.gate import lock as lockfile
from graphopt.gate.lock import settled
from tests.gate.conftest import Project, told


def test_the_lock_is_sorted_json_one_value_a_line(lock_text: str) -> None:
    found = json.loads(lock_text)
    assert (found["format"], found["schema"], list(found["models"])) == ("graphopt-lock", 1, ["model:make"])
    assert lock_text == json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    assert not [line for line in lock_text.splitlines() if len(line) > 250]


def test_the_lock_records_what_the_issue_of_a_model_needs(lock_text: str) -> None:
    facts = json.loads(lock_text)["models"]["model:make"]["facts"]
    assert facts["fusions"]["fuse_attention"] == 3
    assert facts["ops"]["graphopt.attention"] == 3
    (region,) = facts["plan"]["regions"]
    assert (region["executor"], region["provider"], region["device"]) == (
        "ort",
        "CPUExecutionProvider",
        "cpu",
    )
    assert facts["plan"]["launches"] == sum(facts["plan"]["kernels"].values()) > 10
    assert (facts["plan"]["copies"], facts["plan"]["syncs"]) == ({}, {})
    assert facts["plan"]["cuda_graph_coverage"] is None  # not on this device
    assert facts["plan"]["opset"]["ai.onnx"] > 20
    memory = facts["memory"]
    assert memory["peak"] == memory["weights"] + memory["folded"] + memory["activations"] > 0
    assert facts["serve"]["artifact_bytes"] > memory["weights"]
    assert facts["serve"]["load_ms"] > 0 and facts["serve"]["peak_bytes"] > 0
    assert 0 < facts["numerics"]["error"] < 1e-5
    assert {"torch", "onnx", "python"} <= set(facts["versions"])
    for found in (facts["latency"], facts["latency"]["control"]):
        assert found["low"] <= found["ratio"] <= found["high"]
    assert len(facts["weights"]) == 27
    assert facts["captured"]["places"]["layers.*.up aten.linear"] == 3


def test_the_lock_holds_no_path_of_the_machine_that_wrote_it(lock_text: str) -> None:
    assert '"model.py"' in lock_text
    assert str(Path.home()) not in lock_text
    assert "/tmp/" not in lock_text


def bad_locks(text: str) -> dict[str, tuple[str, str]]:
    """Locks that cannot be read, by what is wrong with them, with what the error says."""
    found = json.loads(text)
    entry = found["models"]["model:make"]
    timed = {**entry["facts"].get("latency", {}), "control": {"ratio": 1.0}}
    lines = text.splitlines()
    conflict = [*lines[:9], "<<<<<<< HEAD", lines[9], "=======", lines[10], ">>>>>>> branch", *lines[11:]]
    return {
        "truncated": (text[: len(text) // 2], "is damaged: "),
        "not text": ("\0\x01", "is damaged"),
        "empty": ("", "is damaged"),
        "a list": ("[]", "is no lock of graphopt's"),
        "foreign": ('{"lockfileVersion": 3, "packages": {}}', "is no lock of graphopt's"),
        "newer": (json.dumps({**found, "schema": 99}), "has schema 99, this graphopt reads 1"),
        "a text for a schema": (json.dumps({**found, "schema": "x"}), "is damaged: schema 'x'"),
        "conflict": ("\n".join(conflict), "holds the markers of a merge conflict"),
        "no entries": (json.dumps({**found, "models": {}}), "has no entries"),
        "models are a list": (json.dumps({**found, "models": []}), "is damaged"),
        "no facts": (json.dumps({**found, "models": {"a": {"config": {}}}}), "lacks config or facts"),
        "half an entry": (
            json.dumps({**found, "models": {"a": {**entry, "facts": {**entry["facts"], "plan": {}}}}}),
            "lacks plan.chosen among its facts",
        ),
        "half an output": (
            json.dumps(
                {**found, "models": {"a": {**entry, "facts": {**entry["facts"], "outputs": [{"type": "x"}]}}}}
            ),
            "lacks outputs.sketch among its facts",
        ),
        "half a control": (
            json.dumps({**found, "models": {"a": {**entry, "facts": {**entry["facts"], "latency": timed}}}}),
            "lacks latency.control among its facts",
        ),
        "a strange config": (
            json.dumps({**found, "models": {"a": {**entry, "config": {"spec": "model:make", "speed": 3}}}}),
            "the lock's config of a does not read",
        ),
        "a level that is a text": (
            json.dumps({**found, "models": {"a": {**entry, "config": {"spec": "model:make", "level": "2"}}}}),
            "does not read: level = '2'",
        ),
        "executors that are a text": (
            json.dumps(
                {**found, "models": {"a": {**entry, "config": {"spec": "m:x"}, "runs": {"executors": "ort"}}}}
            ),
            "the lock's config of a does not read: runs",
        ),
        "a strange budget": (
            json.dumps({**found, "models": {"a": {**entry, "budgets": {"max_sped": 3}}}}),
            "the budget 'max_sped' is unknown",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("what", list(bad_locks('{"models": {"model:make": {"facts": {}}}}' + "\n" * 20)))
@pytest.mark.parametrize("update", [False, True])
def test_a_lock_that_cannot_be_read_is_said_and_left_alone(
    project: Project, lock_text: str, what: str, update: bool
) -> None:
    text, message = bad_locks(lock_text)[what]
    project.lock.write_text(text)
    done = project.run("check", "--no-time", *(["--update"] if update else []))
    assert done.exit_code == 2
    assert message in done.stderr.replace("\n", " ")
    assert "try: " in done.stderr or "at: " in done.stderr
    assert project.lock.read_text() == text


def test_a_lock_that_is_missing(project: Project) -> None:
    done = project.run("check")
    assert done.exit_code == 2
    assert "graphopt.lock does not exist" in done.stderr
    assert "graphopt lock SPEC" in done.stderr
    assert not project.lock.exists()


def test_binary_rubbish_is_said(project: Project) -> None:
    project.lock.write_bytes(b"\xff\xfe\x00")
    done = project.run("check")
    assert (done.exit_code, "cannot be read" in done.stderr) == (2, True)


def test_a_place_that_cannot_be_a_lock_is_said_before_the_work(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.cli._gate.lock_entry", None)  # to call it would be a fault: exit code 4
    project.lock.mkdir()
    for args in (("check",), ("lock", "model:make"), ("lock", "model:make", "--force")):
        done = project.run(*args)
        assert (done.exit_code, "graphopt.lock cannot be read" in done.stderr) == (2, True), done.output
    assert not list(project.lock.iterdir())
    done = project.run("lock", "model:make", "--lock", "nowhere/graphopt.lock")
    assert (done.exit_code, "nowhere does not exist" in done.stderr) == (2, True), done.output


@pytest.mark.parametrize("pattern", ["model:mak", "other*"])
def test_a_pattern_that_matches_no_model(locked: Project, pattern: str) -> None:
    done = locked.run("check", pattern)
    assert done.exit_code == 2
    assert f"'{pattern}' matches no model of graphopt.lock" in done.stderr
    assert "it has: model:make" in done.stderr


def test_a_spec_that_fails_half_way_leaves_the_lock_alone(locked: Project) -> None:
    before = locked.lock.read_text()
    locked.write(
        locked.folder.joinpath("model.py").read_text() + "\n\ndef broken():\n    raise ValueError('no')\n"
    )
    done = locked.run("lock", "model:make", "model:broken", "--force", "--seconds", "0.1", "--processes", "1")
    assert done.exit_code == 2
    assert "model:broken raises: ValueError: no" in done.stderr
    assert locked.lock.read_text() == before
    locked.write("raise RuntimeError('half a file')\n")
    for args in (("check",), ("check", "--update")):
        done = locked.run(*args)
        assert (done.exit_code, "half a file" in done.stderr) == (2, True)
        assert locked.lock.read_text() == before
    locked.edit(
        "            x = layer(x)", "            x = layer(x)\n            raise ValueError('half a forward')"
    )
    for args in (("check",), ("check", "--update")):
        done = locked.run(*args)
        assert (done.exit_code, "half a forward" in done.stderr) == (2, True)
        assert locked.lock.read_text() == before


def test_a_disk_that_is_full_leaves_the_lock_alone(locked: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    before = locked.lock.read_text()
    real = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        if ".graphopt.lock." in path.name:
            real(path, text[:100], **options)  # what fits is written
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    locked.change(lambda entry: None)
    before = locked.lock.read_text()
    again = ("lock", "model:make", "--force", "--seconds", "0.1", "--processes", "1")
    for args in (("check", "--no-time", "--update"), again):
        done = locked.run(*args)
        assert done.exit_code == 2, done.output
        assert "cannot write graphopt.lock: No space left on device" in done.stderr
        assert "has room" in done.stderr
        assert locked.lock.read_text() == before
        assert sorted(path.name for path in locked.folder.iterdir()) == ["graphopt.lock", "model.py"]


def test_a_model_is_locked_once(locked: Project) -> None:
    done = locked.run("lock", "model:make")
    assert done.exit_code == 2
    assert "graphopt check 'model:make' --update" in done.stderr
    assert locked.run("lock", "model:make", "model:other", "--name", "x").exit_code == 2


def test_the_lock_of_another_cpu_is_compared_as_far_as_it_carries_over(locked: Project) -> None:
    locked.change(lambda entry: entry["facts"]["machine"].update(cpu="Zilog Z80"))
    code, findings = locked.check()
    assert code == 0
    why = "the lock was written with another CPU: Zilog Z80, not "
    for rule in ("launches", "memory-served"):
        assert why in told(findings, rule, "skipped")["message"]
    for rule in ("fusions", "cost-flops", "memory", "size", "error", "drift"):
        assert told(findings, rule, "passed")
    locked.edit("k = self.memory.expand(2, 2, 5, 4)", "k = self.memory")
    assert locked.check()[0] == 1


def test_settled_keeps_what_noise_changed_and_nothing_else() -> None:
    old = {
        "cost": {"ms": 1.0, "flops": 10.0},
        "latency": None,
        "remarks": [{"pass": "a", "reason": "b", "ms": 1.0, "count": 1}],
    }
    new = {
        "cost": {"ms": 1.3, "flops": 11.0},
        "latency": {"x": 1},
        "remarks": [{"pass": "a", "reason": "b", "ms": 1.1, "count": 2}],
    }
    found = settled(new, old)
    assert found["cost"] == {"ms": 1.0, "flops": 11.0}
    assert found["latency"] == {"x": 1}
    assert found["remarks"] == [{"pass": "a", "reason": "b", "ms": 1.0, "count": 2}]
    assert settled({"ms": 9.0}, {"ms": 1.0}) == {"ms": 9.0}


def test_settled_keeps_what_a_busy_machine_adds_to_small_amounts() -> None:
    old = {"load_ms": 5.0, "peak_bytes": 3 * 2**20}
    assert settled({"load_ms": 40.0, "peak_bytes": 12 * 2**20}, old) == old
    new = {"load_ms": 90.0, "peak_bytes": 60 * 2**20}
    assert settled(new, old) == new


def test_a_lock_is_timed_in_several_processes(project: Project) -> None:
    done = project.run("lock", "model:make", "--seconds", "0.1", "--processes", "2")
    assert done.exit_code == 0, done.output
    found = json.loads(project.lock.read_text())["models"]["model:make"]["facts"]["latency"]
    assert found["processes"] == 2
    assert found["low"] <= found["ratio"] <= found["high"]


def test_a_model_that_no_other_process_can_load_is_locked_by_one_alone(project: Project) -> None:
    project.edit("def make():", f"def make():\n    assert __import__('os').getpid() == {os.getpid()}")
    done = project.run("lock", "model:make", "--seconds", "0.1", "--processes", "2")
    assert done.exit_code == 2
    assert "cannot be timed in a process of its own" in done.stderr
    assert "--processes 1" in done.stderr
    assert not project.lock.exists()
    assert project.run("lock", "model:make", "--seconds", "0.1", "--processes", "1").exit_code == 0


def test_settled_keeps_a_ratio_whose_interval_holds_the_old_one() -> None:
    old = {"latency": {"baseline": "eager", "ratio": 0.5, "low": 0.49, "high": 0.51}}
    noise = {"latency": {"baseline": "eager", "ratio": 0.51, "low": 0.48, "high": 0.53}}
    faster = {"latency": {"baseline": "eager", "ratio": 0.4, "low": 0.39, "high": 0.41}}
    assert settled(noise, old) == old
    assert settled(faster, old) == faster


def test_settled_takes_a_control_that_moved_or_is_new_whatever_the_baseline_does() -> None:
    def timed(**control: float) -> dict[str, Any]:
        found = {"baseline": "eager", "ratio": 0.5, "low": 0.48, "high": 0.52}
        return {"latency": {**found, "control": control} if control else found}

    old = timed(ratio=0.97, low=0.96, high=0.98)
    assert settled(timed(ratio=0.98, low=0.97, high=0.99), old) == old
    for now in (timed(ratio=1.05, low=1.04, high=1.06), timed()):
        assert settled(now, old) == now
    assert settled(old, timed()) == old


def test_two_entries_are_found_by_pattern(lock_text: str) -> None:
    entries = {"a:x": {}, "a:y": {}, "b:x": {}}
    assert lockfile.matching(entries, ["a:*", "a:x"], Path("l")) == ["a:x", "a:y"]
    assert lockfile.matching(entries, [], Path("l")) == list(entries)
    with pytest.raises(InputError, match="matches no model"):
        lockfile.matching(entries, ["a:*", "c:*"], Path("l"))
