from __future__ import annotations

import pytest
import torch

from graphopt.passes.merge_casts import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(3, 4)


def test_a_round_trip_through_a_wider_type() -> None:
    def forward(m, x):
        return x.float().half().sin()

    run(PASS, program(forward), X.half()).becomes(
        before="""
            %0 = to(x, float32)
            %1 = to(%0, float16)
            %2 = sin(%1)
            return %2
        """,
        expected="""
            %0 = sin(x)
            return %0
        """,
    )


def test_widening_twice() -> None:
    def forward(m, x):
        return x.float().double()

    run(PASS, program(forward), X.bfloat16()).becomes("""
        %0 = to(x, float64)
        return %0
    """)


MERGED = {
    "widened, then narrowed": (torch.float32, torch.float64, torch.float16),
    "half types": (torch.float16, torch.float32, torch.bfloat16),
    "a mask": (torch.bool, torch.int64, torch.float32),
    "a mask and back": (torch.bool, torch.float16, torch.bool),
    "whole numbers": (torch.int8, torch.float16, torch.float32),
    "whole numbers and back": (torch.int32, torch.float64, torch.int32),
    "lowest bits": (torch.int64, torch.int32, torch.int8),
    "to a mask": (torch.float16, torch.float32, torch.bool),
}


def each(kinds):
    def forward(m, *xs):
        return [x.to(between).to(last) for x, (_, between, last) in zip(xs, kinds, strict=True)]

    return program(forward), [(4 * X).to(first) for first, *_ in kinds]


def test_every_cast_that_keeps_all_values() -> None:
    model, inputs = each(MERGED.values())
    ran = run(PASS, model, *inputs)
    assert ran.kept == {"merge_casts": len(MERGED)}


def test_type_as_and_a_transpose_between() -> None:
    def forward(m, x):
        return x.float().transpose(0, 1).reshape(2, 6).type_as(x)

    run(PASS, program(forward), X.half()).becomes("""
        %0 = transpose(x, 0, 1)
        %1 = reshape(%0, [2, 6])
        return %1
    """)


def test_the_wide_value_is_also_read() -> None:
    def forward(m, x):
        wide = x.float()
        return wide.sin(), wide.double().sin()

    run(PASS, program(forward), X.half()).becomes("""
        %0 = to(x, float32)
        %1 = to(x, float64)
        %2 = sin(%0)
        %3 = sin(%1)
        return %2, %3
    """)


ROUNDED = {
    "narrowed": (torch.float32, torch.float16, torch.float32),
    "narrowed twice": (torch.float64, torch.float32, torch.float16),
    "another half type": (torch.float16, torch.bfloat16, torch.float32),
    "cut off": (torch.float32, torch.int32, torch.float32),
    "large whole numbers": (torch.int32, torch.float32, torch.int32),
    "bytes and their sign": (torch.uint8, torch.int8, torch.int32),
    "truth": (torch.float32, torch.bool, torch.float32),
}


@pytest.mark.parametrize("kinds", ROUNDED.values(), ids=ROUNDED)
def test_a_cast_that_rounds_is_refused(kinds: tuple[torch.dtype, ...]) -> None:
    model, inputs = each([kinds])
    run(PASS, model, *inputs).refuses(f"the cast to {kinds[1]} rounds what is {kinds[0]}")


def test_a_cast_that_depends_on_the_first_is_refused() -> None:
    model, inputs = each([(torch.float16, torch.float32, torch.uint8)])
    reason = "what torch.uint8 cannot hold is cast in another way from torch.float32 than from torch.float16"
    run(PASS, model, inputs[0].abs()).refuses(reason)


def test_complex_values_are_refused() -> None:
    model, inputs = each([(torch.float32, torch.complex64, torch.complex128)])
    run(PASS, model, *inputs).refuses("complex values are cast")


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return x.float().reshape(x.shape[0] * 2, 2).half()

    ran = run(PASS, program(forward), X.half(), dynamic={"x": {0: "batch"}}).counts(to=0, reshape=1)
    ran.agrees(randn(5, 4).half()).agrees(randn(1, 4).half())
