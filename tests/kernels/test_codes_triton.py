"""The PTX that makes numbers of codes, which the interpreter does not run: an instruction at a time."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from graphopt.kernels import _codes_triton, _triton

pytestmark = pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")

BYTES = torch.arange(256, dtype=torch.uint8).view(-1, 4)


def ran(ptx: str, outputs: int, given: int) -> list[int]:
    """What registers of 32 bits hold at the end; the one behind the outputs is given."""
    registers = {f"${outputs}": given}

    def read(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in re.sub(r"[{}]|\.reg[^;]*;", "", ptx).split(";"):
        if not line.strip():
            continue
        instruction, operands = line.split(maxsplit=1)
        made, *sources = (operand.strip() for operand in operands.split(","))
        registers[made] = _INSTRUCTIONS[instruction](*map(read, sources))
    return [registers[f"${place}"] for place in range(outputs)]


def permuted(a: int, b: int, selector: int) -> int:
    """The bytes of two registers that the nibbles of a selector number, the last one first."""
    both = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    chosen = [selector >> 4 * place & 0xF for place in range(4)]
    assert max(chosen) < 8  # above that it repeats a sign
    return int.from_bytes(bytes(both[place] for place in chosen), "little")


_INSTRUCTIONS = {
    "shr.b32": lambda a, places: a >> places,
    "and.b32": lambda a, b: a & b,
    "prmt.b32": permuted,
}


def all_bytes(ptx: Any, outputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of all 256 bytes, four at a time, the first in the last bits as Triton packs them."""
    words = [int.from_bytes(bytes(four), "little") for four in BYTES.tolist()]
    made = [word.to_bytes(4, "little") for given in words for word in ran(str(ptx), outputs, given)]
    return torch.frombuffer(bytearray(b"".join(made)), dtype=dtype)


@pytest.mark.parametrize(
    ("shift", "mask", "first", "dtype", "added"),
    [
        (0, 0xFF, 0x64, torch.float16, 1024),
        (0, 0x0F, 0x64, torch.float16, 1024),
        (4, 0x0F, 0x64, torch.float16, 1024),
        (0, 0x0F, 0x43, torch.bfloat16, 128),
        (4, 0x0F, 0x43, torch.bfloat16, 128),
    ],
)
def test_codes_are_placed_in_numbers_of_16_bits(
    shift: int, mask: int, first: int, dtype: torch.dtype, added: int
) -> None:
    found = all_bytes(_codes_triton._placing(shift, mask, first), 2, dtype)
    assert torch.equal(found.double() - added, ((BYTES.flatten() >> shift) & mask).double())


def test_codes_are_placed_in_float32() -> None:
    found = all_bytes(_codes_triton._placing_in_float32(), 4, torch.float32)
    assert torch.equal(found.double() - 2**23, BYTES.flatten().double())
