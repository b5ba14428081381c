"""Masks of every broadcast shape, with empty rows, against the formula written out."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt.kernels  # noqa: F401
from graphopt.kernels import attention
from graphopt.kernels._onnx import OPSET

HEADS, FEATURES = 2, 4
PATTERNS = list(itertools.product([False, True], repeat=4))  # whether B, H, S, T are there or 1
DTYPES = torch.bool, torch.float32


def written_out(
    query_BSHD: torch.Tensor,
    key_BTHD: torch.Tensor,
    value_BTHD: torch.Tensor,
    mask: torch.Tensor,
    is_causal: bool,
) -> torch.Tensor:
    """Attention in float64, one row at a time, with no softmax of torch's."""
    query_BSHD, key_BTHD, value_BTHD = query_BSHD.double(), key_BTHD.double(), value_BTHD.double()
    out_BSHD = torch.zeros_like(query_BSHD)
    (B, S, H, D), T = query_BSHD.shape, key_BTHD.shape[1]
    mask_BHST = mask.broadcast_to(B, H, S, T)
    for b, h, s in itertools.product(range(B), range(H), range(S)):
        score_T = key_BTHD[b, :, h] @ query_BSHD[b, s, h] / math.sqrt(D)
        row_T = mask_BHST[b, h, s]
        if row_T.dtype == torch.bool:
            seen = row_T.clone()
        else:
            score_T, seen = score_T + row_T, row_T > -math.inf
        if is_causal:
            seen[s + 1 :] = False
        if seen.any():
            weight = (score_T[seen] - score_T[seen].max()).exp()
            out_BSHD[b, s, h] = weight @ value_BTHD[b, seen, h] / weight.sum()
    return out_BSHD


def draw_inputs(batch: int, s: int, t: int, kept: float, seed: int) -> list[torch.Tensor]:
    """Query, key, value, and a mask of every pattern and dtype, some of whose rows are empty."""
    generator = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(batch, length, HEADS, FEATURES, generator=generator) for length in (s, t, t)]
    masks = []
    for dtype, pattern in itertools.product(DTYPES, PATTERNS):
        shape = [size if there else 1 for size, there in zip((batch, HEADS, s, t), pattern, strict=True)]
        seen = torch.rand(shape, generator=generator) < kept
        bias = torch.randn(shape, generator=generator).masked_fill(~seen, -math.inf)
        masks.append(seen if dtype == torch.bool else bias)
    return qkv + masks


class Attentions(torch.nn.Module):
    """The op under every mask, without and with causality."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *masks: torch.Tensor
    ) -> list:
        return [
            attention.OP.overload(query, key, value, mask, is_causal)
            for mask in masks
            for is_causal in (False, True)
        ]


def to_onnx(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], dims: tuple) -> onnx.ModelProto:
    program = torch.export.export(model, inputs, dynamic_shapes=dims, strict=False)
    table = {attention.OP.overload: attention.OP.onnx}
    exported = torch.onnx.export(
        program, dynamo=True, custom_translation_table=table, opset_version=OPSET, verbose=False
    )
    return exported.model_proto


@functools.cache
def session() -> onnxruntime.InferenceSession:
    inputs = draw_inputs(2, 3, 5, 0.6, seed=0)
    auto = torch.export.Dim.AUTO
    dims = [{0: auto, 1: auto}] * 3 + [dict.fromkeys(range(4), auto)] * (len(inputs) - 3)
    model = to_onnx(Attentions(), tuple(inputs), (*dims[:3], tuple(dims[3:])))
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 2),
    s=st.integers(1, 4),
    t=st.integers(1, 5),
    kept=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_every_mask_shape_matches_the_formula(batch: int, s: int, t: int, kept: float, seed: int) -> None:
    inputs = draw_inputs(batch, s, t, kept, seed)
    feed = {x.name: value.numpy() for x, value in zip(session().get_inputs(), inputs, strict=True)}
    lowered = session().run(None, feed)
    query, key, value, *masks = inputs
    for i, (mask, is_causal) in enumerate(itertools.product(masks, (False, True))):
        truth = written_out(query, key, value, mask, is_causal)
        for actual in (attention.OP(query, key, value, mask, is_causal), torch.from_numpy(lowered[i])):
            torch.testing.assert_close(actual.double(), truth, rtol=0, atol=1e-5)


class TwoLayers(torch.nn.Module):
    """Self-attention twice under one key-padding mask."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = torch.sin(attention.OP.overload(x, x, x, mask))
        return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_share_the_work_on_the_mask(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.randn(2, 5, HEADS, FEATURES)
    mask = torch.ones(2, 1, 1, 5).to(dtype)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2)
    model = to_onnx(TwoLayers(), (x, mask), ({0: batch, 1: length}, {0: batch, 3: length}))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert counts["Attention"] == 2
    assert counts["Expand"] == 1
    assert counts["Where"] == (dtype == torch.float32)


class Filled(torch.nn.Module):
    """The op whose forbidden scores are -inf, with causality and without."""

    def forward(self, x: torch.Tensor, *masks: torch.Tensor) -> list:
        return [
            attention.OP.overload(x, x, x, mask, is_causal, fill=-math.inf)
            for mask in masks
            for is_causal in (False, True)
        ]


def test_rows_of_nothing_but_minus_infinity_are_not_a_number() -> None:
    x, seen = torch.randn(2, 5, HEADS, FEATURES), torch.rand(2, 1, 5, 5) > 0.4
    seen[0, :, 1], seen[1, :, :, 0] = False, False
    masks = seen, torch.zeros(2, 1, 5, 5).masked_fill(~seen, -math.inf)
    model = to_onnx(Filled(), (x, *masks), (None, (None, None)))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = zip(session.get_inputs(), (x, *masks), strict=True)
    lowered = session.run(None, {given.name: value.numpy() for given, value in feed})
    for i, (mask, is_causal) in enumerate(itertools.product(masks, (False, True))):
        allowed = seen & torch.ones(5, 5, dtype=torch.bool).tril() if is_causal else seen
        truth = written_out(x, x, x, mask, is_causal)
        truth = truth.masked_fill(~allowed.any(-1).transpose(1, 2)[..., None], math.nan)
        for actual in (attention.OP(x, x, x, mask, is_causal, fill=-math.inf), torch.from_numpy(lowered[i])):
            torch.testing.assert_close(actual.double(), truth, rtol=0, atol=1e-5, equal_nan=True)
