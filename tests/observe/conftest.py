"""Two reports: a made one that holds every awkward thing, and one of a real optimization."""

from __future__ import annotations

import math

import pytest
import torch

import graphopt
from graphopt.compiler.remarks import Remark, Rewrite
from graphopt.observe.report import BASELINE, Candidate, GraphNode, Report
from graphopt.runtime.profile import NodeTime

MEMORY = ("weights", "folded", "activations", "block", "measured", "workspace", "peak")
HOSTILE = """</script><img src=x onerror="document.title='owned'">'{{ 7 * 7 }}[bold]"""


@pytest.fixture
def hostile() -> str:
    return HOSTILE


def a_report() -> Report:
    """Times, errors that JSON has no number for, a reverted rewrite, names that would like to be markup."""
    before = (
        GraphNode("x", "input", (), "float32 [2, 8]", "", "", (), "args[0]"),
        GraphNode("linear", "aten.linear", ("x",), "float32 [2, 8]", "/m/model.py:3", "body.fc", ("linear",)),
        GraphNode("gelu", "aten.gelu", ("linear",), "float32 [2, 8]", "/m/model.py:4", HOSTILE, ("gelu",)),
        GraphNode("add", "aten.add", ("gelu", "x"), "float32 [2, 8]", "/m/model.py:5", "body", ("add",)),
        GraphNode("output", "output", ("add",), "", "", "", ()),
    )
    after = (
        before[0],
        GraphNode(
            HOSTILE,
            "graphopt.linear_activation",
            ("x",),
            "float32 [2, 8]",
            "/m/model.py:4",
            "body",
            ("linear", "gelu"),
        ),
        GraphNode("add", "aten.add", (HOSTILE, "x"), "float32 [2, 8]", "/m/model.py:5", "body", ("add",)),
        before[-1],
    )
    return Report(
        model=f"Net{HOSTILE}",
        ops_before={"aten.linear": 1, "aten.gelu": 1, "aten.add": 1},
        ops_after={"graphopt.linear_activation": 1, "aten.add": 1},
        rewrites=[
            Rewrite("fuse_linear_activation", "fuse", "gelu", "/m/model.py:4", "body", 1.5e-7, 2.5e-7, True),
            Rewrite("fuse_linear_activation", "fuse", "gelu_1", "", "", 1.0e-7, 2.5e-8, True, shared=True),
            Rewrite("fold_wrong", "fold", "add", "", "", 0.0, math.inf, False, f"it differs {HOSTILE}"),
        ],
        remarks=[
            Remark("passed", "fuse_linear_activation", "gelu", "/m/model.py:4", "body", "2 -> 1", 128.0),
            Remark("missed", "fuse_cheap", "add", "/m/model.py:5", "body", "cheap", 64.0, 0.0, 0.001),
            Remark("missed", "fuse_dear", "add", "/m/model.py:5", "body", "too dear", 2**20, 0.0, 0.25),
            Remark("missed", "fuse_dear", "gelu", "/m/model.py:4", "body", "too dear", 2**20, 0.0, 0.25),
            Remark("analysis", "partition", "", "", "", HOSTILE, math.nan),
        ],
        candidates=[
            Candidate("ort", 0.5, 0.01, 2.2e-7, chosen=True),
            Candidate("inductor", None, None, math.nan, reason=f"it fails to run {HOSTILE}"),
            Candidate(BASELINE, 1.5, 0.02, 1.1e-7),
        ],
        plan=[
            {
                "step": "region0",
                "executor": "ort",
                "device": "cpu",
                "nodes": 2,
                "ops": {"graphopt.linear_activation": 1},
                "reads": ["x"],
                "writes": ["add"],
            }
        ],
        node_times=[
            NodeTime(HOSTILE, "BiasGelu", "ort", 0.3, "/m/model.py:4", "body"),
            NodeTime("add", "Add", "ort", 0.05, "/m/model.py:5", "body"),
            NodeTime("node_Cast_1", "Cast", "ort", 0.1, "", ""),
        ],
        memory={
            "weights": 1536,
            "folded": 0,
            "before": dict.fromkeys(MEMORY, 1536),
            "after": {**dict.fromkeys(MEMORY, 2048), "measured": None, "workspace": None},
            "peak_rss": 2**30,
        },
        versions={"graphopt": "0.1.0", "torch": "2.13.0"},
        seconds={"capture": 1.0},
        graph_before=before,
        graph_after=after,
    )


@pytest.fixture
def report() -> Report:
    return a_report()


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8), torch.nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))


@pytest.fixture(scope="session")
def real() -> Report:
    """Of a transformer's feed-forward block, whose GELU and norm are fused."""
    return graphopt.optimize(Block().eval(), (torch.randn(2, 3, 8),), effort="fast").report
