"""A local Hugging Face directory as a model with example inputs: offline, and without pickles."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import SpecError
from graphopt.runtime.target import Target

_SEQ = 128
_IMAGE = 224  # pixels, where neither the model nor its preprocessor names a size
_SAFE = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def load(
    folder: Path, batch: int, seq: int | None, target: str
) -> tuple[torch.nn.Module, dict[str, Any], tuple[str, ...]]:
    """Load a model and make inputs for it.

    Args:
        folder: holds ``config.json``, and the weights as safetensors; without weights they are random.
        batch: batch size of the inputs.
        seq: their number of tokens; None for 128, or as many as the model takes.
        target: the model is put on this device, when it names one of CUDA's.

    Returns:
        The model in evaluation mode, its keyword inputs, and what the user should know.

    Raises:
        SpecError: there is no config, no known architecture, no readable weights, or inputs cannot be made.
        TargetError: the device is not there.
    """
    if not (folder / "config.json").is_file():
        raise SpecError(
            f"{folder.name} holds no config.json",
            where=str(folder.absolute()),
            hint="name a directory written by model.save_pretrained(), or package.module:factory",
        )
    device = torch.device("cpu")
    if target.startswith("cuda"):
        device = Target.of(target, torch.device("cuda")).device
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: look-ups fail at once
    model, notes = _model(folder, _config(folder))
    model = model.eval().to(device)
    inputs: dict[str, Any] = {
        name: tensor.to(device) for name, tensor in _inputs(folder, model, batch, seq).items()
    }
    sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
    notes = (*notes, f"inputs were made: {sizes}")
    if model.config.is_encoder_decoder:
        inputs["use_cache"], notes = False, (*notes, "it returns no cache: use_cache=False")
    _try(folder, model, inputs, sizes)
    return model, inputs, notes


def _config(folder: Path) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _bad(folder, "config.json cannot be read", error) from error


def _model(folder: Path, config: Any) -> tuple[Any, tuple[str, ...]]:
    """The architecture that the config names, with the directory's weights or random ones."""
    import transformers

    names = config.architectures or []
    factory: Any = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if factory is None:
        raise SpecError(
            f"transformers {transformers.__version__} knows no architecture {names[0]!r}",
            where=str((folder / "config.json").absolute()),
            hint="install the version that has it, or name package.module:factory",
        )
    safe, pickled = (next((n for n in names if (folder / n).is_file()), None) for names in (_SAFE, _PICKLED))
    if pickled and not safe:
        raise SpecError(
            f"{folder.name} holds its weights as a pickle, {pickled}, which graphopt does not read",
            where=str(folder.absolute()),
            hint="write them as safetensors: model.save_pretrained(directory)",
        )
    try:
        if safe:
            return _with_weights(factory, folder)
        torch.manual_seed(0)
        build = factory.from_config if factory is transformers.AutoModel else factory._from_config
        return build(config), ("the directory holds no weights: they are random",)
    except Exception as error:
        raise _bad(folder, "the model cannot be loaded", error) from error


def _with_weights(factory: Any, folder: Path) -> tuple[Any, tuple[str, ...]]:
    model, loading = factory.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(loading["missing_keys"])
    if not missing:
        return model, ()
    return model, (f"{len(missing)} weights are not in the directory and are random, first: {missing[0]}",)


def _inputs(folder: Path, model: Any, batch: int, seq: int | None) -> dict[str, torch.Tensor]:
    """Random inputs of the kind that the model's main input is."""
    draw = torch.Generator().manual_seed(0)
    main, config = model.main_input_name, model.config
    if main == "pixel_values":
        height, width = _image_size(folder, config)
        channels = getattr(config, "num_channels", 3)
        return {main: torch.randn(batch, channels, height, width, generator=draw).to(model.dtype)}
    if main != "input_ids":
        raise SpecError(
            f"graphopt makes no inputs for {type(model).__name__}: its main input is {main!r}",
            where=str(folder.absolute()),
            hint="name package.module:factory, a callable that returns (model, args, kwargs)",
        )
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or sys.maxsize
    if seq is not None and seq > most:
        raise SpecError(
            f"{type(model).__name__} takes at most {most} tokens, not {seq}", hint=f"--seq {most}"
        )
    shape = (batch, seq or min(_SEQ, most))
    ids = torch.randint(text.vocab_size, shape, generator=draw)
    pad = getattr(text, "pad_token_id", None)
    if isinstance(pad, int):  # a padding token among the words would change the positions of some models
        ids[ids == pad] = (pad + 1) % text.vocab_size
    inputs = {main: ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.clone()
    return inputs


def _image_size(folder: Path, config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None)
    preprocessor = folder / "preprocessor_config.json"
    if size is None and preprocessor.is_file():
        known = json.loads(preprocessor.read_text())
        size = known.get("crop_size") or known.get("size")
    if isinstance(size, dict):
        size = [size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height or _IMAGE), int(width or _IMAGE)


def _try(folder: Path, model: torch.nn.Module, inputs: dict[str, Any], sizes: str) -> None:
    """Run the model once, so that inputs that do not fit are said here and not deep inside the capture."""
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        raise SpecError(
            f"{type(model).__name__} does not run on the inputs made for it ({sizes}): "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            where=str(folder.absolute()),
            hint="give sizes that it takes with --batch and --seq, or name package.module:factory",
        ) from error


def _bad(folder: Path, what: str, error: Exception) -> SpecError:
    line = str(error).strip().partition("\n")[0]
    return SpecError(
        f"{what}: {type(error).__name__}: {line}",
        where=str(folder.absolute()),
        hint="write the directory again with model.save_pretrained(), or see the traceback with --debug",
    )
