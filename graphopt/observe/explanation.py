"""An explanation: the remarks of a compilation ranked by price, as a table, as JSON, and against another."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphopt.compiler.remarks import Kind, Remark
from graphopt.errors import InputError
from graphopt.observe import summary
from graphopt.observe.summary import jsonable, unnumbered

FORMAT, SCHEMA = "graphopt-explanation", 1
KINDS: tuple[Kind, ...] = ("missed", "passed", "analysis")


@dataclass(frozen=True)
class Group:
    """Remarks that say the same of several places, such as the layers of a model.

    Args:
        kind: of the remarks.
        pass_name: who says it.
        reason: why, in the words of the first.
        count: how many there are.
        source: the user's ``file:line``, of the first.
        module: the ``nn.Module`` path, of the first.
        node: the node, of the first.
        bytes: memory traffic that they are about, together, in bytes a call.
        flops: floating-point operations, together.
        ms: estimated milliseconds, together, on the target.
    """

    kind: Kind
    pass_name: str
    reason: str
    count: int
    source: str
    module: str
    node: str
    bytes: float
    flops: float
    ms: float

    def to_dict(self) -> dict[str, Any]:
        """The group as JSON-ready values, its pass under the key ``pass``."""
        return {("pass" if key == "pass_name" else key): value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Change:
    """What two explanations say differently.

    Args:
        what: ``new``, ``gone``, or ``changed`` in number or price.
        group: of the newer one; of the older one where it is gone.
        before: how many there were.
        after: how many there are.
        ms: estimated milliseconds, newer minus older.
    """

    what: str
    group: Group
    before: int
    after: int
    ms: float

    def to_dict(self) -> dict[str, Any]:
        """The change as JSON-ready values."""
        return {**asdict(self), "group": self.group.to_dict()}


@dataclass(frozen=True)
class Explanation:
    """What was done to a model's graph, what was not, why, and what that is worth.

    Args:
        model: class name of the model.
        target: name of the device that the prices are for.
        remarks: all remarks.
        nodes_before: calls in the captured graph.
        nodes_after: calls in the rewritten graph.
        ms_before: roofline of the captured graph, in milliseconds a call.
        ms_after: roofline of the rewritten graph.
    """

    model: str
    target: str
    remarks: Sequence[Remark]
    nodes_before: int
    nodes_after: int
    ms_before: float
    ms_after: float

    def groups(self, kinds: Iterable[Kind] = KINDS) -> list[Group]:
        """The remarks of these kinds, those that say the same together, the most expensive first."""
        wanted = set(kinds)
        same: dict[tuple[str, str, str], list[Remark]] = defaultdict(list)
        for remark in self.remarks:
            if remark.kind in wanted:
                same[remark.kind, remark.pass_name, unnumbered(remark.reason)].append(remark)
        return sorted(
            map(_group, same.values()), key=lambda group: (-group.ms, -group.bytes, group.pass_name)
        )

    def against(self, older: Explanation) -> list[Change]:
        """What differs from an older explanation, the largest change of price first."""
        now, then = ({_key(group): group for group in side.groups()} for side in (self, older))
        changes = []
        for key in {**now, **then}:
            new, old = now.get(key), then.get(key)
            counts = old.count if old else 0, new.count if new else 0
            ms = (new.ms if new else 0.0) - (old.ms if old else 0.0)
            what = "new" if old is None else "gone" if new is None else "changed"
            significant = abs(ms) > 1e-3 * max(old.ms if old else 0.0, 1e-9)
            if what != "changed" or counts[0] != counts[1] or significant:
                group = new or old
                assert group is not None
                changes.append(Change(what, group, *counts, ms))
        return sorted(changes, key=lambda change: (-abs(change.ms), change.group.pass_name))

    def to_dict(self) -> dict[str, Any]:
        """The explanation as values that strict JSON can hold; ``from_dict`` reads them."""
        found: dict[str, Any] = jsonable(
            {
                "format": FORMAT,
                "schema": SCHEMA,
                "model": self.model,
                "target": self.target,
                "nodes": {"before": self.nodes_before, "after": self.nodes_after},
                "roofline_ms": {"before": self.ms_before, "after": self.ms_after},
                "remarks": [remark.to_dict() for remark in self.remarks],
            }
        )
        return found

    def dumps(self) -> str:
        """The explanation as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def read(path: Path) -> Explanation:
        """An explanation from a file that ``graphopt explain`` wrote.

        Raises:
            InputError: the file cannot be read, or holds something else.
        """
        hint = "write it with: graphopt explain SPEC -o FILE"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT or found["schema"] != SCHEMA:
                raise ValueError(f"its format is {found['format']} {found['schema']}")
            return _from_dict(found)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}", hint=hint) from error
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} holds no explanation: {error}", hint=hint) from error

    def show(self, console: Console, kinds: Iterable[Kind], top: int) -> None:
        """Print the remarks of these kinds, as many as ``top``, the most expensive first."""
        arrow = f"{self.nodes_before} nodes -> {self.nodes_after}"
        line = f"roofline on {self.target} {summary.ms(self.ms_before)} ms -> {summary.ms(self.ms_after)} ms"
        console.print(Text.assemble((self.model, "bold"), f": {arrow}; {line}"))
        groups = self.groups(kinds)
        table = _table(f"Remarks: {min(top, len(groups))} of {len(groups)}, by price")
        for group in groups[:top]:
            table.add_row(*_cells(group, str(group.count), summary.ms(group.ms), _bytes(group.bytes)))
        console.print(table)

    def show_against(self, older: Explanation, console: Console, top: int) -> None:
        """Print what differs from an older explanation, as many changes as ``top``."""
        changes = self.against(older)
        then, now = summary.ms(older.ms_after), summary.ms(self.ms_after)
        console.print(
            Text.assemble((self.model, "bold"), f": roofline after the passes {then} ms -> {now} ms")
        )
        if not changes:
            console.print("Nothing differs.")
            return
        table = _table(f"Changes: {min(top, len(changes))} of {len(changes)}, by price", "was")
        for change in changes[:top]:
            ms = f"{'+' if change.ms > 0 else ''}{summary.ms(change.ms)}"
            cells = _cells(change.group, str(change.after), ms, _bytes(change.group.bytes))
            table.add_row(Text(change.what), Text(str(change.before)), *cells)
        console.print(table)


def _group(same: Sequence[Remark]) -> Group:
    first = same[0]
    sums = [float(sum(getattr(remark, name) for remark in same)) for name in ("bytes", "flops", "ms")]
    return Group(
        first.kind, first.pass_name, first.reason, len(same), first.source, first.module, first.node, *sums
    )


def _key(group: Group) -> tuple[str, str, str]:
    return group.kind, group.pass_name, unnumbered(group.reason)


def _from_dict(found: Mapping[str, Any]) -> Explanation:
    remarks = [
        Remark(**{("pass_name" if key == "pass" else key): value for key, value in row.items()})
        for row in found["remarks"]
    ]
    nodes, ms = found["nodes"], found["roofline_ms"]
    return Explanation(
        found["model"], found["target"], remarks, nodes["before"], nodes["after"], ms["before"], ms["after"]
    )


def _table(title: str, *first: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="", pad_edge=False)
    if first:
        table.add_column("")
    for name in (*first, "times", "ms", "moved"):
        table.add_column(name, justify="right")
    for name in ("kind", "pass", "where", "why"):
        table.add_column(name, overflow="fold")
    return table


def _cells(group: Group, count: str, ms: str, moved: str) -> list[Text]:
    place = " ".join(filter(None, (summary.short_source(group.source), group.module)))
    return [Text(cell) for cell in (count, ms, moved, group.kind, group.pass_name, place, group.reason)]


def _bytes(count: float) -> str:
    return summary.size(count) if count else "-"
