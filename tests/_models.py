"""Tiny models of every family, with weights that do not hide a wrong rewrite.

As initialised, weights have a spread of 0.02, batch-norm statistics are 0 and 1, and layer scales 1e-6: half
of a model may then be left out, and its output looks the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

VOCABULARY = 53
BATCH_SEQ = {0: "batch", 1: "seq"}


@dataclass(frozen=True)
class Example:
    """A model and a call of it; ``dynamic`` names the dimensions that may vary."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)

    def __call__(self) -> Any:
        """What the original returns."""
        with torch.no_grad():
            return self.model(*self.args, **self.kwargs)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=generator(seed))


def padding(lengths: tuple[int, ...], size: int) -> torch.Tensor:
    """An attention mask: a row a sequence, ones for its tokens."""
    return (torch.arange(size)[None] < torch.tensor(lengths)[:, None]).long()


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation mode, weights and statistics drawn anew so that activations are of order 1."""
    draw = generator(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embedding" not in name and "wte" not in name:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=draw)
            elif weight.dim() > 1 or name.endswith("bias"):
                weight.normal_(0, 0.5, generator=draw)
            else:
                weight.uniform_(0.5, 1.5, generator=draw)
        for name, statistics in model.named_buffers():
            if name.endswith("running_mean"):
                statistics.normal_(0, 0.5, generator=draw)
            elif name.endswith("running_var"):
                statistics.uniform_(0.5, 2.0, generator=draw)
    return model.eval()


class MLP(nn.Module):
    """Two linears in a row, a GELU, a third."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(width, 12)
        self.second = nn.Linear(12, 16)
        self.last = nn.Linear(16, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.gelu(self.second(self.first(x))))


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm_one = nn.BatchNorm2d(after)
        self.two = nn.Conv2d(after, after, 3, padding=1)
        self.norm_two = nn.BatchNorm2d(after)
        self.down: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.down = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm_one(self.one(x)))
        return torch.relu(self.norm_two(self.two(y)) + self.down(x))


class CNN(nn.Module):
    """A residual network with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.blocks = nn.Sequential(Residual(8, 8, 1), Residual(8, 12, 2))
        self.head = nn.Linear(12, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(image)).mean(dim=(2, 3)))


def _encoder(layers: int, hidden: int, heads: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden,
        max_position_embeddings=32,
    )
    return randomised(BertModel(config))


def bert() -> Example:
    mask = padding((7, 4), 7)
    kwargs = {"input_ids": tokens(2, 7), "attention_mask": mask, "token_type_ids": 1 - mask}
    return Example(_encoder(2, 16, 2), (), kwargs, dict.fromkeys(kwargs, BATCH_SEQ))


class Embedder(nn.Module):
    """An encoder, mean pooling over real tokens, unit length: a sentence embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _encoder(2, 24, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return {"embedding": nn.functional.normalize(mean, dim=-1)}


def minilm() -> Example:
    kwargs = {"input_ids": tokens(2, 6), "attention_mask": padding((6, 3), 6)}
    return Example(Embedder().eval(), (), kwargs, dict.fromkeys(kwargs, BATCH_SEQ))


def gpt2(use_cache: bool = False) -> Example:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        use_cache=use_cache,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Example(
        randomised(GPT2LMHeadModel(config)), (), {"input_ids": tokens(2, 6)}, {"input_ids": BATCH_SEQ}
    )


def llama(use_cache: bool = False) -> Example:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        use_cache=use_cache,
    )
    kwargs = {"input_ids": tokens(2, 6), "attention_mask": padding((6, 6), 6)}
    return Example(randomised(LlamaForCausalLM(config)), (), kwargs, dict.fromkeys(kwargs, BATCH_SEQ))


def vit() -> Example:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    )
    return Example(randomised(ViTModel(config)), (randn(2, 3, 8, 8),), {}, {"pixel_values": {0: "batch"}})


def t5() -> Example:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_decoder_layers=2,
        num_heads=2,
        use_cache=False,
        decoder_start_token_id=0,
    )
    kwargs = {"input_ids": tokens(2, 6), "decoder_input_ids": tokens(2, 4, seed=1)}
    dynamic = {"input_ids": {0: "batch", 1: "source"}, "decoder_input_ids": {0: "batch", 1: "target"}}
    return Example(randomised(T5ForConditionalGeneration(config)), (), kwargs, dynamic)


def cnn() -> Example:
    return Example(randomised(CNN()), (randn(2, 3, 14, 14),), {}, {"image": {0: "batch"}})


def mlp() -> Example:
    return Example(randomised(MLP()), (randn(3, 8),), {}, {"x": {0: "batch"}})


FAMILIES: dict[str, Callable[[], Example]] = {
    "bert": bert,
    "minilm": minilm,
    "gpt2": gpt2,
    "llama": llama,
    "vit": vit,
    "cnn": cnn,
    "t5": t5,
    "mlp": mlp,
}
