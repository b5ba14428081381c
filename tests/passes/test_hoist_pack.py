from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.capture.export import capture_any
from graphopt.compiler.compare import compare
from graphopt.compiler.manager import PassManager
from graphopt.compiler.remarks import Remarks
from graphopt.passes.default import packing, pipeline
from graphopt.passes.hoist_pack import PASS
from graphopt.passes.pack_tokens import PASS as PACK_TOKENS
from tests import _models as models
from tests._models import padding, randn
from tests.passes._harness import LIMITS, program, results, run

X, MASK = randn(2, 5, 8), padding((5, 3), 5)
BOTH = [PACK_TOKENS, PASS]


def zeroed(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.to(torch.bool).unsqueeze(2), x, 0.0)


def attention(x: torch.Tensor, mask: torch.Tensor | None, *options: Any) -> torch.Tensor:
    heads = x.unflatten(2, (2, 4))
    return torch.ops.graphopt.attention(heads, heads, heads, mask, *options).flatten(2)


def of_keys(mask: torch.Tensor) -> torch.Tensor:
    return mask.to(torch.bool).unsqueeze(1).unsqueeze(1)


def test_what_is_computed_for_each_token_is_computed_packed() -> None:
    def forward(m, x, mask):
        y = F.layer_norm(m.one(x).relu() + x, (8,))
        return torch.where(mask.unsqueeze(2), y, 0.0)

    ran = run(BOTH, program(forward, one=nn.Linear(8, 8)), X, MASK.bool())
    ran.becomes("""
        %0 = reshape(mask, [-1])
        %1 = nonzero(%0)
        %2 = squeeze(%1, 1)
        %3 = graphopt.pack_tokens(x, %2)
        %4 = linear(%3, one.weight, one.bias)
        %5 = relu(%4)
        %6 = add(%5, %3)
        %7 = layer_norm(%6, [8], None, None, 1e-05, False)
        %8 = graphopt.unpack_tokens(%7, mask)
        return %8
    """)


def layer(m, x, mask):
    """One layer of an encoder."""
    y = attention(m.qkv(x), of_keys(mask)) + x
    return zeroed(m.out(y.relu()) + y, mask)


def layers() -> dict[str, nn.Module]:
    return {"qkv": nn.Linear(8, 8), "out": nn.Linear(8, 8)}


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_attention_becomes_packed(dtype: torch.dtype) -> None:
    ran = run(BOTH, program(layer, **layers()), X, MASK.to(dtype))
    ran.counts(packed_attention=1, attention=0, pack_tokens=1, unpack_tokens=1)
    for other in (MASK.flip(1), torch.ones_like(MASK), torch.tensor([[0] * 5, [1, 0, 1, 0, 1]])):
        ran.agrees(randn(2, 5, 8, seed=3), other.to(dtype))


def test_causal_attention_keeps_its_order() -> None:
    def forward(m, x, mask):
        return zeroed(attention(x, of_keys(mask), True, 0.5), mask)

    ran = run(BOTH, program(forward), X, MASK).counts(packed_attention=1)
    ran.agrees(X, torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 1]]))


def test_a_table_of_positions_is_packed_along() -> None:
    def forward(m, x, mask):
        return zeroed((x + m.table[None]).relu(), mask)

    ran = run(BOTH, program(forward, table=randn(5, 8, seed=4)), X, MASK)
    ran.counts(pack_tokens=2, expand=1).agrees(X, MASK.flip(1))


def test_a_value_of_each_sequence_is_packed_along() -> None:
    def forward(m, x, mask, y):
        return zeroed((x * y[:, None]).relu(), mask)

    run(BOTH, program(forward), X, MASK, randn(2, 8, seed=4)).counts(pack_tokens=2).agrees(
        X, MASK, randn(2, 8)
    )


def test_heads_first_and_back() -> None:
    def forward(m, x, mask):
        heads = x.unflatten(2, (2, 4)).transpose(1, 2)
        return zeroed((heads * 2).exp().transpose(1, 2).flatten(2), mask)

    ran = run(BOTH, program(forward), X, MASK).counts(exp=1, pack_tokens=1)
    (pack,) = ran.graph.fx.find_nodes(op="call_function", target=torch.ops.graphopt.pack_tokens.default)
    assert pack.args[0].op == "placeholder"


def test_what_another_reads_stays_padded() -> None:
    def forward(m, x, mask):
        y = x.relu()
        return torch.where(mask.unsqueeze(2), y, 0.0), y.sum(1)

    run(BOTH, program(forward), X, MASK.bool()).refuses(
        "relu is also read by sum.*, which needs the padded positions"
    )


def test_what_mixes_tokens_stays_padded() -> None:
    def forward(m, x, mask):
        return torch.where(mask.unsqueeze(2), x.cumsum(1), 0.0)

    run(BOTH, program(forward), X, MASK.bool()).refuses(
        r"aten.cumsum \(cumsum\) is not known to keep tokens apart"
    )


FILL = (False, None, None, -1e4)
REFUSED: dict[str, Callable[..., torch.Tensor]] = {
    "it has no mask": lambda x, mask: attention(x, None),
    "its mask adds torch.float32": lambda x, mask: attention(x, of_keys(mask).to(x.dtype)),
    "padded positions score -10000": lambda x, mask: attention(x, of_keys(mask), *FILL),
    "does not cap scores": lambda x, mask: attention(x, of_keys(mask), False, None, 30.0),
    "its mask is not one of keys": lambda x, mask: attention(x, of_keys(mask) & of_keys(mask).mT),
    "its mask is made of other": lambda x, mask, other: attention(x, of_keys(other)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_attention_that_is_not_packed(reason: str) -> None:
    attend = REFUSED[reason]
    if "other" in reason:

        def forward(m, x, mask, other):
            return zeroed(attend(x, mask, other), mask)
    else:

        def forward(m, x, mask):
            return zeroed(attend(x, mask), mask)

    others = (MASK.flip(0),) if "other" in reason else ()
    ran = run(BOTH, program(forward), X, MASK, *others).counts(packed_attention=0)
    assert any(reason in row.reason for row in ran.remarks.of_kind("missed"))


def test_tokens_that_attend_to_others_stay_padded() -> None:
    def forward(m, x, mask, y):
        q, k = x.unflatten(2, (2, 4)), y.unflatten(2, (2, 4))
        return zeroed(torch.ops.graphopt.attention(q, k, k).flatten(2), mask)

    ran = run(BOTH, program(forward), X, MASK, randn(2, 7, 8)).counts(packed_attention=0)
    assert any("5 tokens attend to 7 others" in row.reason for row in ran.remarks.of_kind("missed"))


@pytest.mark.parametrize("family", ["minilm", "bert"])
def test_all_layers_of_an_encoder(family: str) -> None:
    """Of dynamic sizes; BERT's first output stays padded, so that nothing is gained there."""
    example = models.FAMILIES[family]()
    captured, inputs = capture_any(example.model, example.args, example.kwargs, dynamic=example.dynamic)
    rewritten = PassManager(pipeline(), Remarks(), LIMITS).run(captured.clone(), inputs).graph
    outcome = PassManager(packing(), Remarks(), LIMITS).run(rewritten, inputs)
    assert all(row.kept for row in outcome.rewrites)
    counts = outcome.graph.op_counts()
    assert counts.get("graphopt.packed_attention", 0) == (2 if family == "minilm" else 0)
    assert counts["aten.nonzero"] == 1
    found = compare(
        results(captured, inputs), results(outcome.graph, inputs), results(captured, inputs, float64=True), 64
    )
    assert found.ok, found.reason
