from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from graphopt.kernels.attention import OP as ATTENTION
from graphopt.passes import (
    fold_constants,
    fold_index,
    fuse_attention,
    fuse_softmax_attention,
    remove_noops,
)
from graphopt.passes.fold_attention_mask import PASS
from tests._models import padding, randn
from tests.passes._harness import Ran, program, run

S, T = 5, 7  # queries and keys
Q, K = randn(2, 3, S, 8), randn(2, 3, S, 8, seed=1)
PADDING = padding((S, 3), S)
BEFORE = [fuse_attention.PASS, remove_noops.PASS]
FOLDED = [*BEFORE, fold_constants.PASS]
DYNAMIC = {"q": {0: "batch", 2: "seq"}, "k": {0: "batch", 2: "seq"}}


def attend_each(masks: dict[str, Callable[[], torch.Tensor]], passes=BEFORE) -> Ran:
    """One attention a mask; several programs in one, since capturing is what takes the time."""

    def forward(m, q, k):
        return [F.scaled_dot_product_attention(q, k, k, mask()) for mask in masks.values()]

    return run([*passes, PASS], program(forward), Q, K)


def masks_and_causal(ran: Ran) -> list[tuple[tuple[int, ...] | None, bool]]:
    """The shape of the mask, and is_causal, of every attention."""
    found = [node.args[3:5] for node in ran.graph.calls if node.target is ATTENTION.overload]
    return [(None if mask is None else tuple(mask.meta["val"].shape), causal) for mask, causal in found]


def ranges(size: int = S) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(size)[:, None], torch.arange(size)[None]


def causal(size: int = S) -> torch.Tensor:
    query, key = ranges(size)
    return key <= query


def true(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


NOTHING = {
    "ones": lambda: true(S, S),
    "expanded": lambda: torch.arange(S).new_ones((), dtype=torch.bool).expand(2, 1, S, S),
    "zeros added": lambda: torch.zeros(S, S),
    "key positions that exist": lambda: (ranges()[1] >= 0).expand(S, S),
    "zeros that are computed": lambda: (1.0 - torch.ones(S, S)) * torch.finfo(torch.float32).min,
    "filled nowhere": lambda: torch.zeros(S, S).masked_fill(~true(S, S), -torch.inf),
    "not false": lambda: ~torch.zeros(S, S, dtype=torch.bool) & true(S, S),
    "a chain of ands": lambda: (ranges()[1] >= 0) & (ranges()[0] > -1) & true(S, S),
}
CAUSAL = {
    "key <= query": causal,
    "query >= key": lambda: ranges()[0] >= ranges()[1],
    "key < query + 1": lambda: ranges()[1] < ranges()[0] + 1,
    "query > key - 1": lambda: ranges()[0] > ranges()[1] - 1,
    "both shifted": lambda: ranges()[1] + 3 <= ranges()[0] + 3,
    "expanded": lambda: causal().expand(2, 1, S, S),
    "and all": lambda: causal() & true(S, S),
    "tril": lambda: true(S, S).tril(),
    "tril cast": lambda: torch.tril(torch.ones(S, S)).bool(),
    "triu of -inf": lambda: torch.triu(torch.full((S, S), -torch.inf), 1),
    "triu of the lowest": lambda: torch.triu(torch.full((S, S), torch.finfo(torch.float32).min), 1),
}
OTHERS = {
    "shifted by one": lambda: ranges()[1] <= ranges()[0] + 1,
    "shifted the other way": lambda: ranges()[1] < ranges()[0] + 2,
    "doubled positions": lambda: ranges()[1] <= torch.add(ranges()[0], ranges()[0]),
    "a shift that counts twice": lambda: ranges()[1] + 1 <= torch.add(ranges()[0], 1, alpha=2),
    "upper": lambda: ranges()[1] >= ranges()[0],
    "tril with one more": lambda: true(S, S).tril(1),
    "tril with one less": lambda: true(S, S).tril(-1) | torch.eye(S, dtype=torch.bool)[:, :1],
    "tril of numbers": lambda: torch.ones(S, S).tril(),
    "triu as a mask": lambda: torch.triu(torch.full((S, S), -torch.inf), 1).bool(),
    "triu of small numbers": lambda: torch.triu(torch.full((S, S), -1.0), 1),
    "all but one": lambda: true(S, S) & (ranges()[1] * ranges()[0] != 12),
    "numbers as truth": lambda: torch.logical_and(torch.zeros(S, S) + ranges()[1], true(S, S)),
    "one row for all queries": lambda: ranges()[1] <= torch.arange(1)[:, None],
    "one row, repeated": lambda: ranges()[1].expand(S, S) <= torch.arange(1)[:, None],
    "one column, repeated": lambda: torch.arange(1)[None] <= (ranges()[0] - 1).expand(S, S),
}


@pytest.mark.parametrize("passes", [BEFORE, FOLDED], ids=["computed", "folded"])
def test_a_mask_that_is_true_everywhere(passes) -> None:
    assert masks_and_causal(attend_each(NOTHING, passes)) == [(None, False)] * len(NOTHING)


@pytest.mark.parametrize("passes", [BEFORE, FOLDED], ids=["computed", "folded"])
def test_a_causal_mask(passes) -> None:
    assert masks_and_causal(attend_each(CAUSAL, passes)) == [(None, True)] * len(CAUSAL)


def test_masks_that_only_look_so_are_refused() -> None:
    ran = attend_each(OTHERS).refuses("the mask depends on the inputs: it is computed, not recognised")
    assert len(ran.remarks.of_kind("missed")) == len(OTHERS)
    others = {name: mask for name, mask in OTHERS.items() if name != "one row, repeated"}  # held once
    ran = attend_each(others, FOLDED)
    ran.refuses("the mask is a constant that is neither true everywhere nor causal")
    assert len(ran.remarks.of_kind("missed")) == len(others)


def test_what_becomes_of_the_graph() -> None:
    def forward(m, q, k):
        return F.scaled_dot_product_attention(q, k, k, causal())

    run([*BEFORE, PASS], program(forward), Q, K).becomes("""
        %0 = transpose(q, 1, 2)
        %1 = transpose(k, 1, 2)
        %2 = transpose(k, 1, 2)
        %3 = graphopt.attention(%0, %1, %2, None, True, None)
        %4 = transpose(%3, 1, 2)
        return %4
    """)


def test_fewer_queries_than_keys() -> None:
    def forward(m, q, k):
        return F.scaled_dot_product_attention(q, k, k, true(S, T).tril())

    ran = run([*BEFORE, PASS], program(forward), Q, randn(2, 3, T, 8, seed=1))
    assert masks_and_causal(ran) == [(None, True)]


def test_the_last_queries_of_a_longer_sequence_are_refused() -> None:
    def forward(m, q, k):
        mask = torch.arange(T)[None] <= torch.arange(T - S, T)[:, None]
        return F.scaled_dot_product_attention(q, k, k, mask)

    ran = run([*FOLDED, PASS], program(forward), Q, randn(2, 3, T, 8, seed=1))
    ran.refuses("neither true everywhere nor causal")


def test_padding_and_causal() -> None:
    def forward(m, q, k, pad):
        keys = pad.bool()[:, None, None]
        masks = causal() & keys, keys.expand(2, 1, S, S) & causal(), keys.expand(2, 1, S, S)
        return [F.scaled_dot_product_attention(q, k, k, mask) for mask in masks]

    ran = run([*BEFORE, PASS], program(forward), Q, K, PADDING)
    narrow = (2, 1, 1, S)
    assert masks_and_causal(ran) == [(narrow, True), (narrow, True), (narrow, False)]


def test_a_causal_band_is_causal_and_a_band() -> None:
    def forward(m, q, k):
        return F.scaled_dot_product_attention(q, k, k, causal() & (ranges()[1] > ranges()[0] - 2))

    assert masks_and_causal(run([*BEFORE, PASS], program(forward), Q, K)) == [((S, S), True)]


def test_bits_are_no_mask() -> None:
    def forward(m, q, k, pad):
        odd = (pad * 2)[:, None, None] & torch.ones(S, S, dtype=torch.long)
        return F.scaled_dot_product_attention(q, k, k, odd.bool())

    ran = run([*BEFORE, PASS], program(forward), Q, K, PADDING + 1)
    ran.refuses("the mask depends on the inputs")


def test_padding_and_numbers_as_truth_is_refused() -> None:
    def forward(m, q, k, pad):
        return F.scaled_dot_product_attention(q, k, k, torch.logical_and(pad[:, None, None], causal()))

    run([*BEFORE, PASS], program(forward), Q, K, PADDING).refuses("the mask depends on the inputs")


def test_is_causal_without_a_mask_stays() -> None:
    def forward(m, q, k):
        return F.scaled_dot_product_attention(q, k, k, is_causal=True)

    run([*BEFORE, PASS], program(forward), Q, K).stays()


def test_one_mask_for_two_layers_and_the_caller() -> None:
    def forward(m, q, k, pad):
        mask = causal() & pad.bool()[:, None, None]
        once = F.scaled_dot_product_attention(q, k, k, mask)
        return F.scaled_dot_product_attention(once, k, k, mask), mask

    ran = run([*BEFORE, PASS], program(forward), Q, K, PADDING)
    assert masks_and_causal(ran) == [((2, 1, 1, S), True)] * 2


def test_dynamic_sizes() -> None:
    def forward(m, q, k):
        batch, _, seq, _ = q.shape
        masks = (
            causal(seq),
            causal(seq).expand(batch, 1, seq, seq),
            true(seq, seq).tril(),
            torch.ones(seq, seq).tril().bool(),
            torch.full((seq, seq), -torch.inf).triu(1),
        )
        return [F.scaled_dot_product_attention(q, k, k, mask) for mask in masks]

    ran = run([*BEFORE, PASS], program(forward), Q, K, dynamic=DYNAMIC)
    assert masks_and_causal(ran) == [(None, True)] * 5
    ran.agrees(randn(3, 3, 2, 8), randn(3, 3, 2, 8, seed=1)).agrees(
        randn(1, 3, 9, 8), randn(1, 3, 9, 8, seed=1)
    )


def test_a_bias_that_is_chosen_everywhere() -> None:
    """The relative positions of T5, with a mask that forbids nothing."""

    def forward(m, q, k):
        batch, _, seq, _ = q.shape
        everywhere = (torch.arange(seq)[None, None, :, None] >= 0).expand(batch, 1, seq, seq)
        bias = m.table[ranges(seq)[0] + ranges(seq)[1]].permute(2, 0, 1)[None]
        masks = (
            torch.where(everywhere, bias, -torch.inf),
            torch.where(everywhere, torch.zeros(seq, seq), -1.0),
        )
        return [F.scaled_dot_product_attention(q, k, k, mask) for mask in masks]

    ran = run([*BEFORE, PASS], program(forward, table=randn(32, 3)), Q, K, dynamic=DYNAMIC)
    (bias, _), nothing = masks_and_causal(ran)
    assert bias is not None
    assert bias[:2] == (1, 3)
    assert nothing == (None, False)
    ran.agrees(randn(3, 3, 2, 8), randn(3, 3, 2, 8, seed=1)).agrees(
        randn(1, 3, 9, 8), randn(1, 3, 9, 8, seed=1)
    )


def test_dynamic_padding_as_transformers_reads_it() -> None:
    def forward(m, q, k, pad):
        batch, seq = pad.shape
        query, key = torch.arange(seq)[None, None, :, None], torch.arange(seq)[None, None, None]
        read = pad.bool()[torch.arange(batch)[:, None, None, None], key]
        mask = ((key <= query) & read).expand(batch, -1, seq, seq)
        return F.scaled_dot_product_attention(q, k, k, mask)

    dynamic = {**DYNAMIC, "pad": {0: "batch", 1: "seq"}}
    passes = [remove_noops.PASS, fold_index.PASS, *BEFORE, PASS]
    ran = run(passes, program(forward), Q, K, PADDING, dynamic=dynamic)
    ((mask, is_causal),) = masks_and_causal(ran)
    assert is_causal
    assert mask is not None and mask[1:3] == (1, 1)
    ran.agrees(randn(3, 3, 4, 8), randn(3, 3, 4, 8, seed=1), padding((4, 1, 2), 4))
    ran.agrees(randn(1, 3, 9, 8), randn(1, 3, 9, 8, seed=1), padding((7,), 9))


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_rows_of_some_queries_say_of_keys_what_all_rows_say(dynamic: bool) -> None:
    def forward(m, q, k, pad):
        seq = pad.shape[1]
        mask = (torch.arange(seq)[:, None] >= 0) & pad.bool()[:, None, None, :]
        return F.scaled_dot_product_attention(q[:, :, :2], k, k, mask[:, :, :2])

    sizes = {**DYNAMIC, "pad": {0: "batch", 1: "seq"}} if dynamic else None
    ran = run([*BEFORE, PASS], program(forward), Q, K, PADDING, dynamic=sizes)
    ((mask, is_causal),) = masks_and_causal(ran)
    assert mask is not None and mask[1:3] == (1, 1)
    assert not is_causal
    ran.agrees(randn(2, 3, S, 8, seed=3), K, PADDING.flip(1))


def test_the_rows_of_some_queries_of_a_causal_mask_are_no_causal_mask() -> None:
    def forward(m, q, k):
        return F.scaled_dot_product_attention(q[:, :, 1:3], k, k, causal()[1:3])

    ((mask, is_causal),) = masks_and_causal(run([*BEFORE, PASS], program(forward), Q, K))
    assert mask == (2, S)
    assert not is_causal


def test_one_row_for_all_queries_of_any_number_is_refused() -> None:
    def forward(m, q, k):
        return F.scaled_dot_product_attention(
            q, k, k, torch.arange(q.shape[2])[None] <= torch.arange(1)[:, None]
        )

    ran = run([*BEFORE, PASS], program(forward), Q, K, dynamic=DYNAMIC)
    ran.refuses("the mask depends on the inputs").agrees(randn(2, 3, 3, 8), randn(2, 3, 3, 8, seed=1))


LOWEST = torch.finfo(torch.float32).min


def test_an_added_choice_is_a_mask_with_a_fill() -> None:
    def forward(m, q, k, pad):
        keys = pad.bool()[:, None, None]
        masks = (
            torch.where(keys, 0.0, LOWEST),
            torch.where(causal() & keys, torch.zeros(()), -torch.inf).expand(2, 1, S, S),
            torch.where(causal(), 0.0, LOWEST),
            torch.where(keys, 0.0, -1e4),
        )
        return [F.scaled_dot_product_attention(q, k, k, mask) for mask in masks]

    ran = run([*BEFORE, PASS], program(forward), Q, K, PADDING)
    narrow = (2, 1, 1, S)
    assert masks_and_causal(ran) == [(narrow, False), (narrow, True), (None, True), (narrow, False)]
    found = [node for node in ran.graph.calls if node.target is ATTENTION.overload]
    assert [node.kwargs.get("fill") for node in found] == [LOWEST, None, None, None]
    assert [node.args[3].meta["val"].dtype for node in found if node.args[3]] == [
        torch.bool,
        torch.bool,
        torch.float32,
    ]


def test_a_fill_that_every_row_escapes_is_dropped() -> None:
    def forward(m, q, k):
        band = causal() & (ranges()[1] > ranges()[0] - 2)
        return torch.softmax((q @ k.mT).masked_fill(~band, -torch.inf), -1) @ k

    ran = run([fuse_softmax_attention.PASS, fold_constants.PASS, PASS], program(forward), Q, K)
    (found,) = (node for node in ran.graph.calls if node.target is ATTENTION.overload)
    assert "fill" not in found.kwargs


def test_what_is_added_beside_a_fill_is_refused() -> None:
    def forward(m, q, k, pad):
        scores = (q @ k.mT + ranges()[0]).masked_fill(pad[:, None, None] == 0, -1e4)
        return torch.softmax(scores, -1) @ k

    ran = run([fuse_softmax_attention.PASS, PASS], program(forward), Q, K, PADDING)
    ran.refuses("the mask depends on the inputs")


def test_an_attention_that_torch_computes() -> None:
    """Where the heads stay in front, a mask goes all the same."""

    def forward(m, q, k):
        ones = torch.ones(S, S)
        masks = true(S, S), (1.0 - ones) * -1e30, torch.zeros(2, 1, 1, S), causal(), true(S, S).tril()
        return [F.scaled_dot_product_attention(q, k, k, mask, scale=0.3) for mask in masks]

    ran = run(PASS, program(forward), Q, K)
    found = [node for node in ran.graph.calls if "scaled_dot_product" in str(node.target)]
    assert [(n.args[3], n.kwargs["is_causal"]) for n in found] == [(None, False)] * 3 + [(None, True)] * 2


def test_a_mask_beside_causality_is_refused_where_torch_takes_one_of_them() -> None:
    def forward(m, q, k, pad):
        return F.scaled_dot_product_attention(q, k, k, causal() & pad.bool()[:, None, None])

    run(PASS, program(forward), Q, K, PADDING).refuses("takes either a mask or is_causal")


def test_an_attention_that_torch_computes_for_any_size() -> None:
    def forward(m, q, k):
        mask = torch.zeros(q.shape[0], 1, 1, k.shape[2])
        return F.scaled_dot_product_attention(q, k, k, mask)

    ran = run(PASS, program(forward), Q, K, dynamic=DYNAMIC)
    ran.agrees(randn(3, 3, 2, 8), randn(3, 3, 2, 8, seed=1))
