"""Ops on half-precision inputs whose weights or tables are float32: right in torch and in ONNX Runtime."""

from __future__ import annotations

import pytest
import torch

from graphopt.kernels import (
    add_layer_norm,
    add_rms_norm,
    layer_norm_add,
    rms_norm,
    rms_norm_add,
    rope,
    sandwich_rms_norm,
)
from tests._models import randn
from tests.kernels.test_ops import Calls, Sample, assert_right, outputs, run_onnx, to_onnx

X, R, W = randn(2, 5, 24), randn(2, 5, 24, seed=1), randn(24, seed=2)
TABLES = randn(1, 5, 4), randn(1, 5, 4, seed=1)
MIXED = {
    "rms_norm": lambda dtype: (rms_norm.OP, (X.to(dtype), W, 1e-6)),
    "add_rms_norm": lambda dtype: (add_rms_norm.OP, (X.to(dtype), R.to(dtype), W, 1e-6)),
    "rms_norm_add": lambda dtype: (rms_norm_add.OP, (X.to(dtype), R.to(dtype), W, 1e-6)),
    "sandwich_rms_norm": lambda dtype: (
        sandwich_rms_norm.OP,
        (X.to(dtype), R.to(dtype), W, 1 + W, 1e-6, 1e-6),
    ),
    "rope": lambda dtype: (rope.OP, (randn(2, 5, 3, 8).to(dtype), *TABLES)),
    "partial rope": lambda dtype: (rope.OP, (randn(2, 5, 3, 10).to(dtype), *TABLES, True)),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_have_the_type_of_x(name: str, dtype: torch.dtype) -> None:
    op, args = MIXED[name](dtype)
    found = outputs(op, Sample(args))
    assert {x.dtype for x in found} == {dtype}
    assert_right(op, Sample(args), found, torch_is_the_measure=False)


@pytest.mark.parametrize("name", MIXED)
def test_onnx_runtime_agrees(name: str) -> None:
    op, args = MIXED[name](torch.float16)
    sample = Sample(args)
    inputs = [x for x in args if isinstance(x, torch.Tensor)]
    program = torch.export.export(Calls(op, [sample]), tuple(inputs), strict=False)
    assert_right(op, sample, run_onnx(to_onnx(program), inputs))


WITH_BIAS = W, randn(24, seed=3), 1e-5
SUMS = {
    "layer norm of a float32 stream": lambda half: (add_layer_norm.OP, (X, R.to(half), *WITH_BIAS)),
    "layer norm of a branch": lambda half: (
        add_layer_norm.OP,
        (X.to(half), R, W.to(half), WITH_BIAS[1].to(half), 1e-5),
    ),
    "layer norm without weights": lambda half: (add_layer_norm.OP, (X.to(half), R[:1], None, None, 1e-5)),
    "rms norm of a float32 stream": lambda half: (add_rms_norm.OP, (X, R.to(half), W, 1e-6)),
    "rms norm of a branch": lambda half: (add_rms_norm.OP, (X.to(half), R, W.to(half), 1e-6)),
    "rms norm without weight": lambda half: (add_rms_norm.OP, (X.to(half), R[:1], None, 1e-6)),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_kept_in_float32(name: str, dtype: torch.dtype) -> None:
    op, args = SUMS[name](dtype)
    normed, total = outputs(op, Sample(args))
    assert (normed.dtype, total.dtype) == (args[0].dtype, torch.float32)
    assert torch.equal(total, args[0].float() + args[1].float())
    assert_right(op, Sample(args), [normed, total], torch_is_the_measure=False)


@pytest.mark.parametrize("name", SUMS)
def test_onnx_runtime_agrees_on_sums(name: str) -> None:
    op, args = SUMS[name](torch.float16)
    sample = Sample(args)
    inputs = [x for x in args if isinstance(x, torch.Tensor)]
    program = torch.export.export(Calls(op, [sample]), tuple(inputs), strict=False)
    assert_right(op, sample, run_onnx(to_onnx(program), inputs))


STREAMS = {
    "rms norm of a branch": lambda half: (rms_norm_add.OP, (X.to(half), R, W, 1e-6)),
    "rms norm of a float32 branch": lambda half: (rms_norm_add.OP, (X, R[:1].to(half), None, 1e-6)),
    "layer norm of a branch": lambda half: (
        layer_norm_add.OP,
        (X.to(half), R, W.to(half), WITH_BIAS[1].to(half), 1e-5),
    ),
    "layer norm of a float32 branch": lambda half: (layer_norm_add.OP, (X, R.to(half), *WITH_BIAS)),
    "sandwich of a branch": lambda half: (sandwich_rms_norm.OP, (X.to(half), R, W, W.to(half), 1e-6, 1e-6)),
    "sandwich of a float32 branch": lambda half: (
        sandwich_rms_norm.OP,
        (X, R.to(half), None, W, 1e-6, 1e-6),
    ),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_streams_are_kept_in_float32(name: str, dtype: torch.dtype) -> None:
    op, args = STREAMS[name](dtype)
    found = outputs(op, Sample(args))
    assert found[-1].dtype == torch.float32
    assert found[0].dtype == (args[0].dtype if len(found) == 2 else torch.float32)
    exact = outputs(op.reference, Sample([x.double() if isinstance(x, torch.Tensor) else x for x in args]))
    for mine, truth in zip(found, exact, strict=True):  # the norm itself is rounded to the type of x
        assert (mine - truth).abs().max() <= 8 * torch.finfo(args[0].dtype).eps * truth.abs().max()


@pytest.mark.parametrize("name", STREAMS)
def test_onnx_runtime_agrees_on_streams(name: str) -> None:
    op, args = STREAMS[name](torch.float16)
    sample = Sample(args)
    inputs = [x for x in args if isinstance(x, torch.Tensor)]
    program = torch.export.export(Calls(op, [sample]), tuple(inputs), strict=False)
    assert_right(op, sample, run_onnx(to_onnx(program), inputs))
