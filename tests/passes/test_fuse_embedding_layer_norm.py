from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, DistilBertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.models.distilbert.modeling_distilbert import Embeddings

from graphopt.passes.fuse_embedding_layer_norm import PASS
from graphopt.passes.remove_noops import PASS as REMOVE_NOOPS
from tests._models import VOCABULARY, randn, tokens
from tests.passes._harness import program, run

IDS, POSITIONS, TYPES = tokens(2, 5), torch.arange(5)[None], torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 1, 1]])


def tables(**sizes: int) -> dict[str, nn.Module]:
    rows = {"word": VOCABULARY, "position": 16, "kind": 2, **sizes}
    return {name: nn.Embedding(count, 8) for name, count in rows.items()} | {"norm": nn.LayerNorm(8)}


def three(m, ids, positions, types):
    return m.norm(m.word(ids) + m.kind(types) + m.position(positions))


def two(m, ids, positions):
    return m.norm(m.word(ids) + m.position(positions))


def test_three_lookups() -> None:
    run(PASS, program(three, **tables()), IDS, POSITIONS, TYPES).becomes("""
        %0 = graphopt.embedding_layer_norm(ids, word.weight, positions, position.weight, types, kind.weight,\
 norm.weight, norm.bias, 1e-05)
        return %0
    """)


def test_three_lookups_the_other_way_round() -> None:
    def forward(m, ids, positions, types):
        return m.norm(m.word(ids) + (m.position(positions) + m.kind(types)))

    ran = run(PASS, program(forward, **tables()), IDS, POSITIONS, TYPES)
    ran.counts(embedding_layer_norm=1, embedding=0, add=0)


def test_two_lookups() -> None:
    run(PASS, program(two, **tables()), IDS, POSITIONS).becomes("""
        %0 = graphopt.embedding_layer_norm(ids, word.weight, positions, position.weight, None, None,\
 norm.weight, norm.bias, 1e-05)
        return %0
    """)


def test_a_norm_without_weights() -> None:
    def forward(m, ids, positions):
        return F.layer_norm(m.word(ids) + m.position(positions), (8,))

    run(PASS, program(forward, **tables()), IDS, POSITIONS).counts(embedding_layer_norm=1)


@pytest.mark.parametrize("types", [TYPES, None])
def test_the_embeddings_of_bert(types: torch.Tensor | None) -> None:
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=8, num_attention_heads=2)
    ran = run([REMOVE_NOOPS, PASS], BertEmbeddings(config).eval(), IDS, types)
    ran.counts(embedding_layer_norm=1, embedding=0, layer_norm=0)


def test_the_embeddings_of_distilbert() -> None:
    config = DistilBertConfig(vocab_size=VOCABULARY, dim=8, n_heads=2, max_position_embeddings=16)
    ran = run([REMOVE_NOOPS, PASS], Embeddings(config).eval(), IDS)
    ran.counts(embedding_layer_norm=1, embedding=0, layer_norm=0)


def test_a_sum_that_others_read_too_is_refused() -> None:
    def forward(m, ids, positions):
        total = m.word(ids) + m.position(positions)
        return m.norm(total), total

    run(PASS, program(forward, **tables()), IDS, POSITIONS).refuses("add is also read by output")


def test_a_lookup_that_others_read_too_is_refused() -> None:
    def forward(m, ids, positions):
        word = m.word(ids)
        return m.norm(word + m.position(positions)), word

    run(PASS, program(forward, **tables()), IDS, POSITIONS).refuses("embedding is also read by output")


def test_two_dimensions_are_refused() -> None:
    layers = {**tables(), "norm": nn.LayerNorm((5, 8))}
    run(PASS, program(two, **layers), IDS, POSITIONS).refuses("2 dimensions are normalised together")


def test_no_lookup_a_token_is_refused() -> None:
    run(PASS, program(two, **tables()), IDS[:, :1], POSITIONS).refuses("no lookup is made for every token")


def test_one_type_a_sequence_is_refused() -> None:
    ran = run(PASS, program(three, **tables()), IDS, POSITIONS, TYPES[:, 1:2])
    ran.refuses(r"\[2, 1\] in \[2, 8\] is broadcast to \[2, 5, 8\]")


def test_one_feature_a_type_is_refused() -> None:
    layers = {**tables(), "kind": nn.Embedding(2, 1)}
    ran = run(PASS, program(three, **layers), IDS, POSITIONS, TYPES)
    ran.refuses(r"\[2, 5\] in \[2, 1\] is broadcast to \[2, 5, 8\]")


def test_a_table_of_another_type_is_refused() -> None:
    layers = {**tables(), "position": nn.Embedding(16, 8).bfloat16()}
    ran = run(PASS, program(two, **layers), IDS, POSITIONS)
    ran.refuses("a table is torch.bfloat16, not torch.float32")


def test_a_scaled_lookup_stays() -> None:
    def forward(m, ids, positions):
        return m.norm(torch.add(m.word(ids), m.position(positions), alpha=2))

    run(PASS, program(forward, **tables()), IDS, POSITIONS).stays()


def test_four_lookups_stay() -> None:
    def forward(m, ids, positions, types):
        return m.norm(m.word(ids) + m.kind(types) + m.position(positions) + m.word(types))

    run(PASS, program(forward, **tables()), IDS, POSITIONS, TYPES).stays()


def test_a_computed_position_stays() -> None:
    def forward(m, ids, positions):
        return m.norm(m.word(ids) + m.position)

    run(
        PASS,
        program(forward, word=nn.Embedding(VOCABULARY, 8), norm=nn.LayerNorm(8), position=randn(5, 8)),
        IDS,
        POSITIONS,
    ).stays()


def test_one_table_for_two_lookups() -> None:
    def forward(m, ids, types):
        return m.norm(m.word(ids) + m.word(types))

    run(PASS, program(forward, **tables()), IDS, TYPES).counts(embedding_layer_norm=1)


def test_dynamic_sizes() -> None:
    names = {0: "batch", 1: "seq"}
    dynamic = {"ids": names, "types": names, "positions": {1: "seq"}}
    ran = run(PASS, program(three, **tables()), IDS, POSITIONS, TYPES, dynamic=dynamic)
    ran.counts(embedding_layer_norm=1, embedding=0)
    ran.agrees(tokens(3, 4), torch.arange(4)[None], torch.ones(3, 4, dtype=torch.long))
    ran.agrees(tokens(1, 9), torch.arange(9)[None], torch.zeros(1, 9, dtype=torch.long))
