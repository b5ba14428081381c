"""The optimized model: a module that is called like the one that went in."""

from __future__ import annotations

from typing import Any, Literal

import torch

from graphopt.capture.outputs import Selection
from graphopt.errors import GraphoptError, InputError
from graphopt.ir.graph import Graph
from graphopt.observe.report import Report
from graphopt.runtime import scheduler
from graphopt.runtime.calling import CallingConvention
from graphopt.runtime.plan import Plan

OnMismatch = Literal["error", "fallback"]


class OptimizedModel(torch.nn.Module):
    """A plan behind the calling convention of the model that it was made from.

    It is made for inference: it runs without autograd, on the dtypes, devices and sizes that it was optimized
    for (dynamic dimensions may vary within their ranges).

    Args:
        graph: the captured graph.
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
