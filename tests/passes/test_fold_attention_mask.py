from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphopt.passes import fold_constants, fold_index, fuse_attention, remove_noops
from graphopt.passes.fold_attention_mask import PASS
from tests._models import padding, randn
from tests.passes._harness import Ran, program, run

S, T = 5, 7  # queries and keys
Q, K = randn(2, 3, S, 8), randn(2, 3, S, 8, seed=1)
LONG = randn(2, 3, T, 8, seed=1)
BEFORE = [fuse_attention.PASS, remove_noops.PASS]
FOLDED = [*BEFORE, fold_constants.PASS]
PADDING = padding((S, 3), S)


def attend(mask_of, *inputs: torch.Tensor, passes=BEFORE, dynamic=None, **weights) -> Ran:
    """Attention under a mask that is made of (model, query, further inputs)."""

    def forward(m, q, k, *rest):
        return F.scaled_dot_product_attention(q, k, k, mask_of(m, q, *rest))

    def with_padding(m, q, k, pad):
        return F.scaled_dot_product_attention(q, k, k, mask_of(m, q, pad))

    def without(m, q, k):
        return F.scaled_dot_product_attention(q, k, k, mask_of(m, q))

    forward = with_padding if len(inputs) == 3 else without
    return run([*passes, PASS], program(forward, **weights), *inputs, dynamic=dynamic)


def mask_and_causal(ran: Ran) -> tuple[str, bool]:
    """The mask's op and shape, and is_causal, of the one attention."""
    (op,) = (node for node in ran.graph.calls if "graphopt" in str(node.target))
    mask = op.args[3]
    return ("" if mask is None else f"{mask.name} {list(mask.meta['val'].shape)}"), op.args[4]


def ranges(size_or_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    size = size_or_mask.shape[2]
    return torch.arange(size)[:, None], torch.arange(size)[None]


def causal(m, q):
    query, key = ranges(q)
    return key <= query


NOTHING = {
    "ones": lambda m, q: torch.ones(S, S, dtype=torch.bool),
    "new ones": lambda m, q: q.new_ones((), dtype=torch.bool).expand(2, 1, S, S),
    "zeros added": lambda m, q: torch.zeros(S, S),
    "key positions that exist": lambda m, q: (ranges(q)[1] >= 0).expand(S, S),
    "a chain of ands": lambda m, q: (ranges(q)[1] >= 0) & (ranges(q)[0] > -1) & torch.ones(S, S).bool(),
}
CAUSAL = {
    "key <= query": causal,
    "query >= key": lambda m, q: ranges(q)[0] >= ranges(q)[1],
    "key < query + 1": lambda m, q: ranges(q)[1] < ranges(q)[0] + 1,
    "query > key - 1": lambda m, q: ranges(q)[0] > ranges(q)[1] - 1,
    "both shifted": lambda m, q: ranges(q)[1] + 3 <= ranges(q)[0] + 3,
    "expanded": lambda m, q: causal(m, q).expand(2, 1, S, S),
    "and all": lambda m, q: causal(m, q) & torch.ones(S, S, dtype=torch.bool),
    "tril": lambda m, q: torch.ones(S, S, dtype=torch.bool).tril(),
    "tril cast": lambda m, q: torch.tril(torch.ones(S, S)).bool(),
    "triu of -inf": lambda m, q: torch.triu(torch.full((S, S), -torch.inf), 1),
    "triu of the lowest": lambda m, q: torch.triu(torch.full((S, S), torch.finfo(torch.float32).min), 1),
}
OTHERS = {
    "shifted by one": lambda m, q: ranges(q)[1] <= ranges(q)[0] + 1,
    "the diagonal forbidden": lambda m, q: ranges(q)[1] - 1 < ranges(q)[0] - 1,
    "scaled positions": lambda m, q: ranges(q)[1] <= torch.add(ranges(q)[0], 1, alpha=0) * 2,
    "upper": lambda m, q: ranges(q)[1] >= ranges(q)[0],
    "tril without the diagonal": lambda m, q: torch.ones(S, S, dtype=torch.bool).tril(1),
    "tril of numbers": lambda m, q: torch.ones(S, S).tril(),
    "triu from the diagonal": lambda m, q: torch.triu(torch.full((S, S), -1e30), 0),
    "triu of small numbers": lambda m, q: torch.triu(torch.full((S, S), -1.0), 1),
    "all but one": lambda m, q: torch.ones(S, S).bool() & (ranges(q)[1] * ranges(q)[0] != 12),
    "logical_and of numbers": lambda m, q: torch.logical_and(torch.zeros(S, S) + ranges(q)[1], causal(m, q)),
    "a row of a causal mask": lambda m, q: ranges(q)[1] <= torch.zeros(S, S, dtype=torch.long)[:1],
    "one query's range": lambda m, q: ranges(q)[1] <= torch.arange(1)[:, None],
}


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", NOTHING)
def test_a_mask_that_is_true_everywhere(name: str, folded: bool) -> None:
    ran = attend(NOTHING[name], Q, K, passes=FOLDED if folded else BEFORE)
    assert mask_and_causal(ran) == ("", False)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_mask(name: str, folded: bool) -> None:
    ran = attend(CAUSAL[name], Q, K, passes=FOLDED if folded else BEFORE)
    assert mask_and_causal(ran) == ("", True)


@pytest.mark.parametrize("name", OTHERS)
def test_a_mask_that_only_looks_so_is_refused(name: str) -> None:
    attend(OTHERS[name], Q, K).refuses("the mask depends on the inputs")
    ran = attend(OTHERS[name], Q, K, passes=FOLDED)
    ran.refuses("the mask is a constant that is neither true everywhere nor causal")


def test_fewer_queries_than_keys() -> None:
    def forward(m, q, k):
        mask = torch.ones(S, T, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, k, mask)

    ran = run([*BEFORE, PASS], program(forward), Q, LONG)
    assert mask_and_causal(ran) == ("", True)


def test_the_last_queries_of_a_longer_sequence_are_refused() -> None:
    def forward(m, q, k):
        mask = torch.arange(T)[None] <= torch.arange(T - S, T)[:, None]
        return F.scaled_dot_product_attention(q, k, k, mask)

    run([*FOLDED, PASS], program(forward), Q, LONG).refuses("neither true everywhere nor causal")


@pytest.mark.parametrize("narrow", [False, True])
def test_padding_and_causal(narrow: bool) -> None:
    def mask_of(m, q, pad):
        keys = pad.bool()[:, None, None]
        return causal(m, q) & (keys if narrow else keys.expand(2, 1, S, S))

    ran = attend(mask_of, Q, K, PADDING)
    assert mask_and_causal(ran) == ("unsqueeze_3 [2, 1, 1, 5]", True) or narrow
    assert mask_and_causal(ran)[1]
    assert mask_and_causal(ran)[0].endswith("[2, 1, 1, 5]")


def test_padding_alone_is_not_expanded() -> None:
    def mask_of(m, q, pad):
        return pad.bool()[:, None, None].expand(2, 1, S, S)

    assert mask_and_causal(attend(mask_of, Q, K, PADDING))[0].endswith("[2, 1, 1, 5]")


def test_padding_that_is_narrow_is_refused() -> None:
    def mask_of(m, q, pad):
        return pad.bool()[:, None, None]

    attend(mask_of, Q, K, PADDING).refuses("the mask depends on the inputs: it is computed, not recognised")


def test_bits_are_no_mask() -> None:
    def mask_of(m, q, pad):
        return ((pad * 2)[:, None, None] & torch.ones(S, S, dtype=torch.long)).bool()

    with pytest.raises(
        AssertionError, match="depends on the inputs"
    ):  # the remark is there, and nothing else
        attend(mask_of, Q, K, PADDING + 1).refuses("neither")


def test_causal_and_is_causal() -> None:
    def forward(m, q, k):
        return F.scaled_dot_product_attention(q, k, k, is_causal=True)

    run([*BEFORE, PASS], program(forward), Q, K).stays()


def test_two_attentions_of_one_mask() -> None:
    def forward(m, q, k, pad):
        mask = causal(m, q) & pad.bool()[:, None, None]
        once = F.scaled_dot_product_attention(q, k, k, mask)
        return F.scaled_dot_product_attention(once, k, k, mask), mask

    ran = run([*BEFORE, PASS], program(forward), Q, K, PADDING)
    assert ran.kept[PASS.name] == 2


@pytest.mark.parametrize("name", ["key <= query", "tril", "tril cast", "triu of -inf", "expanded"])
def test_dynamic_sizes(name: str) -> None:
    spelled = {
        "key <= query": causal,
        "expanded": lambda m, q: causal(m, q).expand(q.shape[0], 1, q.shape[2], q.shape[2]),
        "tril": lambda m, q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(),
        "tril cast": lambda m, q: torch.ones(q.shape[2], q.shape[2]).tril().bool(),
        "triu of -inf": lambda m, q: torch.full((q.shape[2], q.shape[2]), -torch.inf).triu(1),
    }
    names = dict.fromkeys("qk", {0: "batch", 2: "seq"})
    ran = attend(spelled[name], Q, K, dynamic=names)
    assert mask_and_causal(ran) == ("", True)
    ran.agrees(randn(3, 3, 2, 8), randn(3, 3, 2, 8, seed=1)).agrees(
        randn(1, 3, 9, 8), randn(1, 3, 9, 8, seed=1)
    )


def test_dynamic_padding_as_transformers_reads_it() -> None:
    def mask_of(m, q, pad):
        batch, seq = pad.shape
        query, key = torch.arange(seq)[None, None, :, None], torch.arange(seq)[None, None, None]
        read = pad.bool()[torch.arange(batch)[:, None, None, None], key]
        return ((key <= query) & read).expand(batch, -1, seq, seq)

    names = {"q": {0: "batch", 2: "seq"}, "k": {0: "batch", 2: "seq"}, "pad": {0: "batch", 1: "seq"}}
    ran = attend(mask_of, Q, K, PADDING, passes=[fold_index.PASS, *BEFORE], dynamic=names)
    mask, is_causal = mask_and_causal(ran)
    assert is_causal
    assert mask.split()[1:] == ["[s53,", "1,", "1,", "s31]"] or ", 1, 1, " in mask
    ran.agrees(randn(3, 3, 4, 8), randn(3, 3, 4, 8, seed=1), padding((4, 1, 2), 4))
    ran.agrees(randn(1, 3, 9, 8), randn(1, 3, 9, 8, seed=1), padding((7,), 9))


def test_dynamic_lengths_that_may_differ_are_refused() -> None:
    def mask_of(m, q, pad):
        size = pad.shape[1]
        return torch.arange(size)[None] <= torch.arange(1)[:, None]

    names = {"q": {2: "seq"}, "pad": {1: "keys"}}
    ran = attend(mask_of, Q, K, PADDING, dynamic=names)
    ran.refuses("the mask depends on the inputs").agrees(randn(2, 3, 3, 8), K, PADDING)
