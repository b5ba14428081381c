"""How long ``optimize`` takes, stage by stage, as a model gets deeper: Llamas of 12 to 96 layers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Column, Table

import graphopt
from graphopt.bench.case import context

IDS = torch.arange(8)[None]
CASES = {f"llama-{layers}": layers for layers in (12, 24, 36, 48, 96)}  # 36 layers are about 2,000 nodes


def llama(layers: int) -> torch.nn.Module:
    """A Llama whose layers are many and small: what takes time is the graph, not its tensors."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        vocab_size=100,
        use_cache=False,
    )
    return LlamaModel(config).eval()


def measure(case: str, layers: int, threads: int) -> dict[str, Any]:
    """Optimize one Llama with ``effort="fast"``: nothing is timed but ``optimize`` itself.

    What is done once a process, such as reading the exporter's translations, is done before.

    Returns:
        A JSON-ready row: seconds by stage and in all, of the process's CPU time in all, and of the passes
        with their verification for each layer; nodes before and after.
    """
    torch.set_num_threads(threads)
    graphopt.optimize(llama(1), (), {"input_ids": IDS}, effort="fast")
    model = llama(layers)
    start, cpu_start = time.perf_counter(), time.process_time()
    optimized = graphopt.optimize(model, (), {"input_ids": IDS}, effort="fast")
    took, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    report = optimized.report
    return {
        "case": case,
        "layers": layers,
        "nodes": sum(report.ops_before.values()),
        "nodes_after": sum(report.ops_after.values()),
        "seconds": {**report.seconds, "all": round(took, 3)},
        "cpu_seconds": round(cpu, 3),
        "rewrite_and_verify_a_layer": round(
            (report.seconds["rewrite"] + report.seconds["verify"]) / layers, 5
        ),
        "chosen": report.chosen.name,
        **context(torch.device("cpu")),
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a table: seconds by stage, and milliseconds of passes and verification a layer."""
    stages = list(rows[0]["seconds"]) if rows else []
    made = Table(
        Column("case", no_wrap=True),
        "nodes",
        *stages,
        "CPU",
        "ms a layer",
        title="seconds; milliseconds of passes with verification a layer",
    )
    for row in rows:
        seconds = [f"{row['seconds'][stage]:.2f}" for stage in stages]
        layer = f"{1e3 * row['rewrite_and_verify_a_layer']:.1f}"
        made.add_row(row["case"], str(row["nodes"]), *seconds, f"{row['cpu_seconds']:.2f}", layer)
    return made
