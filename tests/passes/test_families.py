"""Norms, rotary embeddings and gated MLPs of model families, each of which spells them in its own way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from graphopt.passes.default import pipeline
from tests._models import VOCABULARY, padding, randomised, tokens
from tests.passes._harness import run

LAYERS = 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPELLED = dict.fromkeys(("rsqrt", "pow", "mean", "neg", "silu", "stack", "cat"), 0)
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    # neighbours turn, in float32; norms without bias, spelled out; the feed-forward block beside attention
    "Cohere": ({}, {"layer_norm": 1, "add_layer_norm": LAYERS, "gated_mlp": LAYERS}),
    # half of the features turn, as neighbours; gate and up are one projection
    "Glm": (
        {"head_dim": 4, "partial_rotary_factor": 0.5},
        {"rms_norm": 1, "add_rms_norm": 2 * LAYERS, "gated_mlp": LAYERS},
    ),
    "Phi3": ({}, {"rms_norm": 1, "add_rms_norm": 2 * LAYERS, "gated_mlp": LAYERS}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_rotation_and_gate_is_found(family: str, dtype: torch.dtype) -> None:
    own, expected = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(**SIZES, **own)
    model = randomised(getattr(transformers, f"{family}ForCausalLM")(config)).to(dtype)
    kwargs = {"input_ids": tokens(2, 6), "attention_mask": padding((6, 6), 6)}
    ran = run(pipeline(), model, kwargs=kwargs, redraw=False)
    ran.counts(rope=2 * LAYERS, attention=LAYERS, **expected, **SPELLED)


# positions from a cumulative sum, a bias of positions, a projection behind the embeddings, optional types
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "Roberta": {},
    "MPNet": {},
    "Albert": {"embedding_size": 8},
    "Electra": {"embedding_size": 8},
    "DebertaV2": {"type_vocab_size": 2},
}


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_every_embedding_is_one_op(family: str) -> None:
    own = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "use_cache")}
    config = getattr(transformers, f"{family}Config")(**own, **EMBEDDINGS[family])
    model = randomised(getattr(transformers, f"{family}Model")(config))
    kwargs = {"input_ids": tokens(2, 6), "attention_mask": padding((6, 4), 6)}
    ran = run(pipeline(), model, kwargs=kwargs, redraw=False)
    ran.counts(embedding_layer_norm=1, layer_norm=0, add_layer_norm=2 * LAYERS)
