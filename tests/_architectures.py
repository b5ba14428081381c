"""Tiny models of the architectures in use, and what each contains, counted from its configuration.

The counts are what the passes must find: they are worked out by hand from the published architecture, never
read off a graph. Shapes are the smallest at which no two sizes agree by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tests._models import VOCABULARY, Example, padding, randn, randomised, tokens
from tests._networks import EfficientNet, Experts, MobileNet

LAYERS = 2
BATCH, SEQ = 2, 7
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "use_cache": False}  # two heads of queries a head of keys
BOTH = ("eager", "sdpa")


@dataclass(frozen=True)
class Contents:
    """What an architecture contains.

    Args:
        norms: layer, RMS and group norms.
        residual_norms: sums of two or more values that a norm reads: one kernel can do both. Sums of lookups
            that nothing else reads are left out: they are one kernel with the lookups.
        attentions: softmax(Q K^T) V, self and cross.
        projections: attentions two or more of whose Q, K and V are projections of one value.
        ropes: tensors that are rotated by position.
        gated_mlps: act(gate(x)) * up(x).
        activations: calls of the activations in ``named``, those inside gated MLPs included.
        conv_norms: convolutions followed by a batch norm.
        norm_sums: norms that nothing but a sum with the residual stream reads: one kernel can do both, and
            the norm of that sum too.
        named: the activations of the configuration, by the name of their ATen op or as graphopt's ops say it.
    """

    norms: int = 0
    residual_norms: int = 0
    attentions: int = 0
    projections: int = 0
    ropes: int = 0
    gated_mlps: int = 0
    activations: int = 0
    conv_norms: int = 0
    norm_sums: int = 0
    named: tuple[str, ...] = ("gelu",)


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny model of it, with an attention implementation, and what is in it."""

    make: Callable[[str], Example]
    contents: Contents
    attention: tuple[str, ...] = BOTH


def encoded(name: str, **config: Any) -> Callable[[str], Example]:
    """An architecture of transformers that reads token ids and a mask that pads the second sequence."""

    def make(attention: str) -> Example:
        kwargs = {"input_ids": tokens(BATCH, SEQ), "attention_mask": padding((SEQ, 4), SEQ)}
        return Example(pretrained(name, attention, config), (), kwargs)

    return make


def seen(name: str, image: int, **config: Any) -> Callable[[str], Example]:
    """An architecture of transformers that reads images."""

    def make(attention: str) -> Example:
        return Example(pretrained(name, attention, config), (randn(BATCH, 3, image, image),))

    return make


def plain(model: Callable[[], nn.Module], *shape: int) -> Callable[[str], Example]:
    """A network in plain torch that reads one tensor."""
    return lambda attention: Example(randomised(model()), (randn(*shape),))


def pretrained(name: str, attention: str, config: dict[str, Any]) -> nn.Module:
    """A model of transformers with weights drawn anew (see ``randomised``)."""
    import transformers

    made = getattr(transformers, f"{name}Config")(**config)
    model = getattr(transformers, f"{name}Model")
    return randomised(model._from_config(made, attn_implementation=attention) if attention else model(made))


def translated(name: str, **config: Any) -> Callable[[str], Example]:
    """An encoder and a decoder over token ids, the source padded."""

    def make(attention: str) -> Example:
        kwargs = {
            "input_ids": tokens(BATCH, SEQ),
            "attention_mask": padding((SEQ, 4), SEQ),
            "decoder_input_ids": tokens(BATCH, 5, seed=1),
        }
        return Example(pretrained(name, attention, config), (), kwargs)

    return make


def whisper(attention: str) -> Example:
    config = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "num_mel_bins": 6,
        "encoder_layers": 1,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_source_positions": 9,
        "max_target_positions": 12,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    kwargs = {"input_features": randn(BATCH, 6, 18), "decoder_input_ids": tokens(BATCH, 5, seed=1)}
    return Example(pretrained("Whisper", attention, config), (), kwargs)


def clip(attention: str) -> Example:
    text = {**TEXT, "num_hidden_layers": LAYERS}
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 8,
        "patch_size": 4,
    }
    kwargs = {
        "input_ids": tokens(BATCH, SEQ),
        "pixel_values": randn(BATCH, 3, 8, 8),
        "attention_mask": padding((SEQ, 4), SEQ),
    }
    config = {"text_config": text, "vision_config": vision, "projection_dim": 24}
    return Example(pretrained("CLIP", attention, config), (), kwargs)


# A post-norm encoder: a norm behind the embeddings, two a layer, each behind a sum.
POST_NORM = Contents(1 + 2 * LAYERS, 2 * LAYERS, LAYERS, LAYERS, activations=LAYERS)
# A pre-norm decoder with rotary positions and gated MLPs: two norms a layer and a last one; but for the very
# first, which reads the embeddings, each is behind a sum.
LLAMA_LIKE = Contents(
    norms=2 * LAYERS + 1,
    residual_norms=2 * LAYERS,
    attentions=LAYERS,
    projections=LAYERS,
    ropes=2 * LAYERS,
    gated_mlps=LAYERS,
    activations=LAYERS,
    named=("silu",),
)
# Norms before and behind each of two blocks a layer.
SANDWICH = replace(LLAMA_LIKE, norm_sums=2 * LAYERS, named=("gelu",))
MARIAN_LIKE = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "use_cache": False,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_decoder_layers": LAYERS,
    "num_heads": 4,
    "use_cache": False,
    "decoder_start_token_id": 0,
}

ARCHITECTURES: dict[str, Architecture] = {
    "BERT": Architecture(encoded("Bert", **TEXT), POST_NORM),
    "RoBERTa": Architecture(encoded("Roberta", **TEXT), POST_NORM),
    "DistilBERT": Architecture(
        encoded(
            "DistilBert",
            vocab_size=VOCABULARY,
            dim=32,
            n_layers=LAYERS,
            n_heads=4,
            hidden_dim=48,
            max_position_embeddings=32,
        ),
        POST_NORM,
    ),
    # Every second layer sees 4 positions; the first layer's first norm is left out.
    "ModernBERT": Architecture(
        encoded("ModernBert", **TEXT, local_attention=4, global_attn_every_n_layers=2),
        Contents(
            norms=2 * LAYERS + 1,
            residual_norms=2 * LAYERS,
            attentions=LAYERS,
            projections=LAYERS,
            ropes=2 * LAYERS,
            gated_mlps=LAYERS,
            activations=LAYERS,
        ),
    ),
    "MPNet": Architecture(encoded("MPNet", **TEXT), POST_NORM, ("eager",)),
    "DeBERTa-v2": Architecture(  # the norm of the relative positions reads a weight: it is computed once
        encoded(
            "DebertaV2",
            **TEXT,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=4,
            max_relative_positions=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            position_biased_input=False,
        ),
        POST_NORM,
        ("eager",),
    ),
    "ALBERT": Architecture(encoded("Albert", **TEXT, embedding_size=16), POST_NORM),
    "GPT-2": Architecture(  # the first sum is that of words and positions, the same for every sequence
        encoded(
            "GPT2",
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=LAYERS,
            n_head=4,
            n_inner=48,
            n_positions=32,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=2,
        ),
        Contents(2 * LAYERS + 1, 2 * LAYERS + 1, LAYERS, LAYERS, activations=LAYERS),
    ),
    "GPT-NeoX": Architecture(  # both norms of a layer read one sum of three
        encoded("GPTNeoX", **TEXT, rotary_pct=0.5, use_parallel_residual=True, use_cache=False),
        Contents(2 * LAYERS + 1, LAYERS, LAYERS, LAYERS, 2 * LAYERS, activations=LAYERS),
    ),
    "Llama": Architecture(encoded("Llama", **GROUPED), LLAMA_LIKE),
    "Mistral": Architecture(encoded("Mistral", **GROUPED, sliding_window=4), LLAMA_LIKE),
    "Qwen2": Architecture(encoded("Qwen2", **GROUPED), LLAMA_LIKE),
    "Qwen3": Architecture(  # queries and keys are normed, too
        encoded("Qwen3", **GROUPED, head_dim=8),
        Contents(4 * LAYERS + 1, 2 * LAYERS, LAYERS, LAYERS, 2 * LAYERS, LAYERS, LAYERS, named=("silu",)),
    ),
    "Gemma2": Architecture(  # four norms a layer, two of them on what is added to the residual
        encoded("Gemma2", **GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=5.0),
        replace(SANDWICH, norms=4 * LAYERS + 1),
        ("eager",),
    ),
    "Gemma3": Architecture(  # queries and keys are normed, too
        encoded("Gemma3Text", **GROUPED, head_dim=8, sliding_window=4),
        replace(SANDWICH, norms=6 * LAYERS + 1),
    ),
    "OLMo 2": Architecture(  # a block is normed behind, not before; so are queries and keys
        encoded("Olmo2", **GROUPED),
        replace(LLAMA_LIKE, norms=4 * LAYERS + 1, residual_norms=1, norm_sums=2 * LAYERS),
    ),
    "Phi": Architecture(  # one norm a layer, which attention and MLP share: a sum of three
        encoded("Phi", **TEXT, partial_rotary_factor=0.5, use_cache=False),
        Contents(LAYERS + 1, LAYERS, LAYERS, LAYERS, 2 * LAYERS, activations=LAYERS),
    ),
    "OPT": Architecture(  # the first norm reads the sum of two lookups
        encoded(
            "OPT", **{k: v for k, v in TEXT.items() if k != "intermediate_size"}, ffn_dim=48, use_cache=False
        ),
        Contents(2 * LAYERS + 1, 2 * LAYERS + 1, LAYERS, LAYERS, activations=LAYERS, named=("relu",)),
    ),
    "BLOOM": Architecture(
        encoded("Bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=LAYERS, n_head=4, use_cache=False),
        Contents(2 * LAYERS + 2, 2 * LAYERS, LAYERS, LAYERS, activations=LAYERS),
        ("eager",),
    ),
    "T5": Architecture(  # one layer of the encoder, two of the decoder, which attend twice
        translated("T5", **T5),
        Contents(
            norms=2 + 1 + 3 * LAYERS + 1,
            residual_norms=2 + 3 * LAYERS,
            attentions=1 + 2 * LAYERS,
            projections=1 + 2 * LAYERS,
            activations=1 + LAYERS,
            named=("relu",),
        ),
    ),
    "T5 v1.1": Architecture(
        translated("T5", **T5, feed_forward_proj="gated-gelu"),
        Contents(
            norms=2 + 1 + 3 * LAYERS + 1,
            residual_norms=2 + 3 * LAYERS,
            attentions=1 + 2 * LAYERS,
            projections=1 + 2 * LAYERS,
            gated_mlps=1 + LAYERS,
            activations=1 + LAYERS,
        ),
    ),
    "BART": Architecture(
        translated("Bart", **MARIAN_LIKE),
        Contents(
            norms=1 + 2 + 1 + 3 * LAYERS,
            residual_norms=2 + 3 * LAYERS,
            attentions=1 + 2 * LAYERS,
            projections=1 + 2 * LAYERS,
            activations=1 + LAYERS,
        ),
    ),
    # Two convolutions with GELU before the encoder. Both first sums add positions.
    "Whisper": Architecture(
        whisper,
        Contents(
            norms=2 + 1 + 3 * LAYERS + 1,
            residual_norms=2 + 1 + 3 * LAYERS + 1,
            attentions=1 + 2 * LAYERS,
            projections=1 + 2 * LAYERS,
            activations=2 + 1 + LAYERS,
        ),
    ),
    "ViT": Architecture(
        seen(
            "ViT",
            8,
            hidden_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=8,
            patch_size=4,
        ),
        Contents(2 * LAYERS + 1, 2 * LAYERS + 1, LAYERS, LAYERS, activations=LAYERS),
    ),
    # Stages of two layers, the second on shifted windows, and of one; norms of patches, of the merged patches
    # and at the end. The first norm of a stage reads no sum.
    "Swin": Architecture(
        seen(
            "Swin",
            16,
            embed_dim=16,
            depths=[2, 1],
            num_heads=[2, 4],
            image_size=16,
            patch_size=2,
            window_size=4,
        ),
        Contents(1 + 2 * 3 + 1 + 1, 3 + 1 + 1, 3, 3, activations=3),
    ),
    # As Swin, with norms behind the blocks: the sum that the last norm reads is one op with the norm before.
    "Swin v2": Architecture(
        seen(
            "Swinv2",
            16,
            embed_dim=16,
            depths=[2, 1],
            num_heads=[2, 4],
            image_size=16,
            patch_size=2,
            window_size=4,
        ),
        Contents(1 + 2 * 3 + 1 + 1, 0, 3, 3, activations=3, norm_sums=2 * 3),
        ("eager",),
    ),
    # Two layers of text, one of vision: there, the last norm reads the class token alone. Both first sums add
    # positions, and a norm reads each.
    "CLIP": Architecture(
        clip,
        Contents(
            norms=2 * LAYERS + 1 + 1 + 2 + 1,
            residual_norms=2 * LAYERS + 1 + 2,
            attentions=LAYERS + 1,
            projections=LAYERS + 1,
            activations=LAYERS + 1,
            named=("quick_gelu",),
        ),
    ),
    "ConvNeXt": Architecture(  # norms of patches, one a layer, one between the stages, one at the end
        seen("ConvNext", 16, hidden_sizes=[12, 20], depths=[1, 1], num_stages=2, patch_size=2, image_size=16),
        Contents(norms=1 + 2 + 1 + 1, activations=2),
        ("",),
    ),
    # A norm of patches and one at the end of each stage; the first stage norms its reduced keys and values.
    "SegFormer": Architecture(
        seen(
            "Segformer",
            16,
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_attention_heads=[2, 4],
            mlp_ratios=[2, 2],
        ),
        Contents(2 + 2 * 2 + 1 + 2, 2 + 2, 2, 2, activations=2),
    ),
    # A stem, two convolutions in each of two layers, and the second layer's shortcut.
    "ResNet": Architecture(
        seen("ResNet", 16, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"),
        Contents(conv_norms=1 + 2 * 2 + 1, activations=1 + 2 * 2, named=("relu",)),
        ("",),
    ),
    "EfficientNet-style": Architecture(
        plain(EfficientNet, BATCH, 3, 16, 16),
        Contents(conv_norms=1 + 2 * 3, activations=1 + 2 * 3, named=("silu",)),
        ("",),
    ),
    "MobileNet-style": Architecture(
        plain(MobileNet, BATCH, 3, 16, 16),
        Contents(conv_norms=1 + 2 * 3, activations=1 + 2 * 2, named=("hardswish", "hardtanh", "relu6")),
        ("",),
    ),
    "Mixtral": Architecture(  # the experts of a layer are one gated MLP on rows in groups
        encoded("Mixtral", **GROUPED, num_local_experts=3, num_experts_per_tok=2),
        LLAMA_LIKE,
    ),
    "Mixtral-style": Architecture(  # three experts a layer, each of which reads every token
        plain(lambda: Experts(LAYERS), BATCH, SEQ, 16),
        Contents(LAYERS + 1, LAYERS, gated_mlps=3 * LAYERS, activations=3 * LAYERS, named=("silu",)),
        ("",),
    ),
    "Mamba": Architecture(  # a SiLU behind the convolution, one on the gate
        lambda attention: Example(
            pretrained(
                "Mamba",
                attention,
                {
                    "vocab_size": VOCABULARY,
                    "hidden_size": 32,
                    "state_size": 4,
                    "num_hidden_layers": LAYERS,
                    "use_cache": False,
                },
            ),
            (),
            {"input_ids": tokens(BATCH, SEQ)},
        ),
        Contents(norms=LAYERS + 1, residual_norms=LAYERS, activations=2 * LAYERS, named=("silu",)),
        ("",),
    ),
}
