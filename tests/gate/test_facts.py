"""The parts that facts are made of: calls to the host, memory by accounting, sketches of outputs, causes."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.gate import cache, causes, host, probe
from graphopt.gate.compare import differences
from graphopt.gate.facts import pattern_of, portable
from tests.gate.conftest import told


def calls(run: Any) -> dict[str, Any]:
    return host.watch(run)


def test_calls_that_leave_the_device_are_seen_at_their_line() -> None:
    x = torch.ones(3)
    found = calls(lambda: (x.cpu(), x.to("cpu"), x.numpy(), x.sum().item(), bool(x.any()), x.tolist()))
    assert found["copies"] == {"Tensor.cpu": 1, "Tensor.to": 1, "Tensor.numpy": 1}
    assert found["syncs"] == {"Tensor.item": 1, "Tensor.__bool__": 1, "Tensor.tolist": 1}
    (line,) = found["places"]["Tensor.cpu"]
    assert line.rpartition(":")[0] == __file__


def test_what_moves_nothing_is_no_copy() -> None:
    x = torch.ones(3)
    found = calls(lambda: (x.to(x.device), x.to(torch.float64), x.to(x), x.to(device=x.device), x.half() + x))
    assert (found["copies"], found["syncs"]) == ({}, {})


def test_a_wait_that_capture_decided_is_told_and_one_that_is_left_fails(lock_text: str) -> None:
    facts = json.loads(lock_text)["models"]["model:make"]["facts"]
    decided = copy.deepcopy(facts)
    decided["host"] = {
        "copies": {},
        "syncs": {"Tensor.__bool__": 2},
        "places": {"Tensor.__bool__": ["m.py:3"]},
    }
    rows = [finding.to_dict() for finding in differences(facts, decided)]
    assert (
        told(rows, "syncs", "changed")["because"][1]
        == "capture decided it once: nothing of it is left in the graph"
    )
    left = copy.deepcopy(decided)
    left["ops"]["aten.item"] = 1
    rows = [finding.to_dict() for finding in differences(facts, left)]
    assert told(rows, "syncs", "failed")["source"] == "m.py:3"


def test_the_distance_of_sketches_is_that_of_the_outputs() -> None:
    before = torch.randn(4, 500, dtype=torch.float64)
    ratios = []
    for seed in range(20):
        noise = torch.randn(4, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        after = before + 1e-3 * noise
        sketches = [probe.sketch([value], [value.float()]) for value in (after, before)]
        truth = float((after - before).norm() / before.norm())
        ratios.append(probe.distance(*sketches) / truth)
    assert min(ratios) > 0.4 and max(ratios) < 2.0
    assert 0.8 < sum(ratios) / len(ratios) < 1.25


def test_a_sketch_is_the_same_in_every_process() -> None:
    value = torch.arange(100, dtype=torch.float64)
    (row,) = probe.sketch([value], [value])
    assert row["sketch"][:3] == [134.5, 31.5, 48.0]


def test_outputs_of_other_types_are_infinitely_far() -> None:
    one, other = (
        probe.sketch([torch.ones(3).double()], [torch.ones(3, dtype=d)])
        for d in (torch.float32, torch.float16)
    )
    assert probe.distance(one, other) == math.inf
    assert probe.distance(one, one + one) == math.inf
    whole, half = ([{"type": "int64 [1]", "digest": d}] for d in "ab")
    assert (probe.distance(whole, whole), probe.distance(whole, half)) == (0.0, math.inf)


def test_a_digest_knows_values_dtype_and_shape() -> None:
    x = torch.arange(6.0)
    others = (x + 1e-6, x.double(), x.reshape(2, 3), x.bfloat16(), torch.empty(0), torch.tensor(1.0))
    digests = [probe.digest(value) for value in (x, *others)]
    assert len(set(digests)) == len(digests)
    assert probe.digest(x.reshape(2, 3).t().contiguous().t()) == probe.digest(x.reshape(2, 3))


def test_places_have_stars_for_numbers_and_lines_no_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pattern_of("encoder.layer.11.attention.2") == "encoder.layer.*.attention.*"
    assert pattern_of("conv2d.block1") == "conv2d.block1"
    monkeypatch.chdir(tmp_path)
    assert portable(f"{tmp_path}/a/b.py:7") == "a/b.py:7"
    assert portable(f"{Path(torch.__file__).parent}/nn/functional.py:9") == "torch/nn/functional.py:9"
    assert portable("/somewhere/else/model.py:3") == "else/model.py:3"
    assert portable("") == ""


def test_the_module_that_calls_more_often_than_its_siblings_is_named() -> None:
    def facts(count: int, lines: Any = None) -> dict[str, Any]:
        return {"captured": {"places": {"l.* aten.add": count}}, "lines": {"l.* aten.add": lines or {}}}

    now = facts(4, {"l.0": [1, "m.py:1"], "l.1": [2, "m.py:2"], "l.2": [1, "m.py:1"]})
    (found,) = causes.places(facts(3), now)
    assert (found.before, found.after, found.module, found.source) == (3, 4, "l.1", "m.py:2")
    assert causes.places(now, now) == []


def test_the_cache_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_KEPT", 3)
    for number in range(5):
        assert cache.keep(tmp_path, f"key{number}", {"number": number}) == ""
    assert len(list(tmp_path.glob("*.json"))) == 3
    assert cache.load(tmp_path, "key4") == {"number": 4, "key": "key4"}
    assert cache.load(tmp_path, "key9") is None
