"""Runs the requests of a batch together where that is proved to change nothing, and apart where it is not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt.compiler.compare import compare
from graphopt.errors import InputError
from graphopt.runtime.serving.layout import Layout, Lengths

Tensors = Sequence[torch.Tensor]
Answer = list[Any] | Exception


class Batcher:
    """A program that is called once for several requests.

    Two things are taken on trust when requests share a call: that the model computes every row by itself,
    and that padding changes nothing (a mask hides it). So the first batches of either kind are also run one
    by one; where the results differ by more than rounding, the ones run alone are given, and requests of
    different lengths, or any two requests, never share a call again.

    A batch that fails is halved until the requests that fail are found; all others are served.

    Args:
        program: runs flat tensors; returns flat outputs.
        layout: how requests are joined; the reason in words where they cannot be.
        check: raises InputError when a call's sizes are not what the model was captured for.
        floor_ulps: by how many units in the last place two runs may differ.
        verify: how many batches of either kind are also run one by one.
        to_bucket: pad to the edge of the bucket, and fill the rows to a power of two: a CUDA graph is made
            for a shape that comes again. Otherwise requests are padded to the longest among them.

    Attributes:
        remarks: what was found out about the model, in words.
        padded: positions that were padding, and all of them, in what has run.
    """

    def __init__(
        self,
        program: Callable[[list[torch.Tensor]], Sequence[Any]],
        layout: Layout | str,
        check: Callable[[Sequence[torch.Tensor]], None],
        *,
        floor_ulps: float,
        verify: int = 3,
        to_bucket: bool = False,
        max_batch: int = 1,
    ) -> None:
        self._program = program
        self.layout = layout if isinstance(layout, Layout) else None
        self._check = check
        self._floor = floor_ulps
        self._to_bucket = to_bucket
        self.max_batch = int(min(max_batch, self.layout.max_rows)) if self.layout else 1
        self._unproved = {"joining": verify, "padding": verify}
        self._joins = self._pads = self.layout is not None
        self.remarks: list[str] = [] if self.layout else [f"requests run one by one: {layout}"]
        if self.layout is not None and self.layout.exact is not None and self.layout.names:
            self._pads = False
            self.remarks.append(f"only requests of equal lengths share a batch: {self.layout.exact}")
        self.padded = [0, 0]

    @property
    def joins(self) -> bool:
        """Whether requests share a call at all."""
        return self._joins

    def key(self, tensors: Tensors) -> tuple[Lengths, int]:
        """The bucket of a request, and its rows.

        Raises:
            InputError: it has no row, or more than a batch has.
        """
        if self.layout is None:
            return (), 1
        rows, lengths = self.layout.rows_of(tensors), self.layout.lengths_of(tensors)
        if not rows or rows > self.max_batch:
            raise InputError(
                f"the request has {rows} rows; the session takes 1 to {self.max_batch}",
                hint=f"split it, or make the session with max_batch={rows}" if rows else None,
            )
        return (self.layout.bucket(lengths) if self._pads else lengths), rows

    def serve(self, requests: Sequence[Tensors]) -> list[Answer]:
        """Answer requests: the flat outputs of each, or the error that it alone raises."""
        if not self._joins:
            return [self._alone(tensors) for tensors in requests]
        answers: list[Answer | None] = [None] * len(requests)
        for places in self._groups(requests):
            found = self._attempt([requests[place] for place in places])
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
        return answers  # type: ignore[return-value]

    def _groups(self, requests: Sequence[Tensors]) -> list[list[int]]:
        """The places of requests that may share a call."""
        if self._pads:
            return [list(range(len(requests)))]
        assert self.layout is not None
        groups: dict[Lengths, list[int]] = defaultdict(list)
        for place in range(len(requests)):
            groups[self.layout.lengths_of(requests[place])].append(place)
        return list(groups.values())

    def _attempt(self, requests: Sequence[Tensors]) -> list[Answer]:
        """Run requests together; the halves apart when that fails."""
        if len(requests) == 1 and not self._to_bucket:
            self._count(requests, requests[0])
            return [self._alone(requests[0])]
        try:
            answers, claims = self._together(requests)
        except Exception:  # whose fault it is, and what it is, comes out below
            pass
        else:
            unproved = [claim for claim in claims if self._unproved[claim]]
            return self._verified(requests, answers, unproved) if unproved else answers
        if len(requests) == 1:
            return [self._alone(requests[0])]
        middle = len(requests) // 2
        return [*self._attempt(requests[:middle]), *self._attempt(requests[middle:])]

    def _together(self, requests: Sequence[Tensors]) -> tuple[list[Answer], list[str]]:
        """Run requests in one call; returns the answers, and what they are right under."""
        assert self.layout is not None
        every = [self.layout.lengths_of(tensors) for tensors in requests]
        lengths = tuple(map(max, zip(*every, strict=True)))
        rows = filled = sum(map(self.layout.rows_of, requests))
        if self._to_bucket:
            lengths = self.layout.bucket(lengths) if self._pads else lengths
            filled = min(2 ** math.ceil(math.log2(rows)), max(self.max_batch, rows))
        joined = self.layout.join(requests, lengths, filled)
        self._check(joined)
        outputs = self._program(joined)
        self._count(requests, joined)
        answers: list[Answer] = list(self.layout.split(outputs, requests, filled))
        claims = ["joining"] if filled > self.layout.rows_of(requests[0]) else []
        if any(own != lengths for own in every):
            claims.append("padding")
        return answers, claims

    def _count(self, requests: Sequence[Tensors], joined: Tensors) -> None:
        asked = sum(tensors[0].numel() for tensors in requests)
        self.padded[0] += joined[0].numel() - asked
        self.padded[1] += joined[0].numel()

    def _alone(self, tensors: Tensors) -> Answer:
        try:
            return list(self._program(list(tensors)))
        except Exception as error:
            return error

    def _verified(
        self, requests: Sequence[Tensors], answers: list[Answer], claims: list[str]
    ) -> list[Answer]:
        """The answers, once they agree with those of every request run alone; those, where they do not."""
        alone = [self._alone(tensors) for tensors in requests]
        reasons = [self._difference(*pair) for pair in zip(alone, answers, strict=True)]
        reason = next(filter(None, reasons), None)
        if reason is None:
            for claim in claims:
                self._unproved[claim] -= 1
            return answers
        if "padding" in claims:
            self._pads = False
            self.remarks.append(
                f"only requests of equal lengths share a batch: padding changes results: {reason}"
            )
        else:
            self._joins = False
            self.remarks.append(f"requests run one by one: rows depend on each other: {reason}")
        return alone

    def _difference(self, alone: Answer, joined: Answer) -> str | None:
        if isinstance(alone, Exception):
            return f"run alone, a request fails: {alone}"
        exact = [value.double() if _floats(value) else value for value in alone]
        found = compare(alone, joined, exact, self._floor)
        return None if found.ok else found.reason


def _floats(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
