"""quantize(dequantize(q)) -> q; fake_quantize(fake_quantize(x)) -> fake_quantize(x).

With the same parameters only. Codes of up to 16 bits are whole numbers that float32 tells apart, so that they
come back from the values that they stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._quantized import Coding, calls, coding, is_call


def pattern(graph: Graph) -> Iterator[Match]:
    """Every value that is quantized a second time."""
    for verb, before in (("quantize", "dequantize"), ("fake_quantize", "fake_quantize")):
        for node in calls(graph, verb):
            inner: Any = node.args[0]
            if is_call(inner, before):
                kept = inner if verb == "fake_quantize" else inner.args[0]
                yield Match(graph, node, (inner, node), {"inner": inner, "kept": kept, "verb": verb})


def check(match: Match) -> str | None:
    """The same constant parameters, and codes that the values in between tell apart and do not exceed."""
    first, second = (coding(match.graph, node) for node in match.nodes)
    if first is None or second is None:
        return "a scale or a zero point is not a constant"
    differs = first.difference(second)
    if differs is not None:
        return f"the {differs} is another one"
    between = match.val("inner").dtype
    if between not in (torch.float32, torch.float64):
        return f"the values in between are {between}, which rounds"
    if not second.is_sound:
        return "the codes have more than 16 bits, or the scale is extreme"
    if match["verb"] == "fake_quantize":
        return None
    if match.val("kept").dtype != match.root.meta["val"].dtype:
        return f"the codes become {match.root.meta['val'].dtype}, and were {match.val('kept').dtype}"
    within = _are_within(match.graph, match["kept"], second)
    return None if within else f"codes outside of {second.low} to {second.high} would be cut off"


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """The codes are there already."""
    rewriter.replace(match.root, match["kept"])


def _are_within(graph: Graph, codes: fx.Node, limits: Coding) -> bool:
    """Whether codes keep to their limits: by their type, their values, or the call that made them."""
    whole = torch.iinfo(codes.meta["val"].dtype)
    if limits.low <= whole.min and whole.max <= limits.high:
        return True
    constant = graph.constant(codes)
    if constant is not None:
        return bool(((constant >= limits.low) & (constant <= limits.high)).all())
    made = coding(graph, codes) if is_call(codes, "quantize") else None
    return made is not None and limits.low <= made.low and made.high <= limits.high


PASS = register(Pass("merge_quantizations", "fold", pattern, rewrite, check))
