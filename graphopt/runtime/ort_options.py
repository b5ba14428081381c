"""What a user may say about the sessions of ONNX Runtime: threads, its own rewrites, memory, providers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graphopt.errors import InputError

OPTIMIZATIONS = ("none", "basic", "extended", "all")

Setting = str | int | float | bool


@dataclass(frozen=True)
class OrtOptions:
    """How the executors that are built on ONNX Runtime open their sessions; a part of a ``Target``.

        target = graphopt.Target(torch.device("cpu"), ort=graphopt.OrtOptions(intra_op_threads=4))
        graphopt.optimize(model, args, target=target)

    Args:
        intra_op_threads: threads that share one node; None for as many as PyTorch uses.
        inter_op_threads: how many nodes may run at once; 1 runs them in order.
        graph_optimization: what ONNX Runtime rewrites by itself: "none", "basic", "extended" or "all".
        arena: keep the memory of one call for the next; False gives it back, and takes longer.
        provider: the provider of the ``ort`` executor, without its "ExecutionProvider" and in any case:
            "tensorrt", "dnnl", "coreml"; "openvino" is the plugin that is installed beside ONNX Runtime.
            None takes the device's own, "cpu" or "cuda".
        provider_options: for that provider, by the names of its documentation.
        session_config: further entries for the session, such as ``{"session.use_env_allocators": "1"}``.

    Raises:
        InputError: an option is not one of those, or out of range.
    """

    intra_op_threads: int | None = None
    inter_op_threads: int = 1
    graph_optimization: str = "all"
    arena: bool = True
    provider: str | None = None
    provider_options: Mapping[str, Setting] = field(default_factory=dict, hash=False)
    session_config: Mapping[str, Setting] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.intra_op_threads is not None:
            _require_count("intra_op_threads", self.intra_op_threads)
        _require_count("inter_op_threads", self.inter_op_threads)
        if self.graph_optimization not in OPTIMIZATIONS:
            known = ", ".join(OPTIMIZATIONS)
            raise InputError(
                f"graph_optimization={self.graph_optimization!r} is unknown", hint=f"one of: {known}"
            )
        if not isinstance(self.arena, bool):
            raise InputError(f"arena={self.arena!r} is neither True nor False")
        if self.provider is not None and not (isinstance(self.provider, str) and self.provider):
            raise InputError(f"provider={self.provider!r} is no name", hint="such as 'tensorrt'")
        for name in ("provider_options", "session_config"):
            object.__setattr__(self, name, _as_text(name, getattr(self, name)))


def _require_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}={value!r} is no number of threads", hint="1 or more")


def _as_text(name: str, options: Any) -> dict[str, str]:
    """Options as ONNX Runtime takes them: text by name, flags as 1 and 0."""
    if not isinstance(options, Mapping):
        raise InputError(f"{name} is {type(options).__name__}, not a mapping of names to values")
    made = {}
    for key, value in options.items():
        if not isinstance(key, str) or not isinstance(value, Setting):
            raise InputError(f"{name} holds {key!r}: {value!r}", hint="names to text, numbers or flags")
        made[key] = str(int(value)) if isinstance(value, bool) else str(value)
    return made
