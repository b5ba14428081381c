"""Whether OpenVINO is there, and what it is asked for."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace
from typing import get_args

from torch import fx

from graphopt.errors import InputError
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import argument
from graphopt.ir.tuning import tuned_for
from graphopt.kernels.block_quantized_linear import OP as BLOCK_QUANTIZED_LINEAR
from graphopt.kernels.dynamic_quantized_linear import OP as DYNAMIC_QUANTIZED_LINEAR
from graphopt.runtime.executors._protocol import Program
from graphopt.runtime.executors.openvino import reading
from graphopt.runtime.executors.openvino.program import OpenVinoProgram, Precision, Settings
from graphopt.runtime.executors.ort import Ort, inexpressible
from graphopt.runtime.executors.ort.providers import plugin_is_installed, torch_threads
from graphopt.runtime.lower_onnx import to_onnx
from graphopt.runtime.region import Region
from graphopt.runtime.target import Target

_LARGEST_GROUP = 256


@functools.cache
def problem() -> str | None:
    """Why OpenVINO itself does not run here; None when it does."""
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed (pip install 'graphopt[openvino]')"
    try:
        return None if "CPU" in reading.core().available_devices else "OpenVINO knows no CPU here"
    except Exception as error:  # the loader's, and OpenVINO's own
        return f"OpenVINO does not load: {reading.last_line(error)}"


def is_installed() -> bool:
    """True when OpenVINO or its plugin can be found; whether it loads is found out when it is asked for."""
    return importlib.util.find_spec("openvino") is not None or plugin_is_installed()


def _group(graph: Graph) -> int:
    """How many numbers of an input may get one step: as many as all products allow that quantize theirs.

    Small groups cost time: BERT-base at 1x128 in 8 bits takes 53 ms in groups of 32, 40 in groups of 128 and
    38 in those of 256, on two threads of a CPU with AVX-512 and VNNI (OpenVINO 2026.4).
    """
    return min(filter(None, map(_group_of, graph.calls)), default=0)


def _group_of(node: fx.Node) -> int:
    """The same of one call; 0 where it quantizes nothing that comes in."""
    if node.target is BLOCK_QUANTIZED_LINEAR.overload and argument(node, "rounds_input"):
        return int(argument(node, "weight").meta["val"].shape[2]) * 8 // int(argument(node, "bits"))
    if node.target is DYNAMIC_QUANTIZED_LINEAR.overload:
        features = int(argument(node, "weight").meta["val"].shape[1])
        return min(_LARGEST_GROUP, features & -features)  # which divides them
    return 0


class OpenVino:
    """Compiles regions with OpenVINO.

    Args:
        precision: that it computes in. "f32" is asked for, because OpenVINO takes bf16 by itself where the
            processor has it.

    Raises:
        InputError: the precision is unknown.
    """

    name = "openvino"

    def __init__(self, precision: Precision = "f32") -> None:
        if precision not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            raise InputError(f"OpenVINO's precision {precision!r} is unknown", hint=f"one of: {known}")
        self.precision = precision
        self._plugin = Ort()

    def absent(self, target: Target) -> str | None:
        """Why it cannot run on a target at all."""
        if target.device.type != "cpu":
            return f"OpenVINO runs on the CPU, the target is {target}"
        reason = problem()
        if reason is None or not plugin_is_installed():
            return reason
        return self._plugin.absent(self._through_plugin(target))

    def supports(self, node: fx.Node, target: Target) -> str | None:
        """Why OpenVINO cannot take a node: it is not there, or the node cannot be handed over as ONNX."""
        return self.absent(target) or inexpressible(node, target.device)

    def compile(self, region: Region, target: Target, effort: str) -> Program:
        """Export the region, and have it compiled.

        Raises:
            LoweringError: the region cannot be exported, or OpenVINO refuses it or takes no node of it.
        """
        settings = Settings(self.precision, torch_threads(target), _group(region.graph))
        if problem() is not None:
            return self._plugin.compile(region, self._through_plugin(target, settings), effort)
        with tuned_for("openvino"):
            model = to_onnx(region.graph)
        return OpenVinoProgram(region, model, settings)

    def _through_plugin(self, target: Target, settings: Settings | None = None) -> Target:
        options = {} if settings is None else settings.options
        return replace(target, ort=replace(target.ort, provider="openvino", provider_options=options))
