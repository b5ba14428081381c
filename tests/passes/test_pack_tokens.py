from __future__ import annotations

import pytest
import torch

from graphopt.passes.fuse_masked_mean_pool import PASS as FUSE_MASKED_MEAN_POOL
from graphopt.passes.pack_tokens import PASS, reads_first
from tests._models import padding, randn
from tests.passes._harness import program, run

X, MASK = randn(2, 5, 8), padding((5, 3), 5)
HOLES = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])


def zeroed(m, x, mask):
    return torch.where(mask.to(torch.bool).unsqueeze(2), x.relu(), 0.0)


def mean(m, x, mask):
    weights = mask.unsqueeze(-1).to(x.dtype)
    return (x.relu() * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def attended(m, x, mask):
    """The first position of what attention gives."""
    heads = x.view(2, 5, 2, 4).transpose(1, 2)
    seen = mask.to(torch.bool)[:, None, None, :]
    out = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=seen)
    return out.transpose(1, 2).reshape(2, 5, 8)[:, 0]


def test_zeros_at_padded_positions() -> None:
    ran = run(PASS, program(zeroed), X, MASK)
    ran.becomes(
        before="""
            %0 = to(mask, bool)
            %1 = unsqueeze(%0, 2)
            %2 = relu(x)
            %3 = where(%1, %2, 0)
            return %3
        """,
        expected="""
            %0 = to(mask, bool)
            %1 = reshape(%0, [-1])
            %2 = nonzero(%1)
            %3 = squeeze(%2, 1)
            %4 = relu(x)
            %5 = graphopt.pack_tokens(%4, %3)
            %6 = graphopt.unpack_tokens(%5, %0)
            return %6
        """,
    )


@pytest.mark.parametrize("mask", [HOLES, torch.ones_like(HOLES), torch.zeros_like(HOLES), MASK.flip(1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("forward", [zeroed, mean])
def test_masks_of_every_kind(mask: torch.Tensor, dtype: torch.dtype, forward) -> None:
    passes = [FUSE_MASKED_MEAN_POOL, PASS]
    ran = run(passes, program(forward), X, MASK.to(dtype))
    ran.counts(pack_tokens=1, unpack_tokens=1).agrees(randn(2, 5, 8, seed=1), mask.to(dtype))


def test_a_mean_over_tokens_reads_them_unpacked() -> None:
    ran = run([FUSE_MASKED_MEAN_POOL, PASS], program(mean), X, MASK)
    (pool,) = ran.graph.fx.find_nodes(op="call_function", target=torch.ops.graphopt.masked_mean_pool.default)
    assert pool.args[0].target is torch.ops.graphopt.unpack_tokens.default
    assert not reads_first(ran.graph)


def column(x, mask):
    return mask.unsqueeze(-1).expand_as(x).to(x.dtype)


def multiplied(m, x, mask):
    return x.relu() * column(x, mask)


def by_position(m, x, mask):
    """Later tokens count more, and padding nothing."""
    weights = mask.unsqueeze(-1).to(x.dtype) * (torch.arange(x.shape[1]) + 1.5).view(1, -1, 1)
    return (x.relu() * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def largest(m, x, mask):
    return x.relu().masked_fill(column(x, mask) == 0, -torch.inf).max(1).values


def smallest(m, x, mask):
    return torch.where(mask.to(torch.bool).logical_not().unsqueeze(2), 1e9, x.relu()).amin(1)


def shifted(m, x, mask):
    return torch.where(mask.to(torch.bool).unsqueeze(2), x.relu(), -7.0)


def last(m, x, mask):
    """The last real token of each sequence, zeros where there is none."""
    largest, place = mask.flip(1).max(1)
    place = x.shape[1] - 1 - torch.where(largest == 0, x.shape[1] - 1, place)
    index = place.unsqueeze(-1).unsqueeze(1).expand(-1, 1, x.shape[2])
    return torch.gather(x.relu() * column(x, mask), 1, index).squeeze(1)


@pytest.mark.parametrize("forward", [multiplied, by_position, largest, smallest, shifted, last])
def test_poolings_that_read_real_tokens_only(forward) -> None:
    ran = run(PASS, program(forward), X, MASK).counts(pack_tokens=1, unpack_tokens=1)
    assert not reads_first(ran.graph)
    for mask in (HOLES, MASK.flip(1), torch.ones_like(MASK), 3 * MASK):
        ran.agrees(randn(2, 5, 8, seed=1), mask)


def first_real(m, x, mask):
    heads = x.view(2, 5, 2, 4).transpose(1, 2)
    seen = mask.to(torch.bool)[:, None, None, :]
    out = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=seen)
    states = out.transpose(1, 2).reshape(2, 5, 8).relu()
    index = mask.to(torch.int).argmax(dim=1).unsqueeze(-1).unsqueeze(1).expand(-1, 1, 8)
    return torch.gather(states, 1, index).squeeze(1)


def test_the_first_real_token_is_read_under_a_guard() -> None:
    from graphopt.passes.default import pipeline

    ran = run([*pipeline(), PASS], program(first_real), X, MASK)
    ran.counts(pack_tokens=1)
    assert reads_first(ran.graph)  # where there is none, the first of zeros is padding
    ran.agrees(X, torch.tensor([[1, 0, 1, 1, 0], [1] * 5])).agrees(X, 5 * MASK - 4 * (MASK.cumsum(1) == 1))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x, mask: x.relu().masked_fill(
            mask.to(torch.bool).unsqueeze(2), 0.0
        ),  # what is padded stays
        lambda m, x, mask: torch.where(mask.unsqueeze(2) == 1, 0.0, x.relu()),
        lambda m, x, mask: x.relu() * mask[:, 0, None, None],  # one for all tokens
        lambda m, x, mask: x.relu() * x[:, :, :1],
        lambda m, x, mask: torch.gather(x.relu(), 1, mask.argmin(1).view(2, 1, 1).expand(-1, 1, 8)),
    ],
)
def test_what_may_read_padding_is_left_alone(forward) -> None:
    run(PASS, program(forward), X, MASK).counts(pack_tokens=0)


def test_scores_of_as_many_heads_as_tokens_are_no_tokens() -> None:
    def forward(m, x, mask):
        return x.relu().masked_fill(mask[:, None, None, :] == 0, -1e4)

    run(PASS, program(forward), randn(2, 5, 4, 5), MASK).counts(pack_tokens=0)


def test_two_readers_share_the_packed_tokens() -> None:
    def forward(m, x, mask):
        seen = mask.to(torch.bool).unsqueeze(2)
        y = x.relu()
        return torch.where(seen, y, 0.0), torch.where(seen, y * 2, 0.0), mean(m, x, mask)

    ran = run([FUSE_MASKED_MEAN_POOL, PASS], program(forward), X, MASK)
    ran.counts(nonzero=1, pack_tokens=3, unpack_tokens=3)


def test_the_first_token_is_read_under_a_guard() -> None:
    from graphopt.passes.default import pipeline

    ran = run([*pipeline(), PASS], program(attended), X, MASK.to(torch.bool))
    ran.counts(pack_tokens=1)
    assert reads_first(ran.graph)


def pooled(queries: int, *options):
    """Attention of the mean of all tokens, as so many queries a sequence."""

    def forward(m, x, mask):
        heads = x.relu().unflatten(2, (2, 4))
        query = heads.mean(1, keepdim=True).repeat(1, queries, 1, 1)
        seen = mask.to(torch.bool).unsqueeze(1).unsqueeze(1)
        return torch.ops.graphopt.attention(query, heads.exp(), heads.sin(), seen, *options)

    return program(forward)


def test_one_query_reads_the_keys_of_real_tokens() -> None:
    ran = run(PASS, pooled(1), X, MASK).counts(pack_tokens=2, unpack_tokens=2)
    assert reads_first(ran.graph)  # an empty sequence has no key to attend to
    ran.agrees(randn(2, 5, 8, seed=2), torch.tensor([[1, 0, 0, 1, 0], [1] * 5]))


@pytest.mark.parametrize("options", [(True,), (False, None, None, -1e4)])
def test_one_query_that_may_read_padding_is_left_alone(options) -> None:
    """Causal, it sees the first key only; where a score may reach what padding scores, it sees that too."""
    run(PASS, pooled(1, *options), X, MASK).counts(pack_tokens=0)


def test_several_queries_are_left_alone() -> None:
    run(PASS, pooled(2), X, MASK).counts(pack_tokens=0)


def test_a_condition_of_its_own_for_each_feature_is_no_mask() -> None:
    def forward(m, x, seen):
        return torch.where(seen, x, 0.0)

    run(PASS, program(forward), X, randn(2, 5, 8) > 0).stays()


def test_a_mask_that_may_become_zero_in_a_cast_is_no_mask() -> None:
    def forward(m, x, mask):
        return torch.where(mask.to(torch.uint8).to(torch.bool)[:, :, None], x, 0.0)

    ran = run(PASS, program(forward), X, 256 * MASK)
    ran.counts(pack_tokens=1).agrees(X, 256 * MASK)  # by what was cast, which is zero everywhere


def test_a_constant_mask_is_refused() -> None:
    def forward(m, x):
        return torch.where(m.mask[:, :, None], x, 0.0)

    run(PASS, program(forward, mask=MASK.bool()), X).refuses("the mask is a constant")


def test_a_mask_of_one_sequence_for_all_is_refused() -> None:
    def forward(m, x, mask):
        return torch.where(mask[:, :, None], x, 0.0)

    run(PASS, program(forward), X, MASK[:1].bool()).refuses(
        r"the mask has shape \[1, 5\], the tokens \[2, 5\]"
    )


def test_one_token_a_sequence_is_refused() -> None:
    run(PASS, program(zeroed), X[:, :1], MASK[:, :1]).refuses("there is one token a sequence")


def test_dynamic_sizes() -> None:
    sizes = {0: "batch", 1: "seq"}
    ran = run(PASS, program(zeroed), X, MASK, dynamic={"x": sizes, "mask": sizes})
    ran.counts(unpack_tokens=1).agrees(randn(3, 7, 8), padding((7, 1, 4), 7))
