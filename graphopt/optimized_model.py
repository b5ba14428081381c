"""The optimized model: a module that is called like the one that went in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from graphopt.capture.outputs import Selection
from graphopt.errors import GraphoptError, InputError, OutputError
from graphopt.ir.graph import Graph
from graphopt.kernels._onnx import OPSET
from graphopt.observe.files import cannot_write, require_place
from graphopt.observe.report import Report
from graphopt.runtime import onnx_file, scheduler
from graphopt.runtime.calling import CallingConvention
from graphopt.runtime.export_onnx import Device, exported
from graphopt.runtime.plan import Plan

OnMismatch = Literal["error", "fallback"]


class OptimizedModel(torch.nn.Module):
    """A plan behind the calling convention of the model that it was made from.

    It is made for inference: it runs without autograd, on the dtypes, devices and sizes that it was optimized
    for (dynamic dimensions may vary within their ranges).

    Args:
        graph: the captured graph.
        rewritten: the graph after the passes, whatever the plan runs.
        plan: what runs.
        report: what was done, measured and remarked.
        original: the model that went in.
        on_mismatch: what a call that does not fit does: raise, or run the original.
        selection: which of the original's outputs are kept; None is all.

    Attributes:
        plan: what runs.
        report: what was done, measured and remarked.
        fallbacks: how many calls the original has served.
    """

    def __init__(
        self,
        graph: Graph,
        rewritten: Graph,
        plan: Plan,
        report: Report,
        original: torch.nn.Module,
        on_mismatch: OnMismatch = "error",
        selection: Selection | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.report = report
        self.fallbacks = 0
        self._rewritten = rewritten
        self._calling = CallingConvention(graph, original.forward)
        # in a tuple, so that the original is no submodule: its parameters are not this module's
        self._fallback = (original,) if on_mismatch == "fallback" else ()
        self._selection = selection
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plan.

        Args:
            args: as for the original model.
            kwargs: likewise; their order does not matter.

        Returns:
            The original's output type.

        Raises:
            InputError: the inputs are not what the model was optimized for, and ``on_mismatch="error"``.
        """
        try:
            tensors = self._calling.flatten(args, kwargs)
        except InputError:
            if not self._fallback:
                raise
            self.fallbacks += 1
            with torch.no_grad():
                whole = self._fallback[0](*args, **kwargs)
            return whole if self._selection is None else self._selection.apply(whole)
        return self._calling.unflatten(scheduler.run(self.plan, tensors))

    def export_onnx(
        self,
        path: str | Path,
        portable: bool = False,
        *,
        device: Device | None = None,
        opset: int = OPSET,
        external_above: int = onnx_file.LARGEST,
    ) -> None:
        """Write the rewritten model as one ONNX model, which plain ONNX Runtime runs.

        It is the whole model, whichever executors were chosen here. Inputs, outputs and dynamic dimensions
        have the user's names: ``logits``, ``past_key_values.0.1``, ``output`` for the only one, ``output_0``
        for the first of a tuple. Each node's ``metadata_props`` tell the module and the source line that it
        comes from, those of the model the structure of inputs and outputs. What does not depend on the inputs
        is not checked: assertions are left out.

        The file appears when it is whole, or not at all: a failure leaves what was there before.

        Args:
            path: of the file; its folder must exist.
            portable: use operators of ONNX's own only, none of ONNX Runtime's ``com.microsoft``.
            device: ``"cpu"`` or ``"cuda"``: whose kernels the fused nodes are chosen for; None is the device
                that the model was optimized for. Some of CUDA's have no counterpart on the CPU.
            opset: of ONNX's own operators, 18 to 23.
            external_above: bytes that the file may have, 2 GiB at most. The weights of a larger model go into
                ``NAME.<digest>.data`` beside it, which must be moved with it.

        Raises:
            InputError: ``device`` or ``opset`` is unknown.
            LoweringError: a node cannot be expressed; it is named, with its line.
            OutputError: the file cannot be written.
        """
        place = require_place(path, "model.onnx")
        if place.exists() and not place.is_file():
            raise OutputError(f"{path} is not a file", hint="name a file that may be replaced")
        where: Any = device or self.plan.device.type
        model = exported(self._rewritten, where, portable, opset)
        try:
            onnx_file.save(model, place, external_above)
        except OSError as error:
            raise cannot_write(place, error) from error

    def train(self, mode: bool = True) -> OptimizedModel:
        """Only evaluation mode exists.

        Raises:
            GraphoptError: ``mode`` is True.
        """
        if mode:
            raise GraphoptError(
                "an optimized model cannot be trained", hint="train the original, and optimize it again"
            )
        return self
