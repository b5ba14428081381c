"""Calls at sizes that models have, of every Triton kernel that is bound by memory.

The tests compile them for GPUs that are not there; ``python -m bench kernels`` measures them on one that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.ir.op import OPS, Cost, TritonFace
from graphopt.kernels import _aten
from graphopt.kernels._shape import nbytes

aten = torch.ops.aten
Tensor = torch.Tensor


@dataclass(frozen=True)
class Case:
    """One call.

    Args:
        kernel: of the op, or of the ATen call, whose face is launched.
        shape: what the sizes are, in words.
        make: the arguments, random, from a device and a dtype.
    """

    kernel: str
    shape: str
    make: Callable[[torch.device, torch.dtype], tuple[Any, ...]]

    @property
    def face(self) -> TritonFace:
        """The launcher that is measured."""
        found = _ATEN[self.kernel][1] if self.kernel in _ATEN else OPS[self.kernel].triton
        assert found is not None
        return found

    @property
    def reference(self) -> Callable[..., Any]:
        """The same in plain torch."""
        return _ATEN[self.kernel][0] if self.kernel in _ATEN else OPS[self.kernel].reference

    def reads_back(self, args: tuple[Any, ...]) -> str | None:
        """Why plain torch cannot be captured: it reads values on the host. None where it can."""
        reads = None if self.kernel in _ATEN else OPS[self.kernel].reads_back
        return None if reads is None else reads(*args)

    def cost(self, args: tuple[Any, ...]) -> Cost:
        """What the call must move at least; for ATen's, each input and the result once."""
        if self.kernel in _ATEN:
            result = self.reference(*(x.to("meta") if isinstance(x, Tensor) else x for x in args))
            return Cost(0.0, nbytes(*(x for x in args if isinstance(x, Tensor)), result))
        return OPS[self.kernel].cost(*args)


def _first_places(x: Tensor, size: int) -> Tensor:
    found: Tensor = aten.nonzero_static(x, size=size, fill_value=-1)
    return found


_ATEN: dict[str, tuple[Callable[..., Any], TritonFace]] = {
    overload.overloadpacket.__name__: (overload, _aten.FACES[overload])
    for overload in (
        *(aten.layer_norm.default, aten.softmax.int),
        *(aten.max_pool2d.default, aten.adaptive_avg_pool2d.default, aten.cat.default),
    )
}
_ATEN["nonzero_static"] = _first_places, _aten.FACES[aten.nonzero_static.default]


def cases() -> Iterator[Case]:
    """All of them, small sizes first."""
    yield from _norms()
    yield from _pointwise()
    yield from _pools()
    yield from _others()
    yield from _packing()


def _norms() -> Iterator[Case]:
    for rows, features in ((128, 768), (1024, 768), (12608, 768), (65536, 768), (16384, 4096)):

        def norm(device: torch.device, dtype: torch.dtype, size: tuple[int, int] = (rows, features)) -> Any:
            x = torch.randn(size, device=device).to(dtype)
            weight, bias = (torch.randn(size[1], device=device).to(dtype) for _ in range(2))
            return x, weight, bias

        def layer(*where: Any, norm: Any = norm) -> Any:
            x, weight, bias = norm(*where)
            return x, [x.shape[1]], weight, bias, 1e-12

        def add_layer(*where: Any, norm: Any = norm) -> Any:
            x, weight, bias = norm(*where)
            return x, norm(*where)[0], weight, bias, 1e-12

        def rms(*where: Any, norm: Any = norm) -> Any:
            return (*norm(*where)[:2], 1e-6)

        def add_rms(*where: Any, norm: Any = norm) -> Any:
            x, weight, _ = norm(*where)
            return x, norm(*where)[0], weight, 1e-6

        def sandwich(*where: Any, norm: Any = norm) -> Any:
            x, weight, next_weight = norm(*where)
            return x, norm(*where)[0], weight, next_weight, 1e-6, 1e-6

        of = f"{rows}x{features}"
        yield Case("layer_norm", of, layer)
        yield Case("add_layer_norm", of, add_layer)
        yield Case("rms_norm", of, rms)
        yield Case("add_rms_norm", of, add_rms)
        yield Case("add_layer_norm_quantize", of, add_layer)
        if rows in (1024, 16384):  # the same rows once more, and another order of sum and norm
            yield Case("layer_norm_add", of, add_layer)
            yield Case("rms_norm_add", of, add_rms)
            yield Case("sandwich_rms_norm", of, sandwich)


_UNIT = "%1 = norm(%0)\n%2 = maximum(%1, 1e-12)\n%3 = div(%0, %2)"
_SCORES = "%2 = mul(%0, 0.125)\n%3 = add(%2, %1)\n%4 = softmax(%3)"
_REDUCTIONS = (  # by name: sizes of the inputs, the program, and how many dimensions it reduces
    ("unit vectors", (32, 768), _UNIT, 1),
    ("unit vectors", (16384, 768), _UNIT, 1),
    ("softmax of scores", (16384, 512), _SCORES, 1),
    ("softmax of scores", (1024, 50257), _SCORES, 1),
    ("ReLU and mean of an image", (64, 512, 7, 7), "%1 = relu(%0, 1.0)\n%2 = mean(%1)", 2),
    ("sum of products", (1024, 65536), "%2 = mul(%0, %1)\n%3 = sum(%2)", 1),
)


def _pointwise() -> Iterator[Case]:
    def biased(rows: int, features: int) -> Callable[..., Any]:
        def make(device: torch.device, dtype: torch.dtype) -> Any:
            inputs = [torch.randn(size, device=device).to(dtype) for size in ((rows, features), (features,))]
            return inputs, "%2 = add(%0, %1)\n%3 = gelu(%2, 1.0)"

        return make

    def gated(rows: int, features: int) -> Callable[..., Any]:
        def make(device: torch.device, dtype: torch.dtype) -> Any:
            inputs = [torch.randn(rows, features, device=device).to(dtype) for _ in range(2)]
            return inputs, "%2 = silu(%0, 1.0)\n%3 = mul(%2, %1)"

        return make

    for rows in (128, 1024, 16384):
        yield Case("pointwise", f"bias and GELU, {rows}x3072", biased(rows, 3072))
    for rows in (1, 8192):
        yield Case("pointwise", f"SiLU gate, {rows}x14336", gated(rows, 14336))
    for label, size, program, dims in _REDUCTIONS:

        def reduced(
            device: torch.device,
            dtype: torch.dtype,
            size: Any = size,
            program: str = program,
            dims: int = dims,
        ) -> Any:
            inputs = [torch.randn(size, device=device).to(dtype) for _ in range(1 + ("%2 = " in program[:6]))]
            return inputs, program, dims

        yield Case("pointwise", f"{label}, {'x'.join(map(str, size))}", reduced)
    for rows in (257, 64 * 257):
        yield Case(
            "quick_gelu", f"{rows}x4096", lambda d, t, rows=rows: (torch.randn(rows, 4096, device=d).to(t),)
        )


def _pools() -> Iterator[Case]:
    """ResNet-50's two."""
    for batch in (1, 64):

        def images(
            size: tuple[int, ...], *rest: Any, batch: int = batch
        ) -> Callable[[torch.device, torch.dtype], Any]:
            def make(device: torch.device, dtype: torch.dtype) -> Any:
                x = torch.randn(batch, *size, device=device).to(dtype)
                return x.contiguous(memory_format=torch.channels_last), *rest

            return make

        yield Case("max_pool2d", f"{batch}x64x112x112 by 3x3", images((64, 112, 112), [3, 3], [2, 2], [1, 1]))
        yield Case("adaptive_avg_pool2d", f"{batch}x2048x7x7", images((2048, 7, 7), [1, 1]))


def _side_by_side() -> Iterator[Case]:
    def classed(device: torch.device, dtype: torch.dtype) -> Any:
        first, patches = (torch.randn(n, device=device).to(dtype) for n in ((1, 1, 768), (64, 196, 768)))
        return [first.expand(64, 1, 768), patches], 1

    def skipped(device: torch.device, dtype: torch.dtype) -> Any:
        images = (torch.randn(4, n, 64, 64, device=device).to(dtype) for n in (640, 320))
        return [x.contiguous(memory_format=torch.channels_last) for x in images], 1

    yield Case("cat", "64x1x768 and 64x196x768", classed)
    yield Case("cat", "4x640x64x64 and 4x320x64x64, channels last", skipped)


def _others() -> Iterator[Case]:
    yield from _side_by_side()
    for batch, length in ((1, 128), (32, 128), (64, 512)):

        def embedded(
            device: torch.device, dtype: torch.dtype, size: tuple[int, int] = (batch, length)
        ) -> Any:
            words, positions, types = (torch.randn(n, 768, device=device).to(dtype) for n in (30522, 512, 2))
            ids = torch.randint(30522, size, device=device)
            rest = (torch.arange(size[1], device=device)[None], positions, torch.zeros_like(ids), types)
            return ids, words, *rest, positions[0].clone(), positions[1].clone(), 1e-12

        yield Case("embedding_layer_norm", f"{batch}x{length}x768", embedded)

        def pooled(device: torch.device, dtype: torch.dtype, size: tuple[int, int] = (batch, length)) -> Any:
            mask = torch.rand(size, device=device) < 0.7
            return torch.randn(*size, 768, device=device).to(dtype), mask, 1e-9

        yield Case("masked_mean_pool", f"{batch}x{length}x768", pooled)
    for shape in ((12, 128, 128), (64, 12, 197, 197), (32, 12, 512, 512)):
        make = lambda d, t, shape=shape: (torch.randn(shape, device=d).to(t), -1)  # noqa: E731
        yield Case("softmax", "x".join(map(str, shape)), make)
    for size in ((1, 1, 32, 128), (1, 128, 32, 128), (4, 4096, 32, 128)):
        for interleaved in (False, True):

            def roped(
                device: torch.device, dtype: torch.dtype, size: Any = size, interleaved: bool = interleaved
            ) -> Any:
                cos, sin = (torch.rand(1, size[1], size[3] // 2, device=device).to(dtype) for _ in range(2))
                return torch.randn(size, device=device).to(dtype), cos, sin, interleaved

            yield Case("rope", "x".join(map(str, size)) + " interleaved" * interleaved, roped)
    for size in ((2, 1280, 16, 16), (2, 320, 64, 64), (4, 128, 512, 512)):

        def grouped(device: torch.device, dtype: torch.dtype, size: Any = size) -> Any:
            weight, bias = (torch.randn(size[1], device=device).to(dtype) for _ in range(2))
            return torch.randn(size, device=device).to(dtype), 32, weight, bias

        yield Case("group_norm_silu", "x".join(map(str, size)), grouped)


def _packing() -> Iterator[Case]:
    """A bucket of tokens of 32 sequences of up to 512, half of it filled."""
    batch, length, tokens = 32, 512, 8960

    def places(device: torch.device) -> Tensor:
        return torch.arange(tokens, device=device) * batch * length // tokens

    def packed(device: torch.device, dtype: torch.dtype) -> Any:
        return torch.randn(batch, length, 768, device=device).to(dtype), places(device)

    def packed_ids(device: torch.device, dtype: torch.dtype) -> Any:
        return torch.randint(30522, (batch, length), device=device), places(device)

    def unpacked(device: torch.device, dtype: torch.dtype) -> Any:
        mask = torch.rand(batch, length, device=device) < 0.54
        return torch.randn(1, tokens, 768, device=device).to(dtype), mask

    def found(device: torch.device, dtype: torch.dtype) -> Any:
        return torch.rand(batch * length, device=device) < 0.54, tokens

    of = f"{tokens} of {batch}x{length}"
    yield Case("pack_tokens", f"{of}x768", packed)
    yield Case("pack_tokens", f"{of} ids", packed_ids)
    yield Case("unpack_tokens", f"{of}x768", unpacked)
    yield Case("nonzero_static", of, found)
