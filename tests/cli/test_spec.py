"""What a SPEC leads to: exported programs and Hugging Face directories, made here and tiny."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.cli import _spec
from graphopt.errors import SpecError

Run = Callable[..., Any]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**SMALL, "vocab_size": 29}


def directory(place: Path, **config: Any) -> str:
    """A Hugging Face directory without weights."""
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    return str(place)


def test_a_pt2_file_is_optimized(workspace: Path, run: Run) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU())
    torch.export.save(torch.export.export(model.eval(), (torch.randn(2, 4),)), workspace / "model.pt2")
    result = run("optimize", "model.pt2", "--effort", "fast", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["ops"]["before"] == {"aten.linear": 1, "aten.gelu": 1}
    assert "graphopt.linear_activation" in report["ops"]["after"]


def test_a_directory_with_weights_is_optimized_and_says_what_was_made(workspace: Path, run: Run) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    BertForSequenceClassification(BertConfig(**TEXT, num_labels=3)).save_pretrained(workspace / "bert")
    args = ("--effort", "fast", "--batch", "2", "--seq", "5", "--dynamic", "input_ids:1=seq")
    result = run("optimize", "bert", *args, "--dynamic", "attention_mask:1=seq")
    assert result.exit_code == 0, result.stderr
    assert "BertForSequenceClassification runs on" in result.stdout
    assert "note: inputs were made: input_ids [2, 5], attention_mask [2, 5]" in result.stdout
    assert "random" not in result.stdout


def test_weights_are_those_of_the_directory(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    saved = BertModel(BertConfig(**TEXT))
    saved.save_pretrained(tmp_path / "bert")
    loaded = _spec.load(str(tmp_path / "bert"))
    assert isinstance(loaded.model, torch.nn.Module)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert not loaded.model.training


def test_missing_weights_are_said(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path / "bert")
    BertConfig(**TEXT, architectures=[BertForSequenceClassification.__name__]).save_pretrained(
        tmp_path / "bert"
    )
    notes = _spec.load(str(tmp_path / "bert")).notes
    assert notes[0].startswith("2 weights are not in the directory and are random, first: classifier.bias")


@pytest.mark.parametrize(
    ("config", "inputs"),
    [
        (
            {
                **TEXT,
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "max_position_embeddings": 16,
            },
            {"input_ids": [1, 16], "attention_mask": [1, 16]},
        ),
        ({**TEXT, "model_type": "bert"}, {"input_ids": [1, 128], "attention_mask": [1, 128]}),
        (
            {**SMALL, "model_type": "vit", "architectures": ["ViTModel"], "image_size": 32, "patch_size": 8},
            {"pixel_values": [1, 3, 32, 32]},
        ),
        (
            {
                "model_type": "resnet",
                "architectures": ["ResNetModel"],
                "embedding_size": 8,
                "hidden_sizes": [8],
                "depths": [1],
            },
            {"pixel_values": [1, 3, 64, 48]},
        ),
        (
            {
                "model_type": "t5",
                "architectures": ["T5ForConditionalGeneration"],
                "vocab_size": 29,
                "d_model": 16,
            }
            | {"d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
            {"input_ids": [1, 128], "attention_mask": [1, 128], "decoder_input_ids": [1, 128]},
        ),
    ],
    ids=lambda value: value.get("model_type", "") if isinstance(value, dict) else "",
)
def test_inputs_are_made_for_every_kind(
    tmp_path: Path, config: dict[str, Any], inputs: dict[str, list[int]]
) -> None:
    folder = directory(tmp_path / "model", **config)
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 48}}')
    first, second = _spec.load(folder), _spec.load(folder)
    tensors = {name: value for name, value in first.kwargs.items() if isinstance(value, torch.Tensor)}
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == inputs
    assert "the directory holds no weights: they are random" in first.notes
    for name, tensor in tensors.items():  # twice the same: a comparison of two runs is fair
        assert torch.equal(tensor, second.kwargs[name])
    assert isinstance(first.model, torch.nn.Module)
    assert isinstance(second.model, torch.nn.Module)
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_sizes_that_the_model_does_not_take_are_refused(tmp_path: Path) -> None:
    folder = directory(tmp_path / "bert", **TEXT, model_type="bert", max_position_embeddings=8)
    assert _spec.load(folder, seq=8).kwargs["input_ids"].shape == (1, 8)
    with pytest.raises(SpecError, match="BertModel takes at most 8 tokens, not 9"):
        _spec.load(folder, seq=9)
    roberta = directory(
        tmp_path / "roberta", **TEXT, model_type="roberta", max_position_embeddings=8, pad_token_id=1
    )
    with pytest.raises(SpecError, match=r"does not run on the inputs made for it \(input_ids \[1, 8\]"):
        _spec.load(roberta)
