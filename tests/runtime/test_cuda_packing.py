"""Padding removal in CUDA graphs on a GPU: exact, one graph a bucket, and one wait a call."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

import graphopt
from graphopt.compiler.compare import compare
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.optimized_model import OptimizedModel
from tests._models import VOCABULARY, minilm, padding, randomised, tokens
from tests.test_padding import First, roberta

pytestmark = pytest.mark.gpu
BATCH, SEQ = 8, 32
RAGGED = padding((32, 5, 1, 17, 20, 9, 2, 30), SEQ)  # 116 tokens, in 128
MASKS = {
    "the example": RAGGED,
    "as many": RAGGED.flip(0),
    "few": padding((3,) * BATCH, SEQ),
    "holes": (torch.arange(BATCH * SEQ).view(BATCH, SEQ) % 2) | (torch.arange(SEQ) == 0),
    "an empty row": RAGGED * (torch.arange(BATCH) != 3)[:, None],
    "nothing": torch.zeros_like(RAGGED),
    "all but one": padding((32,) * (BATCH - 1) + (31,), SEQ),
    "full": torch.ones_like(RAGGED),
}
MODELS = {"all states": roberta, "their mean": lambda: minilm().model, "the first": lambda: First().eval()}


def call(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = 1 + tokens(*mask.shape, seed=2) % (VOCABULARY - 2)
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


def optimized(name: str, dtype: torch.dtype, **options: Any) -> tuple[torch.nn.Module, OptimizedModel]:
    """A model on the GPU, and itself in CUDA graphs on real tokens only."""
    model = MODELS[name]().cuda().to(dtype)
    opt = graphopt.optimize(
        model, (), call(RAGGED), executors=("cuda",), require_cuda_graph=True, padding="remove", **options
    )
    return model, opt


def assert_exact(model: torch.nn.Module, opt: OptimizedModel, mask: torch.Tensor) -> None:
    kwargs = call(mask)
    with torch.no_grad():
        before = model(**kwargs)
        exact = copy.deepcopy(model).double()(**kwargs)
    after = opt(**kwargs)
    for name, value in after.items():
        if isinstance(value, torch.Tensor):
            sides = [before[name], value, exact[name]]
            if value.dim() == 3:
                sides = [side.masked_fill((mask == 0).cuda()[..., None], 0) for side in sides]
            verdict = compare(*sides, MODEL_FLOOR_ULPS)
            assert verdict.ok, f"{name}: {verdict.reason}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_real_tokens_are_exact_in_graphs_of_buckets(name: str, dtype: torch.dtype) -> None:
    model, opt = optimized(name, dtype, effort="fast")
    assert opt.plan.padded is not None
    (step,) = opt.plan.steps
    assert step.executor == "cuda"
    for _ in range(3):
        for mask in MASKS.values():
            assert_exact(model, opt, mask)
    row = step.program.describe()
    assert row["graphed_nodes"] == len(step.region.graph.calls)
    assert 64 in row["token_buckets"]
    assert 128 in row["token_buckets"]
    assert row["cuda_graphs"] == len(row["token_buckets"])
    assert {kernel["op"] for kernel in row["kernels"]} >= {"aten.nonzero_static", "graphopt.pack_tokens"}


def test_the_measurement_may_choose_it() -> None:
    model, opt = optimized("their mean", torch.float16)
    names = [row.name for row in opt.report.candidates]
    assert names == ["cuda, padding removed", "cuda"]
    assert all(row.ms is not None for row in opt.report.candidates)
    graphs = opt.report.cuda_graphs
    assert graphs is not None
    assert graphs["coverage"] == 1.0
    for mask in MASKS.values():
        assert_exact(model, opt, mask)


def test_a_call_waits_for_the_gpu_once() -> None:
    _, opt = optimized("the first", torch.float16, effort="fast")
    kwargs = call(RAGGED)
    for _ in range(3):
        opt(**kwargs)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            opt(**kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [row for row in said if "synchroniz" in str(row.message)]
    assert len(waits) == 1, [str(row.message) for row in waits]


def test_calls_of_other_buckets_do_not_change_what_older_ones_returned() -> None:
    _, opt = optimized("all states", torch.float16, effort="fast")
    calls = [call(mask) for mask in MASKS.values() for _ in range(2)]
    results = [opt(**kwargs).last_hidden_state for kwargs in calls]
    for kwargs, result in zip(calls, results, strict=True):
        assert torch.equal(opt(**kwargs).last_hidden_state, result)


def test_a_large_batch_is_right_in_every_bucket() -> None:
    """Many more programs than a GPU runs at once, and spare rows that reach over several tiles."""
    from transformers import BertConfig, BertModel

    sizes = {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
    model = randomised(BertModel(BertConfig(vocab_size=VOCABULARY, **sizes))).cuda().half()
    draw = torch.Generator().manual_seed(3)
    masks = [padding(tuple(torch.randint(16, 513, (32,), generator=draw).tolist()), 512) for _ in range(4)]
    opt = graphopt.optimize(model, (), call(masks[0]), executors=("cuda",), padding="remove", effort="fast")
    for mask in masks * 2:
        assert_exact(model, opt, mask)
