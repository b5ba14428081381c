"""The peers that graphopt is held against, each in its best honest mode, and how they are named."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import onnxruntime
import torch

from graphopt.bench.onnx_peers import onnxruntime_modes, tensorrt_provider
from graphopt.bench.openvino_peer import openvino_modes
from graphopt.bench.own_peers import graphopt_ort_modes
from graphopt.bench.peer import Mode, Peer, installed
from graphopt.bench.torch_peers import eager_modes, inductor_mode, inductor_modes, torch_tensorrt
from graphopt.errors import InputError


def _no_gpu(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a CUDA GPU"


def _no_onnxruntime(device: torch.device) -> str | None:
    if device.type == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this ONNX Runtime has no CUDA provider"
    return None


def _no_openvino(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "runs on the CPU only"
    return None if installed("openvino") else "not installed"


def _no_tensorrt(device: torch.device) -> str | None:
    return _no_gpu(device) or (None if _tensorrt_modes() else "not installed")


def _tensorrt_modes() -> list[Mode]:
    """Those whose packages are there."""
    modes = [Mode("torch_tensorrt", torch_tensorrt)] if installed("torch_tensorrt") else []
    if installed("tensorrt") and "TensorrtExecutionProvider" in onnxruntime.get_available_providers():
        modes.append(Mode("ONNX Runtime's provider", tensorrt_provider))
    return modes


def _one(mode: Mode) -> Sequence[Mode]:
    return (mode,)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("eager", eager_modes),
        Peer("inductor", inductor_modes),
        Peer("inductor-max", lambda problem: _one(inductor_mode("max-autotune"))),
        Peer("onnxruntime", onnxruntime_modes, "pip install onnxruntime-gpu", _no_onnxruntime),
        Peer("graphopt-ort", graphopt_ort_modes, "pip install onnxruntime-gpu", _no_onnxruntime),
        Peer("openvino", openvino_modes, "pip install openvino", _no_openvino),
        Peer(
            "tensorrt",
            lambda problem: _tensorrt_modes(),
            "pip install torch-tensorrt, or pip install tensorrt for ONNX Runtime's provider",
            _no_tensorrt,
        ),
    )
}


def named(text: str) -> list[str]:
    """The peers in a comma list, each once, in order.

    Raises:
        InputError: it has none, or one that does not exist.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise InputError(
            "--against names no peer", hint=f"a comma list of: {', '.join(PEERS)}; or leave it out"
        )
    for name in names:
        if name not in PEERS:
            near = difflib.get_close_matches(name, PEERS, cutoff=0.5)
            meant = f"did you mean {' or '.join(near)}? " if near else ""
            raise InputError(
                f"there is no peer {name!r}",
                where=f"--against {text}",
                hint=f"{meant}one of: {', '.join(PEERS)}",
            )
    return names
