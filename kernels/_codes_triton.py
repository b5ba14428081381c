"""Codes of 4 and 8 bits as numbers of half precision in registers: exactly, and by no converting instruction.

Those have a fraction of the rate of others on a GPU. A code is put into the last bits of a number instead,
whose other bits make it so large that these count ones, and a subtraction takes away what that added: 1024 in
float16, which has ten bits for it, 128 in bfloat16, which has seven, and 2 ** 23 in float32. Four codes come
out of one register at a time.
"""

from __future__ import annotations

from graphopt.kernels._triton import INTERPRETED, compile_time, constant, jit, tl

_INTERPRETED = constant(INTERPRETED)


@compile_time
def _placing(shift: int, mask: int, first: int) -> str:
    """PTX that takes some bits of each of four bytes, and puts another byte in front."""
    chosen = f"shr.b32 t, $2, {shift}; and.b32 t, t, {mask * 0x01010101:#x};"
    placed = (
        f"prmt.b32 ${out}, t, {first * 0x01010101:#x}, {order:#x};"
        for out, order in ((0, 0x4140), (1, 0x4342))
    )
    return f"{{ .reg .b32 t; {chosen} {' '.join(placed)} }}"


@compile_time
def _placing_in_float32() -> str:
    """PTX that makes the last byte of a float32 from 2 ** 23 on of each of four bytes."""
    return " ".join(f"prmt.b32 ${out}, $4, 0x4b000000, {0x7650 + out:#x};" for out in range(4))


@jit
def _placed(codes, SHIFT: tl.constexpr, MASK: tl.constexpr, FIRST: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some bits of uint8 codes as the last ones of numbers of 16 bits whose first byte is given."""
    if _INTERPRETED:
        bits = ((codes >> SHIFT) & MASK).to(tl.uint16) | (FIRST << 8)
    else:
        bits = tl.inline_asm_elementwise(
            _placing(SHIFT, MASK, FIRST), "=r,=r,r", [codes], dtype=tl.uint16, is_pure=True, pack=4
        )
    return bits.to(dtype, bitcast=True)


@jit
def _in_float32(codes):  # type: ignore[no-untyped-def]
    """2 ** 23 and uint8 codes."""
    if _INTERPRETED:
        bits = codes.to(tl.uint32) | 0x4B000000
    else:
        bits = tl.inline_asm_elementwise(
            _placing_in_float32(), "=r,=r,=r,=r,r", [codes], dtype=tl.uint32, is_pure=True, pack=4
        )
    return bits.to(tl.float32, bitcast=True)


@jit
def widened(codes, zero, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """int8 or uint8 codes less zero points, whole numbers of any type that broadcast to them."""
    zero = zero.to(tl.float32)
    if codes.dtype == tl.int8:
        codes = codes.to(tl.uint8, bitcast=True) ^ 0x80
        zero += 128.0
    if dtype == tl.float16:
        numbers = _placed(codes, 0, 0xFF, 0x64, dtype) - (zero + 1024.0).to(dtype)
    else:
        numbers = (_in_float32(codes) - (zero + 8388608.0)).to(dtype)
    return numbers


@jit
def nibbles(codes, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The low and the high half of each byte, less 8."""
    if dtype == tl.float16:
        low = _placed(codes, 0, 0x0F, 0x64, dtype) - 1032.0
        high = _placed(codes, 4, 0x0F, 0x64, dtype) - 1032.0
    elif dtype == tl.bfloat16 and not _INTERPRETED:
        low = _placed(codes, 0, 0x0F, 0x43, dtype) - 136.0
        high = _placed(codes, 4, 0x0F, 0x43, dtype) - 136.0
    else:  # the interpreter has no arithmetic of bfloat16
        eight = tl.full([1] * len(codes.shape), 8, tl.uint8)
        low = widened(codes & 0x0F, eight, dtype)
        high = widened(codes >> 4, eight, dtype)
    return low, high
