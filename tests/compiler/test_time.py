"""Time grows with the number of layers and no faster, and a graph of 2,000 nodes is a matter of seconds."""

from __future__ import annotations

import functools
import time

import pytest

import graphopt
from bench.compile_time import IDS, llama
from graphopt.capture.export import capture
from graphopt.compiler.evaluate import outputs
from graphopt.compiler.manager import PassManager
from graphopt.compiler.reference import computed, output_reference
from graphopt.compiler.remarks import Remarks
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.ir.graph import Graph
from graphopt.passes.default import pipeline
from tests.passes._harness import LIMITS

FEW, MANY = 12, 96
AT_MOST, ATTEMPTS = 1.3, 3  # of the time a layer; a busy machine gets another try


@functools.cache
def graph_of(layers: int) -> Graph:
    return capture(llama(layers), (), {"input_ids": IDS})


def seconds_a_layer(layers: int) -> float:
    """CPU time of the passes with verification, site by site and end to end, for each layer."""
    graph = graph_of(layers)
    start = time.process_time()
    outcome = PassManager(pipeline(), Remarks(), LIMITS).run(graph.clone(), [IDS])
    reference = output_reference(graph, [IDS], MODEL_FLOOR_ULPS)
    assert reference.compare(computed(graph, outputs(outcome.graph, [IDS]))).ok
    return (time.process_time() - start) / layers


def test_each_layer_takes_the_same_time() -> None:
    seconds_a_layer(2)  # what is done once a process
    ratios = []
    for _ in range(ATTEMPTS):
        ratios.append(seconds_a_layer(MANY) / seconds_a_layer(FEW))
        if ratios[-1] <= AT_MOST:
            return
    pytest.fail(f"{MANY} layers take {ratios} times as long a layer as {FEW}")


def test_identical_layers_are_verified_once() -> None:
    graph = graph_of(MANY)
    outcome = PassManager(pipeline(), Remarks(), LIMITS).run(graph.clone(), [IDS])
    fused = [row for row in outcome.rewrites if row.pass_name.startswith("fuse_")]
    assert len(fused) >= 5 * MANY
    assert sum(not row.shared for row in fused) <= 20


@pytest.mark.slow
def test_two_thousand_nodes_take_seconds() -> None:
    model = llama(36)
    graphopt.optimize(llama(1), (), {"input_ids": IDS}, effort="fast")
    start = time.process_time()
    optimized = graphopt.optimize(model, (), {"input_ids": IDS}, effort="fast")
    took = time.process_time() - start
    assert sum(optimized.report.ops_before.values()) > 2000
    assert took < 20, (
        optimized.report.seconds
    )  # CPU seconds: about 11 on an AMD EPYC, half of them torch.export
