"""Calls as CUDA graphs, and how long a replay takes: the launches of short kernels would hide it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt.kernels._driver import own_stream


def captured(
    calls: Sequence[Callable[[], Any]], stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """One CUDA graph of calls made one after the other.

    Args:
        calls: each launches on the current stream and waits for nothing. What a first call compiles or
            allocates must not be captured: call them before.
        stream: to capture on, one of ``own_stream``; a new one by default.

    Returns:
        The graph, and the results of the calls: a replay writes into the same memory. Where they are kept, no
        two results share memory.
    """
    graph = torch.cuda.CUDAGraph()
    stream = stream or own_stream(torch.device("cuda", torch.cuda.current_device()))
    with torch.cuda.graph(graph, stream=stream):
        results = [call() for call in calls]
    return graph, results


def replayed(graphs: Sequence[torch.cuda.CUDAGraph], rounds: int) -> list[float]:
    """Median microseconds of a replay of each graph, in rounds of A B C, C B A, so that drift hits all alike.

    Args:
        graphs: the graphs.
        rounds: each replays every graph twice.
    """
    samples: list[list[float]] = [[] for _ in graphs]
    places = [*range(len(graphs)), *reversed(range(len(graphs)))]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(rounds):
        for place in places:
            start.record()
            graphs[place].replay()
            end.record()
            end.synchronize()
            samples[place].append(1e3 * start.elapsed_time(end))
    return [statistics.median(sample) for sample in samples]
