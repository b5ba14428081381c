"""Random programs through the whole pipeline: never a wrong number, an exception, or a rewrite taken back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import graphopt
from graphopt.capture.export import capture
from graphopt.compiler.evaluate import outputs
from graphopt.compiler.manager import PassManager
from graphopt.compiler.reference import computed, output_reference
from graphopt.compiler.remarks import Remark, Remarks, Rewrite
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.ir.graph import Graph
from graphopt.passes.default import pipeline
from tests._programs import load, programs
from tests.passes._harness import LIMITS

NIGHTLY = os.environ.get("GRAPHOPT_PROGRAMS")  # how many; each night others
EXAMPLES = int(NIGHTLY or 200)
EXAMPLE, OTHER = {"batch": 3, "seq": 5}, {"batch": 2, "seq": 3}  # sizes, and later ones where dynamic
WAYS = ("passes",) * 9 + ("optimize",)  # lowering to ONNX Runtime takes as long as all else


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.mark.timeout(EXAMPLES * 10)
@hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize=not NIGHTLY,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)
@given(source=programs(), way=st.sampled_from(WAYS))
def test_a_random_program_stays_the_same_program(source: str, way: str, folder: Path) -> None:
    try:
        _check(source, way, folder)
    except Exception as error:
        error.add_note(f"\nThrough {way}, the program\n\n{source}")
        raise


def _check(source: str, way: str, folder: Path) -> None:
    program = load(source, folder)
    model, dynamic = program.Program().eval(), program.DYNAMIC
    free = set().union(*(names.values() for names in dynamic.values())) if dynamic else ()
    sizes = {name: OTHER[name] if name in free else size for name, size in EXAMPLE.items()}
    example, others = program.inputs(**EXAMPLE, seed=0), [program.inputs(**sizes, seed=s) for s in (1, 2)]
    with torch.no_grad():
        model(*example)  # a draw that does not even run is a fault of the recipes
    captured = capture(model, example, dynamic=dynamic)
    if way == "optimize":
        opt = graphopt.optimize(model, example, dynamic=dynamic, effort="fast")
        _nothing_went_wrong(program.FINITE, opt.report.remarks, opt.report.rewrites)
        for args in (example, *others):
            with torch.no_grad():
                wanted, found = model(*args), opt(*args)
            assert pytree.tree_structure(found) == pytree.tree_structure(wanted)
            _agree(captured, args, pytree.tree_leaves(found))
        return
    remarks = Remarks()
    outcome = PassManager(pipeline(), remarks, LIMITS).run(captured.clone(), list(example))
    outcome.graph.check()
    _nothing_went_wrong(program.FINITE, remarks.rows, outcome.rewrites)
    for args in (example, *others):
        _agree(captured, args, outputs(outcome.graph, args))


def _nothing_went_wrong(finite: bool, remarks: Sequence[Remark], rewrites: Sequence[Rewrite]) -> None:
    """No pass raised; none was taken back, but for infinities: products of weights may keep them."""
    bad = (
        "undone",
        "its check failed",
        "all rewrites were reverted",
        "still ",
        *(("reverted",) if finite else ()),
    )
    said = [f"{row.pass_name} at {row.node}: {row.reason}" for row in remarks if row.reason.startswith(bad)]
    assert not said, "\n".join(said)
    assert not finite or all(rewrite.kept for rewrite in rewrites)


def _agree(captured: Graph, args: Sequence[torch.Tensor], found: list[Any]) -> None:
    verdict = output_reference(captured, args, MODEL_FLOOR_ULPS).compare(computed(captured, found))
    assert verdict.ok, verdict.reason
