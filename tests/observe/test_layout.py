from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict

import pytest

from graphopt.observe.layout import HEIGHT, Layout, layered


def a_transformer(layers: int) -> dict[str, list[str]]:
    """A mask that every layer reads, a residual stream, three projections and attention."""
    reads: dict[str, list[str]] = {"ids": [], "mask": [], "embed": ["ids"]}
    stream = "embed"
    for layer in range(layers):
        heads = [f"{name}{layer}" for name in "qkv"]
        reads |= {head: [stream] for head in heads}
        reads[f"attention{layer}"] = [*heads, "mask"]
        reads[f"add{layer}"] = [f"attention{layer}", stream]
        reads[f"up{layer}"], reads[f"down{layer}"] = [f"add{layer}"], [f"up{layer}"]
        stream = f"out{layer}"
        reads[stream] = [f"down{layer}", f"add{layer}"]
    return reads


def a_random_graph(count: int, seed: int) -> dict[str, list[str]]:
    draw = random.Random(seed)
    names = [f"n{index}" for index in range(count)]
    return {
        name: draw.sample(names[:index], min(index, draw.randint(0, 3))) for index, name in enumerate(names)
    }


def faults(reads: dict[str, list[str]], widths: dict[str, float], layout: Layout) -> list[str]:
    found = [f"{name} has no place" for name in reads if name not in layout.places]
    rows: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for name, (x, y) in layout.places.items():
        rows[y].append((x - widths[name] / 2, x + widths[name] / 2))
        if not (0 <= x - widths[name] / 2 <= x + widths[name] / 2 <= layout.width):
            found.append(f"{name} is outside")
        if y + HEIGHT > layout.height:
            found.append(f"{name} is below the picture")
    for spans in rows.values():
        found += [f"{a} overlaps {b}" for a, b in itertools.pairwise(sorted(spans)) if a[1] > b[0]]
    for edge in layout.edges:
        ys = [y for _, y in edge.points]
        if ys != sorted(ys) or edge.points[-1] != layout.places[edge.target]:
            found.append(f"{edge.source} -> {edge.target} does not run down")
    drawn = sorted((edge.source, edge.target) for edge in layout.edges)
    if drawn != sorted((s, t) for t, sources in reads.items() for s in set(sources)):
        found.append("edges are missing, or there are too many")
    return found


@pytest.mark.parametrize("seed", range(6))
def test_nodes_do_not_overlap_and_edges_run_down(seed: int) -> None:
    reads = a_random_graph(60, seed)
    widths = {name: random.Random(name).uniform(40, 200) for name in reads}
    assert faults(reads, widths, layered(reads, widths)) == []


def test_two_thousand_nodes_take_seconds_and_stay_slim() -> None:
    reads = a_transformer(250)
    assert len(reads) > 2000
    widths = dict.fromkeys(reads, 100.0)
    start = time.process_time()
    layout = layered(reads, widths)
    assert time.process_time() - start < 10
    assert faults(reads, widths, layout) == []
    assert layout.width < 1500  # the blocks stand below each other, not each further to the right


def test_every_pair_of_layers_connected_is_not_quadratic() -> None:
    """1,500 nodes that all read one early value and one late: long ways are not cut into bends."""
    names = [f"n{index}" for index in range(1500)]
    reads = {name: [names[max(0, i - 1)], names[i // 2]] if i else [] for i, name in enumerate(names)}
    start = time.process_time()
    layout = layered(reads, dict.fromkeys(names, 50.0))
    assert time.process_time() - start < 30
    assert set(layout.places) == set(names)


def test_a_chain_is_a_straight_line() -> None:
    reads = {"a": [], "b": ["a"], "c": ["b"]}
    layout = layered(reads, dict.fromkeys(reads, 50.0))
    assert len({x for x, _ in layout.places.values()}) == 1


def test_a_source_stands_next_to_its_reader() -> None:
    reads = {"a": [], "b": ["a"], "c": ["b"], "late": [], "d": ["c", "late"]}
    places = layered(reads, dict.fromkeys(reads, 50.0)).places
    assert places["late"][1] == places["c"][1]


def test_nothing_and_names_that_are_no_nodes() -> None:
    assert layered({}, {}).places == {}
    assert layered({"a": ["weight"]}, {"a": 50.0}).edges == []
