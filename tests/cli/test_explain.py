"""``graphopt explain`` as a user drives it: ranked, as JSON, for an absent GPU, against a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def test_remarks_are_ranked_by_price_and_name_the_source(workspace: Path, run: Run) -> None:
    done = run("explain", "zoo:block", "--kind", "all", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["format"], found["model"], found["target"]) == ("graphopt-explanation", "Block", "cpu")
    assert found["roofline_ms"]["after"] < found["roofline_ms"]["before"]
    passed = [row for row in found["remarks"] if row["kind"] == "passed"]
    assert {row["pass"] for row in passed} >= {"fuse_bias_gelu", "fuse_add_layer_norm"}
    assert all(row["source"].rpartition(":")[0] == str(workspace / "zoo.py") for row in passed)
    assert all(row["ms"] > 0 and row["bytes"] > 0 for row in passed if row["pass"] == "fuse_bias_gelu")
    table = run("explain", "zoo:block", "--kind", "all").stdout
    prices = [float(line.split("│")[2].replace(",", "")) for line in table.splitlines() if "│ passed" in line]
    assert prices == sorted(prices, reverse=True)
    assert "fuse_bias_gelu" in table


def test_a_gpu_that_is_not_there_has_its_own_prices(workspace: Path, run: Run) -> None:
    prices = {
        name: json.loads(run("explain", "zoo:block", "--json", "--target", name).stdout)["roofline_ms"][
            "before"
        ]
        for name in ("h100", "h200", "l4")
    }
    assert prices["h200"] < prices["h100"] < prices["l4"]


def test_two_runs_are_compared(workspace: Path, run: Run) -> None:
    assert run("explain", "zoo:block", "--target", "h100", "-o", "before.json").exit_code == 0
    args = ("--disable", "fuse_bias_gelu", "--target", "h100")
    changed = run("explain", "zoo:block", *args, "--against", "before.json", "--json")
    (gone,) = [
        row for row in json.loads(changed.stdout)["changes"] if row["group"]["pass"] == "fuse_bias_gelu"
    ]
    assert (gone["what"], gone["before"], gone["after"]) == ("gone", 1, 0)
    assert "fuse_bias_gelu" in run("explain", "zoo:block", *args, "--against", "before.json").stdout
    same = run("explain", "before.json", "--against", "before.json")
    assert "Nothing differs" in same.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("zoo:block", "--target", "h1000"), "no limits are known of 'h1000'"),
        (("zoo:block", "--target", "cuda:7"), "cuda:7"),
        (("zoo:block", "--disable", "fuse_gelo"), "did you mean"),
        (("nothing.json",), "cannot be read"),
        (("other.json",), "holds no explanation"),
        (("zoo:block", "--outputs", "logits"), "no output 'logits'"),
    ],
)
def test_bad_input(workspace: Path, run: Run, args: tuple[str, ...], words: str) -> None:
    (workspace / "other.json").write_text("{}")
    done = run("explain", *args)
    assert done.exit_code == 2, done.output
    assert words in done.output
