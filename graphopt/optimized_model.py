"""The optimized model: a module that is called like the one that went in."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from graphopt.capture.outputs import Selection
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.errors import GraphoptError, InputError, OutputError
from graphopt.ir.graph import Graph
from graphopt.kernels._onnx import OPSET
from graphopt.observe.files import cannot_write, require_place
from graphopt.observe.report import Report
from graphopt.runtime import onnx_file, scheduler
from graphopt.runtime.calling import CallingConvention
from graphopt.runtime.export_onnx import Device, exported
from graphopt.runtime.plan import Plan
from graphopt.runtime.serving.batcher import Batcher
from graphopt.runtime.serving.layout import ONE_BUCKET, Buckets, Sizes, layout_of
from graphopt.runtime.serving.session import Face, Manners, Session

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
        self._counting = threading.Lock()  # any number of threads may call
        self._rewritten = rewritten
        self._calling = CallingConvention(graph, original.forward)
        self._sizes = Sizes.of(graph)
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
            with self._counting:
                self.fallbacks += 1
            with torch.no_grad():
                whole = self._fallback[0](*args, **kwargs)
            return whole if self._selection is None else self._selection.apply(whole)
        return self._calling.unflatten(scheduler.run(self.plan, tensors))

    def session(
        self,
        *,
        max_batch: int = 8,
        max_wait_ms: float = 2.0,
        queue_size: int = 1024,
        timeout_s: float | None = None,
        deadline_ms: float | None = None,
        buckets: Buckets = True,
        pad: Mapping[str, float] | None = None,
        batch: str | None = None,
        verify: int = 3,
    ) -> Session:
        """Serve many threads: what they ask for runs in batches.

        The model needs a dynamic batch dimension; without one, or where rows turn out to depend on each
        other, requests run one by one, and ``session.remarks`` says so.

        Args:
            max_batch: rows of a batch, at most.
            max_wait_ms: how long a request waits for others to share its batch with.
            queue_size: requests that wait, at most.
            timeout_s: seconds to wait for room in the queue; 0 raises QueueFullError at once, None waits.
            deadline_ms: after so long a request of which the turn has not come is given up.
            buckets: requests whose dynamic lengths fall between the same two edges are padded to share a
                batch: True for edges at 16, 32, 64, ...; False pads nothing; ``(32, 128)`` or
                ``{"seq": (32, 128)}`` are edges.
            pad: what padding is made of, by input; 0 where it is not named.
            batch: the name of the batch dimension; by default the one called "batch", or else the only one
                that comes first in every input.
            verify: how many batches are also run one by one, to prove that neither sharing a batch nor
                padding changes a result; what does is given up.

        Raises:
            InputError: an argument is out of its range, or names what is not there.
        """
        for name, value, least in (
            ("max_batch", max_batch, 1),
            ("max_wait_ms", max_wait_ms, 0),
            ("queue_size", queue_size, 1),
            ("verify", verify, 0),
        ):
            if not value >= least:
                raise InputError(f"{name}={value} is too small", hint=f"{least} or above")
        on_gpu = self.plan.device.type == "cuda"  # whose graphs are those of a shape, padding included
        if buckets is True and self.plan.padded is not None and not on_gpu:
            buckets = ONE_BUCKET
        batcher = Batcher(
            lambda tensors: scheduler.run(self.plan, tensors),
            layout_of(self._sizes, batch, buckets, pad or {}),
            self._calling.check_relations,
            floor_ulps=2 * MODEL_FLOOR_ULPS,  # either of two runs may err so much, in opposite directions
            verify=verify,
            to_bucket=on_gpu,
            max_batch=max_batch,
        )
        face = Face(self._calling.flatten, self._calling.unflatten, self.plan.device)
        manners = Manners("", 0, deadline_ms, timeout_s)
        return Session(batcher, face, max_wait_ms=max_wait_ms, queue_size=queue_size, manners=manners)

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
            opset: of ONNX's own operators, 18 to 24.
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
