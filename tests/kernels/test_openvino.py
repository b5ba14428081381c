"""Every op as OpenVINO runs it: what it takes it computes right, and what it refuses is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree

from graphopt.capture.export import capture_any
from graphopt.compiler.lossy import relative_distance
from graphopt.compiler.remarks import Remarks
from graphopt.errors import LoweringError
from graphopt.ir.op import Op
from graphopt.kernels._activations import TORCH
from graphopt.runtime import scheduler
from graphopt.runtime.executors.openvino import OpenVino
from graphopt.runtime.executors.openvino.executor import problem
from graphopt.runtime.partition import partition
from graphopt.runtime.target import Target
from tests.kernels.test_ops import KERNEL_OPS, assert_right, outputs, samples, tensors

HOST = Target(torch.device("cpu"))
FLOAT8 = {"quantize_rows", "add_layer_norm_quantize", "float8_linear"}  # which crosses no border of ours


class Calls(torch.nn.Module):
    """An op called once for each of its samples; codes of weights are constants, as OpenVINO wants them."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op
        self.codes = torch.nn.ParameterList(
            torch.nn.Parameter(x, requires_grad=False)
            for sample in samples(op.name)
            for x in tensors(sample)
            if is_weight(x)
        )

    def forward(self, *given: torch.Tensor) -> Any:
        left, codes, results = iter(given), iter(self.codes), []
        for sample in samples(self.op.name):
            args, kwargs = pytree.tree_map_only(
                torch.Tensor, lambda x: next(codes if is_weight(x) else left), (sample.args, sample.kwargs)
            )
            found = self.op.overload(*args, **kwargs)
            results += list(found) if isinstance(found, tuple | list) else [found]
        return results


def is_weight(x: torch.Tensor) -> bool:
    return x.dtype in (torch.int8, torch.uint8)


def product(
    x: Any, weight: Any, scale: Any, bias: Any = None, kind: str = "none", parameter: float = 1.0
) -> Any:
    """Of ``dynamic_quantized_linear``, x as it is."""
    return TORCH[kind](F.linear(x, weight * scale[:, None], bias), parameter)


# What OpenVINO quantizes by itself, in other steps or not at all: with no larger an error than the op.
UNROUNDED = {"dynamic_quantized_linear": product}


@pytest.mark.parametrize("op", KERNEL_OPS, ids=lambda op: op.name)
def test_an_op_in_openvino(op: Op) -> None:
    if reason := problem():
        pytest.skip(reason)
    given = [x.clone() for sample in samples(op.name) for x in tensors(sample) if not is_weight(x)]
    graph, inputs = capture_any(Calls(op).eval(), tuple(given), None, dynamic=None)
    if op.name in FLOAT8:
        with pytest.raises(LoweringError, match=r"torch\.float8_e4m3fn cannot be bound"):
            partition(graph, [OpenVino()], HOST, Remarks())
        return
    plan = partition(graph, [OpenVino()], HOST, Remarks())
    found = iter(scheduler.run(plan, inputs))
    exact = UNROUNDED.get(op.name)
    for sample in samples(op.name):
        given = [next(found) for _ in outputs(op.reference, sample)]
        if exact is None:
            assert_right(op, sample, given)
        else:
            ours, theirs = (
                relative_distance([exact(*sample.args)], [one])
                for one in (op.reference(*sample.args), given[0])
            )
            assert theirs <= 2 * ours
