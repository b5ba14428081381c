"""What can run a node on a GPU: Triton kernels, epilogues of cuBLASLt and cuDNN, attention backends, ATen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphopt.compiler.evaluate import concrete
from graphopt.errors import said
from graphopt.ir.op import TritonFace, op_of
from graphopt.kernels import (
    add_layer_norm,
    attention,
    conv_activation,
    float8_linear,
    linear_activation,
    linear_add_layer_norm,
)
from graphopt.kernels._activations import TORCH
from graphopt.kernels._aten import triton_face
from graphopt.kernels._conv_triton import convolve_as_product, is_product
from graphopt.kernels.grouped_gated_mlp import has_grouped_product

aten = torch.ops.aten

Run = Callable[..., Any]


@dataclass(frozen=True)
class Implementation:
    """One way to run a node.

    Args:
        name: "triton", "triton product", "cublaslt", "cublas + triton", "cudnn", "flash", "efficient",
            "aten".
        run: takes what the node's target takes.
        reads_back: why no CUDA graph can hold it: it reads values on the host. None where one can.
    """

    name: str
    run: Run
    reads_back: str | None = None


def implementations(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Implementation], dict[str, str]]:
    """The ways to run a call, in the order of preference where nothing is measured, ATen last.

    Args:
        target: what the node calls.
        args: real or fake.
        kwargs: likewise.

    Returns:
        The ways, and by name why others cannot take the arguments.
    """
    ways: list[Implementation] = []
    refused: dict[str, str] = {}
    empty = any(isinstance(x, torch.Tensor) and x.numel() == 0 for x in (*args, *kwargs.values()))
    face = None if empty else triton_face(target)
    if face is not None:
        reason = _refusal(face, args, kwargs)
        if reason is None:
            ways.append(Implementation("triton", face.launch))
        else:
            refused["triton"] = reason
    if not empty:
        ways += [Implementation(name, run) for name, run in _library(target, args, kwargs)]
    op = op_of(target)
    run = target if op is None else op.reference
    ways.append(Implementation("aten", run, _why_read_back(target, args, kwargs)))
    return ways, refused


def untraceable(node: fx.Node, device: torch.device) -> str | None:
    """Why no compiler can trace what one of graphopt's ops stands for, in words, or None.

    Args:
        node: a call.
        device: that it is to run on.
    """
    op = op_of(node.target)
    if op is None or op.reads_back is None:
        return None
    with FakeTensorMode():
        args, kwargs = _without_data(node, device)
        return op.reads_back(*args, **kwargs)


def reads_back(node: fx.Node, device: torch.device) -> str | None:
    """Why a call reads values on the host, whatever runs it; arguments as above."""
    op = op_of(node.target)
    if not (_is_grouped_product(node.target) if op is None else op.reads_back):
        return None
    with FakeTensorMode():
        ways, _ = implementations(node.target, *_without_data(node, device))
    return ways[-1].reads_back if all(way.reads_back for way in ways) else None


def _without_data(node: fx.Node, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments as fake tensors; sizes that vary count as they were captured, so none is guarded."""
    found: Any = fx.map_arg((node.args, node.kwargs), lambda n: concrete(n.meta["val"], str(device)))
    return found  # type: ignore[no-any-return]


def _why_read_back(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    op = op_of(target)
    if op is not None:
        return None if op.reads_back is None else op.reads_back(*args, **kwargs)
    if not _is_grouped_product(target):
        return None
    offsets = args[2] if len(args) > 2 else kwargs.get("offs")
    if offsets is None or (target is aten._grouped_mm.default and has_grouped_product(*args[:2])):
        return None
    return f"in {args[0].dtype} a product of rows in groups reads their ends on the host"


def _is_grouped_product(target: Any) -> bool:
    """Whether it is a product of rows in groups: PyTorch's, or that of transformers, where it is imported."""
    return target is aten._grouped_mm.default or str(target) == "transformers.grouped_mm_fallback.default"


def _refusal(face: TritonFace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    try:
        return face.refuses(*args, **kwargs)
    except TypeError as error:  # an argument that the op does not have
        return said(error)


def _library(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Run]]:
    """What there is between an op's own kernel and what ATen chooses by itself: NVIDIA's libraries mostly."""
    if target is linear_activation.OP.overload:
        if _epilogue_fits(*args, **kwargs):
            yield "cublaslt", _linear_epilogue
    elif target is linear_add_layer_norm.OP.overload:
        if _norm_fits(*args):
            yield "cublas + triton", _linear_then_norm
    elif target is float8_linear.OP.overload:
        if _scaled_fits(*args, **kwargs):
            yield "cublaslt", _scaled_product
    elif target in (conv_activation.OP.overload, aten.conv2d.default):
        if is_product(*args, **kwargs):
            yield "triton product", convolve_as_product
        if _convolution_fits(*args, **kwargs):
            yield "cudnn", _convolution_relu
    elif target is attention.OP.overload:
        for name, backend in _BACKENDS.items():
            yield name, _with_backend(attention.OP.reference, backend)
    elif target is aten.scaled_dot_product_attention.default:
        for name, backend in _BACKENDS.items():
            yield name, _with_backend(F.scaled_dot_product_attention, backend)


_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def _with_backend(run: Run, backend: SDPBackend) -> Run:
    def attend(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(backend):
            return run(*args, **kwargs)

    return attend


def _epilogue_fits(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> bool:
    """A bias and then relu or the tanh form of GELU are what cuBLASLt adds; it has no exact GELU."""
    return bias is not None and residual is None and activation in ("relu", "gelu_tanh")


def _linear_epilogue(
    x: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor,
    activation: str = "none",
    parameter: float = 1.0,
    residual: None = None,
) -> torch.Tensor:
    x_MK = x.reshape(-1, x.shape[-1])
    out_MN: torch.Tensor = aten._addmm_activation(
        bias_N, x_MK, weight_NK.t(), use_gelu=activation == "gelu_tanh"
    )
    return out_MN.view(*x.shape[:-1], weight_NK.shape[0])


def _norm_fits(x: torch.Tensor, weight: torch.Tensor, bias: Any, residual: torch.Tensor, *norm: Any) -> bool:
    face = add_layer_norm.OP.triton
    return face is not None and face.refuses(residual, residual, *norm) is None


def _linear_then_norm(
    x: torch.Tensor,
    weight_DK: torch.Tensor,
    bias_D: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight_D: torch.Tensor | None,
    norm_bias_D: torch.Tensor | None,
    eps: float,
) -> Any:
    face = add_layer_norm.OP.triton
    assert face is not None
    return face.launch(F.linear(x, weight_DK, bias_D), residual, norm_weight_D, norm_bias_D, eps)


def _scaled_fits(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
) -> bool:
    """CuBLASLt scales rows in float32, wants sizes of whole 16 bytes, and a bias of the result's own type."""
    sizes = not any(size % 16 for size in weight.shape) and codes.is_cuda
    scales = scale.dtype == weight_scale.dtype == torch.float32
    return sizes and scales and dtype in _HALF and (bias is None or bias.dtype == dtype)


_HALF = (torch.float16, torch.bfloat16)


def _scaled_product(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight_NK: torch.Tensor,
    weight_scale_N: torch.Tensor,
    dtype: torch.dtype,
    bias_N: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
) -> torch.Tensor:
    """The second factor is the weight transposed, column by column in memory as cuBLASLt wants it."""
    codes_MK = codes.reshape(-1, codes.shape[-1])
    scales = scale.reshape(-1, 1), weight_scale_N.unsqueeze(0)
    out_MN = torch._scaled_mm(codes_MK, weight_NK.t(), *scales, bias=bias_N, out_dtype=dtype)
    return TORCH[activation](out_MN, parameter).view(*codes.shape[:-1], weight_NK.shape[0])


def _convolution_fits(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> bool:
    """Fused convolutions of cuDNN end in a relu; PyTorch hands over those of images."""
    return activation == "relu" and x.dim() == 4 and bias is not None


def _convolution_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    activation: str = "relu",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    where = stride, padding, dilation, groups
    if residual is None:
        out: torch.Tensor = aten.cudnn_convolution_relu(x, weight, bias, *where)
    else:
        out = aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *where)
    return out
