"""Sides: the ways to run the model, each built, held against float64, and timed against the others."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from graphopt.bench.loss import Lost
from graphopt.bench.peer import Problem, Run
from graphopt.bench.peers import PEERS
from graphopt.compiler.compare import Comparison
from graphopt.errors import said
from graphopt.runtime.rounds import Clock, Interrupted, clock_of, interleave

Tell = Callable[[str, float], None]

OWN, AGAIN = "graphopt", "graphopt again"
BUILD, RUN = "build ", "run "  # before the key of the side that is being built and checked, or timed
_LONG_MS = 1e3  # calls that are announced one by one: beside them, saying so costs nothing
_MIN_CALLS = 6  # of a side, for an interrupted case to be worth its row


@dataclass
class Side:
    """One way to run the model, and what became of it.

    Args:
        peer: graphopt, or the peer.
        mode: of the peer; for graphopt what it chose.
        run: runs it once; None when it failed or is wrong.
        build_s: seconds until it could run, compilation included.
        error: the largest of its outputs, relative to float64.
        wrong: why its outputs are not the model's; "" if they are.
        failed: the error that it ended with; "" if it runs.
        precision: that it computes in; "exact" for the model's own.
        loss: where the case allows one: relative distance from float64 of its worst output.
        cosine: likewise, the cosine similarity of the output that is least similar.
    """

    peer: str
    mode: str
    run: Run | None = None
    build_s: float = 0.0
    error: float | None = None
    wrong: str = ""
    failed: str = ""
    precision: str = "exact"
    loss: float | None = None
    cosine: float | None = None

    @property
    def key(self) -> str:
        """Unlike that of any other side of the case."""
        return f"{self.peer} ({self.mode})" if self.mode else self.peer


def build_peers(
    problem: Problem, against: Sequence[str], tell: Tell, crashed: Mapping[str, str]
) -> tuple[list[Side], dict[str, dict[str, str]]]:
    """Build every mode of every peer; what fails is kept, with its error.

    Args:
        problem: what they run.
        against: the peers, by name.
        tell: called with (what is being done, fraction of the case done).
        crashed: sides that took an earlier process down, by key, and how; they are not tried again.

    Returns:
        The sides, and the peers that are not there: why, and the command that brings them.
    """
    sides: list[Side] = []
    missing: dict[str, dict[str, str]] = {}
    for index, name in enumerate(against):
        peer = PEERS[name]
        if reason := peer.absent(problem.device):
            missing[name] = {"reason": reason, "install": peer.install}
            continue
        for mode in peer.modes(problem):
            side = Side(name, mode.name, precision=mode.precision)
            sides.append(side)
            if side.key in crashed:
                side.failed = crashed[side.key]
                continue
            tell(BUILD + side.key, 0.3 + 0.2 * index / len(against))
            start = time.perf_counter()
            try:
                side.run = mode.build(problem)
            except Exception as error:
                side.failed = _first_line(error)
            side.build_s = round(time.perf_counter() - start, 3)
    return sides, missing


def check(side: Side, compare: Callable[[list[torch.Tensor]], Comparison]) -> None:
    """Hold a side's outputs against float64; one that is wrong, or fails to run, is run no more.

    A peer that loses more than the case allows is timed, so that its row tells what it gains by that.
    """
    if side.run is None:
        return
    try:
        found = compare(side.run())
    except Exception as error:
        side.run, side.failed = None, _first_line(error)
        return
    side.error = found.error_after
    if isinstance(found, Lost):
        side.loss, side.cosine = found.loss, found.cosine
    if not found.ok:
        side.wrong = found.reason
        if side.loss is None or not math.isfinite(side.loss) or side.peer == OWN:
            side.run = None


@dataclass
class Times:
    """Milliseconds of every call, by side.

    Args:
        warm: one call after the other, the L2 cache as the call before left it.
        cold: on a GPU, with an L2 cache that was emptied before every call.
        interrupted: Ctrl-C ended the rounds.
    """

    warm: dict[str, list[float]] = field(default_factory=dict)
    cold: dict[str, list[float]] = field(default_factory=dict)
    interrupted: bool = False

    def median(self, side: Side) -> float:
        """Of a side that was timed, with a warm L2."""
        return statistics.median(self.warm[side.key])


def time_sides(
    own: Side, sides: Sequence[Side], device: torch.device, rounds: int, seconds: float | None, tell: Tell
) -> Times:
    """Time all sides that are right against each other, graphopt twice: that gives the noise floor.

    Args:
        own: graphopt's; where it does not run, nothing is timed.
        sides: the peers'.
        device: where they run.
        rounds: at most so many, of each kind of cache.
        seconds: for all rounds together; None for as long as they take.
        tell: called with (what is being done, fraction of the case done).

    Raises:
        KeyboardInterrupt: Ctrl-C, before there was enough to keep.
    """
    times = Times()
    if own.run is None:
        return times
    runs: dict[str, Run] = {side.key: side.run for side in (own, *sides) if side.run is not None}
    runs[AGAIN] = own.run
    kinds = ("warm", "cold") if device.type == "cuda" else ("warm",)
    for index, kind in enumerate(kinds):
        turns = _Turns(runs, clock_of(device, cold=kind == "cold"), tell, index / len(kinds), 1 / len(kinds))
        try:
            found = interleave(
                runs,
                rounds,
                seconds=None if seconds is None else seconds / len(kinds),
                clock=turns.clock,
                on_round=turns.on_round,
            )
        except Interrupted as interrupt:
            found, times.interrupted = interrupt.times, True
            if len(found[own.key]) < _MIN_CALLS:
                if kind == "warm":
                    raise KeyboardInterrupt from None
                return times
        setattr(times, kind, found)
        if times.interrupted:
            return times
    return times


class _Turns:
    """Says how far the rounds are, and whose turn it is where that may take long or for ever.

    Nothing is said before a short call: who reads it would wake up on a core that is being measured.

    Args:
        runs: the sides, by key.
        clock: runs a side and tells its time in milliseconds.
        tell: called with (what is being done, fraction of the case done).
        start: fraction of the measuring that is done before these rounds.
        share: fraction of it that they are.
    """

    def __init__(self, runs: Mapping[str, Run], clock: Clock, tell: Tell, start: float, share: float) -> None:
        self._keys = {id(run): key for key, run in reversed(list(runs.items()))}  # graphopt's is there twice
        self._took = dict.fromkeys(self._keys.values(), math.inf)
        self._clock, self._tell = clock, tell
        self._start, self._share, self._done = start, share, start

    def clock(self, run: Callable[[], object]) -> float:
        key = self._keys[id(run)]
        if self._took[key] > _LONG_MS:
            self._say(RUN + key)
        self._took[key] = took = self._clock(run)
        return took

    def on_round(self, done: float) -> None:
        self._done = self._start + self._share * done
        self._say("measure")

    def _say(self, what: str) -> None:
        self._tell(what, 0.5 + 0.5 * self._done)


def side_of(doing: str) -> str:
    """The key of the peer's side that was being built or run; "" where it was something else."""
    for stage in (BUILD, RUN):
        key = doing.removeprefix(stage)
        if key != doing and key.split(" ")[0] != "graphopt":
            return key
    return ""


def _first_line(error: Exception) -> str:
    lines = said(error).strip().splitlines()
    return lines[0][:300]
