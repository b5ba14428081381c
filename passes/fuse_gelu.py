"""x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) or x / 2 * (1 + erf(x / sqrt(2))) -> gelu(x)."""

from __future__ import annotations

import math

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.pattern import Call, Match, Or, Pattern, Var, shared_inside
from graphopt.passes._scalars import close_to

aten = torch.ops.aten
add, mul, div = aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor

_x = Var("x")


def _times(left: object, right: object) -> Call:
    return Call(mul, left, right, commutative=True)


def _one_more(value: Pattern) -> Call:
    return Call(add, value, close_to(1.0), commutative=True)


_cube = Or(
    Call(aten.pow.Tensor_Scalar, _x, close_to(3.0)),
    _times(_x, _times(_x, _x)),
    _times(_x, Call(aten.pow.Tensor_Scalar, _x, close_to(2.0))),
)
_inner = Call(add, _x, _times(_cube, close_to(0.044715)), commutative=True)
_steep = close_to(math.sqrt(2 / math.pi))
_curved = Or(_times(_times(_x, close_to(0.044715)), _x), _times(_times(_x, _x), close_to(0.044715)))
_tanh = Call(
    aten.tanh.default,
    Or(_times(_inner, _steep), _times(_times(_x, _steep), _one_more(_curved))),
    name="tanh",
)
_erf = Call(
    aten.erf.default,
    Or(Call(div, _x, close_to(math.sqrt(2))), _times(_x, close_to(math.sqrt(0.5)))),
    name="erf",
)


def _gelu(saturating: Call) -> Or:
    """x / 2 * (1 + f(x)), the factors in any order."""
    gate = _one_more(saturating)
    half = Or(_times(_x, close_to(0.5)), Call(div, _x, close_to(2.0)))
    return Or(
        _times(half, gate),
        _times(_times(_x, gate), close_to(0.5)),
        _times(_x, _times(gate, close_to(0.5))),
    )


pattern = Or(_gelu(_tanh), _gelu(_erf))


def check(match: Match) -> str | None:
    """A floating value, and nothing else may read the steps in between."""
    if not match.val("x").is_floating_point():
        return f"the value is {match.val('x').dtype}, not floating"
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One op, in the approximation that was spelled out."""
    approximate = "tanh" if "tanh" in match.bindings else "none"
    gelu = rewriter.call(aten.gelu.default, match["x"], approximate=approximate)
    rewriter.replace(match.root, gelu)


PASS = register(Pass("fuse_gelu", "fuse", pattern, rewrite, check))
