"""Remarks: every rewrite made, refused or missed, where in the user's source, why, and what it is worth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import fx

from graphopt.ir import provenance

Kind = Literal["passed", "missed", "analysis"]


@dataclass(frozen=True)
class Remark:
    """One thing that the compiler did, did not do, or found out.

    Args:
        kind: ``passed`` (a rewrite was made), ``missed`` (it could have been), ``analysis`` (a fact).
        pass_name: who says it: a pass, or a stage such as "partition".
        node: the node it is about.
        source: the user's ``file:line``.
        module: the ``nn.Module`` path.
        reason: why, in words.
        bytes: memory traffic that it saves (or a miss costs), in bytes a call.
        flops: floating-point operations, likewise.
        ms: estimated milliseconds, likewise, on the target.
    """

    kind: Kind
    pass_name: str
    node: str
    source: str
    module: str
    reason: str
    bytes: float = 0.0
    flops: float = 0.0
    ms: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The remark as JSON-ready values, its pass under the key ``pass``."""
        row = asdict(self)
        return {("pass" if key == "pass_name" else key): value for key, value in row.items()}


@dataclass(frozen=True)
class Rewrite:
    """One rewrite that was tried.

    Args:
        pass_name: the pass.
        kind: ``prune``, ``fold`` or ``fuse``.
        site: the root node of the matched region.
        source: the user's ``file:line``.
        module: the ``nn.Module`` path.
        error_before: of the region as it was, relative to float64 (see ``compiler/tolerance.py``).
        error_after: of the rewritten region, likewise.
        kept: False when it was reverted.
        reason: why it was reverted.
        shared: the verdict is that of an identical region, checked before.
    """

    pass_name: str
    kind: str
    site: str
    source: str
    module: str
    error_before: float
    error_after: float
    kept: bool
    reason: str = ""
    shared: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The rewrite as JSON-ready values, its pass under the key ``pass``."""
        row = asdict(self)
        return {("pass" if key == "pass_name" else key): value for key, value in row.items()}


class Remarks:
    """The remarks of one compilation, in the order they were made."""

    def __init__(self) -> None:
        self._rows: list[Remark] = []

    def add(
        self,
        kind: Kind,
        pass_name: str,
        node: fx.Node | None,
        reason: str,
        *,
        bytes: float = 0.0,
        flops: float = 0.0,
        ms: float = 0.0,
    ) -> None:
        """Leave a remark about a node; its place in the user's source is read off the node."""
        place = provenance.of(node) if node is not None else provenance.Provenance()
        name = node.name if node is not None else ""
        row = Remark(kind, pass_name, name, place.source, place.module, reason, bytes, flops, ms)
        self._rows.append(row)

    def extend(self, rows: Iterable[Remark]) -> None:
        """Add remarks that were made elsewhere."""
        self._rows.extend(rows)

    def rollback(self, count: int) -> None:
        """Take back all but the first ``count`` remarks: what they tell of was undone."""
        del self._rows[count:]

    def of_kind(self, kind: Kind) -> list[Remark]:
        """The remarks of one kind."""
        return [row for row in self._rows if row.kind == kind]

    @property
    def rows(self) -> tuple[Remark, ...]:
        """All remarks."""
        return tuple(self._rows)
