"""Norms in symbols: products of powers of a tensor, its mean and its mean square, and how they combine."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import fx


@dataclass(frozen=True)
class Term:
    """scale * weight * u ** rows * mean ** means * (S + eps) ** power.

    Args:
        scale: a literal factor.
        weight: the node of one value for each normalised position, or None for ones.
        rows: the power of u.
        means: the power of the mean of the tensor.
        power: the power of S + eps.
        eps: what is added to S.
        centred: u is the tensor less its mean, and S its variance.
        kept: a statistic lines up with the tensor's dimensions.
        flaw: why this is no norm although it looks like one.
    """

    scale: float = 1.0
    weight: fx.Node | None = None
    rows: float = 0
    means: float = 0
    power: float = 0.0
    eps: float = 0.0
    centred: bool = False
    kept: bool = True
    flaw: str = ""

    @property
    def is_tensor(self) -> bool:
        """The tensor itself, whatever its type."""
        return self == Term(rows=1)

    @property
    def is_normalised(self) -> bool:
        """u / sqrt(S + eps), up to a factor."""
        return (self.rows, self.means, self.power) == (1, 0, -0.5)

    @property
    def is_statistic(self) -> bool:
        """A power of S + eps."""
        return not self.rows and not self.means and self.power != 0 and self.weight is None


def power(term: Term | None, exponent: float) -> Term | None:
    """A term to a power; a root of a negative factor, and what is no square of rows, is none."""
    if term is None or term.weight is not None or not term.scale:
        return None
    if term.scale < 0 and exponent != int(exponent):
        return None
    rows, means = term.rows * exponent, term.means * exponent
    if rows not in (0, 1, 2) or means not in (0, 1, 2):
        return None
    return replace(term, scale=term.scale**exponent, rows=rows, means=means, power=term.power * exponent)


def product(left: Term | None, right: Term | None) -> Term | None:
    """Two terms multiplied, where what comes out is still one term."""
    if left is None or right is None:
        return None
    weight = left.weight or right.weight
    if (left.weight and right.weight) or ((left.means or right.means) and weight):
        return None
    if not (left.kept and right.kept) and (left.rows or right.rows or weight):
        return None
    if (left.means or right.means) and (left.rows or right.rows or left.power or right.power):
        return None
    told = [term for term in (left, right) if term.rows or term.power]
    if len({term.centred for term in told}) > 1:
        return None
    if left.power and right.power and left.eps != right.eps:
        return None
    if left.rows + right.rows > 2:
        return None
    return Term(
        left.scale * right.scale,
        weight,
        left.rows + right.rows,
        left.means + right.means,
        left.power + right.power,
        left.eps or right.eps,
        any(term.centred for term in told),
        left.kept and right.kept,
        left.flaw or right.flaw,
    )


def added(left: Term | None, right: Term | None) -> Term | None:
    """Centring, the difference of E[x^2] and E[x]^2, and the addition of eps."""
    if left is None or right is None or left.weight or right.weight:
        return None
    for this, other in ((left, right), (right, left)):
        if this.is_statistic and other == Term(scale=other.scale):
            return _plus(this, other.scale)
        opposite = math.isclose(this.scale, -other.scale, rel_tol=1e-9) and not this.centred
        tensor = (this.rows, this.means, this.power) == (1, 0, 0)
        if opposite and tensor and (other.rows, other.means, other.power) == (0, 1, 0) and other.kept:
            return replace(this, centred=True)
        square = (this.rows, this.means, this.power, this.eps) == (0, 0, 1, 0)
        if opposite and square and (other.rows, other.means, other.power) == (0, 2, 0):
            return replace(this, centred=True)
    return None


def _plus(term: Term, number: float) -> Term | None:
    if term.power == 1 and term.scale > 0 and number >= 0:
        return replace(term, eps=term.eps + number / term.scale)
    if term.power == 0.5:
        return replace(term, flaw="eps is added to the root, not to what it is the root of")
    return None


def negated(term: Term | None) -> Term | None:
    """A term with the other sign."""
    return None if term is None else replace(term, scale=-term.scale)
