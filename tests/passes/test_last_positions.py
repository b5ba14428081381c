"""What is left of whole models of which one position is wanted: ``outputs={"logits": "last"}``, a pooler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import graphopt
from graphopt.capture.export import capture
from graphopt.capture.outputs import select
from graphopt.ir.graph import op_name
from graphopt.passes.default import pipeline
from tests._architectures import GROUPED, TEXT
from tests._models import BATCH_SEQ, VOCABULARY, padding, randn, randomised, tokens
from tests.passes._harness import Ran, rerun

ENDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
CAUSAL: dict[str, tuple[dict[str, Any], int]] = {  # with the projections that need every position: K and V
    "LlamaForCausalLM": (GROUPED, 2),
    "Qwen3ForCausalLM": ({**GROUPED, "head_dim": 8}, 2),
    "Gemma2ForCausalLM": ({**GROUPED, "head_dim": 8, "sliding_window": 4}, 2),
    "GPT2LMHeadModel": ({**ENDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}, 1),
    "GPTNeoXForCausalLM": ({**TEXT, "use_cache": False}, 1),
    "OPTForCausalLM": ({**ENDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}, 2),
    "BloomForCausalLM": ({**ENDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}, 1),
}
SPELLED_OUT = [("LlamaForCausalLM", "eager"), ("OPTForCausalLM", "eager"), ("GPT2LMHeadModel", "eager")]
IMAGE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 8}
VISION = {**IMAGE, "num_hidden_layers": 2, "patch_size": 4}
ONE_HEAD = ("linear", "linear_activation", "gated_mlp", "attention")


def model_of(name: str, config: dict[str, Any], attention: str) -> torch.nn.Module:
    made = getattr(transformers, name)
    known = attention if made._supports_sdpa else "eager"
    return randomised(made._from_config(made.config_class(**config), attn_implementation=known))


def optimized(model: torch.nn.Module, outputs: Any, kwargs: dict[str, torch.Tensor]) -> Ran:
    names = {name: BATCH_SEQ if value.dim() == 2 else {0: "batch"} for name, value in kwargs.items()}
    graph = capture(model, (), kwargs, dynamic=names)
    select(graph, outputs)
    return rerun(pipeline(), model, graph, list(kwargs.values()))


def positions(ran: Ran) -> list[Any]:
    """How many positions each projection and attention computes, in order."""
    found = [node for node in ran.graph.calls if op_name(node).split(".")[-1] in ONE_HEAD]
    return [node.meta["val"].shape[1] for node in found if node.meta["val"].dim() > 2]


def since_last_layer(sizes: list[Any]) -> list[Any]:
    """From the first projection on that computes one position."""
    return sizes[sizes.index(1) :]


@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in CAUSAL), *SPELLED_OUT])
def test_the_last_logits(name: str, attention: str) -> None:
    """All but keys and values of the last layer is computed for one position: attention, block and head."""
    config, packed = CAUSAL[name]
    kwargs = {"input_ids": tokens(2, 7), "attention_mask": padding((7, 7), 7)}
    ran = optimized(model_of(name, config, attention), {"logits": "last"}, kwargs)
    ran.counts(attention=2)
    sizes = positions(ran)
    tail = since_last_layer(sizes)
    assert sizes[-1] == 1
    if packed == 1:  # queries are a part of one projection
        assert set(tail) == {1}
    else:  # queries; keys and values in one; attention, and all behind it
        assert tail[0] == 1
        assert set(tail[2:]) == {1}
    assert len(tail) >= 5 - (packed == 1)


POOLED: dict[str, tuple[dict[str, Any], list[str] | None]] = {
    "BertModel": (TEXT, ["pooler_output"]),
    "RobertaForSequenceClassification": (TEXT, None),
    "AlbertModel": ({**TEXT, "embedding_size": 16}, ["pooler_output"]),
    "DistilBertForSequenceClassification": ({**TEXT, "dim": 32, "n_layers": 2, "n_heads": 4}, None),
    "ViTForImageClassification": (VISION, None),
    "CLIPVisionModel": (VISION, ["pooler_output"]),
}


@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "sdpa") for name in POOLED), ("BertModel", "eager")]
)
def test_the_class_token(name: str, attention: str) -> None:
    """Of the last layer, only keys and values are computed for more than the first position."""
    config, outputs = POOLED[name]
    kwargs = {"input_ids": tokens(2, 7), "attention_mask": padding((7, 4), 7)}
    if "image_size" in config:
        kwargs = {"pixel_values": randn(2, 3, 8, 8)}
    ran = optimized(model_of(name, config, attention), outputs, kwargs)
    tail = since_last_layer(positions(ran.counts(attention=2)))
    assert tail[0] == 1
    assert tail[1] != 1
    assert tail[2:] == [1, 1, 1, 1]  # attention, its output, the feed-forward block


def test_optimize_returns_the_last_logits() -> None:
    model = model_of("LlamaForCausalLM", GROUPED, "sdpa")
    kwargs = {"input_ids": tokens(2, 7), "attention_mask": padding((7, 7), 7)}
    found = graphopt.optimize(
        model, kwargs=kwargs, dynamic=True, outputs={"logits": "last"}, effort="fast", executors=("eager",)
    )
    other = {"input_ids": tokens(3, 4, seed=1), "attention_mask": padding((4, 4, 4), 4)}
    with torch.no_grad():
        torch.testing.assert_close(found(**other).logits, model(**other).logits[:, -1:], rtol=1e-4, atol=1e-5)
    assert found.report.rewrites_by_pass()["hoist_slice"] == 1
