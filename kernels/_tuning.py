"""Which configuration a kernel is launched with: the heuristic's, or the one that was measured, kept on disk.

A launcher says ``config = choose(kernel, device, key, candidates)``. The first candidate is the heuristic's
choice, and what it gets until somebody calls ``tune`` on the launcher with real arguments: nothing is timed
unasked. Where another size was measured in this process that is nearly the same, its choice goes first. What
was measured is a JSON file under ``GRAPHOPT_CACHE`` (else ``$XDG_CACHE_HOME/graphopt``), one for every
kernel, key, GPU, version of Triton and torch, and hash of the kernel's source: none is ever stale.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from graphopt.kernels._driver import own_stream
from graphopt.kernels._replay import captured, replayed
from graphopt.kernels._triton import (
    INTERPRETED,
    Launch,
    dependence,
    device_of,
    launch_options,
    recorded_launches,
    stand_in,
    triton,
)

Key = tuple[Hashable, ...]
Timer = Callable[[Sequence[Callable[[], Any]]], list[float]]

REPEATS, ROUNDS = 20, 13  # launches in a graph, and half its replays, for every candidate


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Args:
        tiles: compile-time sizes by the kernel's names for them.
        num_warps: a program's warps, of 32 threads each.
        num_stages: of the software pipeline.
    """

    tiles: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments of ``launch``."""
        return {**self.tiles, "num_warps": self.num_warps, "num_stages": self.num_stages}


def distinct(configs: Sequence[Config]) -> tuple[Config, ...]:
    """The configurations in their order, each once."""
    return tuple(config for place, config in enumerate(configs) if config not in configs[:place])


@dataclass(frozen=True)
class Tuned:
    """What tuning found for one kernel.

    Args:
        kernel: its name.
        key: what it was tuned for.
        config: the fastest candidate.
        us: microseconds by candidate, in the order in which they were given; None where it failed.
        failures: by candidate's place, why it failed.
    """

    kernel: str
    key: Key
    config: Config
    us: list[float | None]
    failures: dict[int, str]


@dataclass
class _Question:
    """What a launcher asked: the kernel, on which device, for what, and between what."""

    kernel: Any
    device: torch.device
    key: Key
    candidates: Sequence[Config]

    @property
    def name(self) -> str:
        return str(getattr(self.kernel, "__name__", self.kernel))

    @property
    def identity(self) -> Identity:
        return self.name, str(self.device), self.key


Identity = tuple[str, str, Key]

_NEAR = 2.0  # times a size: so far what was measured is taken for another

_known: dict[Identity, Config | None] = {}
_near: dict[Identity, Config | None] = {}  # of what was not measured, as far as is known now
_asked: ContextVar[list[_Question] | None] = ContextVar("graphopt_asked_configurations", default=None)
_forced: ContextVar[dict[Identity, Config]] = ContextVar("graphopt_forced_configuration")


def choose(kernel: Any, device: torch.device, key: Key, candidates: Sequence[Config]) -> Config:
    """The configuration that a launcher launches a kernel with.

    Args:
        kernel: made by ``jit``.
        device: that it will run on.
        key: sizes, dtypes and flags that the choice depends on; numbers, strings and None only.
        candidates: what may be chosen, the heuristic's choice first.

    Returns:
        The measured one where there is one; else one that was measured for the same but for one size, which
        is at most twice or half as large; else the first.
    """
    if stand_in() is not None:
        return candidates[0]
    question = _Question(kernel, device, key, candidates)
    asked = _asked.get()
    if asked is not None:
        asked.append(question)
    forced = _forced.get({}).get(question.identity)
    if forced is not None:
        return forced
    if question.identity not in _known:
        _keep(question, _read(question))
    return _known[question.identity] or _nearest(question) or candidates[0]


def _keep(question: _Question, found: Config | None) -> None:
    _known[question.identity] = found
    if found is not None:
        _near.clear()


def _nearest(question: _Question) -> Config | None:
    """What was measured at the most similar key, where that is among the candidates."""
    if question.identity not in _near:
        name, device, key = question.identity
        found = [
            (ratio, config)
            for (other, where, its), config in _known.items()
            if (other, where) == (name, device) and config in question.candidates
            if (ratio := _ratio(key, its)) is not None
        ]
        _near[question.identity] = min(found, key=lambda row: row[0], default=(0.0, None))[1]
    return _near[question.identity]


def _ratio(key: Key, other: Key) -> float | None:
    """By how much one size of two keys differs, wherever it stands; None where more differs, or too much."""
    if len(key) != len(other):
        return None
    pairs = {(a, b) for a, b in zip(key, other, strict=True) if a != b}
    if len(pairs) != 1:
        return None
    one, two = pairs.pop()
    if type(one) is not int or type(two) is not int or min(one, two) < 1:
        return None
    ratio = max(one, two) / min(one, two)
    return ratio if ratio <= _NEAR else None


def tune(
    launcher: Callable[..., Any], *args: Any, timer: Timer | None = None, again: bool = False, **kwargs: Any
) -> list[Tuned]:
    """Measure every candidate of every kernel that a launcher starts, and keep the fastest on disk.

    A kernel that was measured before keeps what was found, unless it is to be measured again. Candidates of
    one kernel are timed interleaved, on these arguments, while the launcher's other kernels keep theirs. One
    that fails (too much shared memory, no registers left) is left out.

    Args:
        launcher: that of a Triton face.
        args: real arguments of the launcher; it must not write to them.
        timer: microseconds of every thunk; None measures replays of CUDA graphs.
        again: whether to measure what is known.
        kwargs: likewise.

    Returns:
        One result a kernel that was measured.

    Raises:
        RuntimeError: all candidates of a kernel fail; says why the first did.
    """
    results: list[Tuned] = []
    asked: set[tuple[str, str, Key]] = set()
    while True:
        # One at a time: what is found for a product may make the kernel behind it another one.
        found = (q for q in _questions(launcher, args, kwargs) if again or _known.get(q.identity) is None)
        question = next((q for q in found if q.identity not in asked), None)
        if question is None:
            return results
        asked.add(question.identity)
        results.append(_tune_one(question, lambda: launcher(*args, **kwargs), timer or interleaved))


def _questions(
    launcher: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[_Question]:
    """What a launcher asks, in its order, with what is known by now."""
    questions: list[_Question] = []
    token = _asked.set(questions)
    try:
        with recorded_launches():  # a heuristic's choice that fails must not end the tuning
            launcher(*args, **kwargs)
    finally:
        _asked.reset(token)
    return questions


def _tune_one(question: _Question, run: Callable[[], Any], timer: Timer) -> Tuned:
    with recorded_launches() as launches:
        for config in question.candidates:
            with (
                contextlib.suppress(Exception),
                _force(question, config),
            ):  # it fails again below, and is told
                run()
    compile_ahead(launches)
    del launches  # and with them the outputs of all candidates
    runs: dict[int, Callable[[], Any]] = {}
    failures: dict[int, str] = {}
    for place, config in enumerate(question.candidates):

        def with_config(config: Config = config) -> Any:
            with _force(question, config):
                return run()

        try:
            with_config()
        except Exception as error:  # whatever Triton, ptxas or the driver says of this one, others may run
            failures[place] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            runs[place] = with_config
    if not runs:
        raise RuntimeError(f"{question.name}: no configuration runs at {question.key}: {failures[0]}")
    us = dict(zip(runs, timer(list(runs.values())), strict=True))
    best = question.candidates[min(us, key=lambda place: us[place])]
    _keep(question, best)
    every = [us.get(place) for place in range(len(question.candidates))]
    _write(question, best, every)
    return Tuned(question.name, question.key, best, every, failures)


def compile_ahead(launches: Sequence[Launch]) -> None:
    """Compile the kernels of recorded launches side by side, so that launching them finds them compiled.

    What does not compile is left to its launch, which says why.
    """
    on_gpu = [launch for launch in launches if device_of(launch.args).type == "cuda"]
    if INTERPRETED or len(on_gpu) < 2:
        return
    device = device_of(on_gpu[0].args)
    with (
        torch.cuda.device(device),
        ThreadPoolExecutor(min(len(on_gpu), os.cpu_count() or 1)) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for each in on_gpu:
            pdl = dependence(device, each.early)
            options = launch_options(pdl, each.num_warps, each.num_stages, each.registers)
            with contextlib.suppress(Exception):
                each.kernel.warmup(*each.args, grid=each.grid, **each.constants, PDL=pdl, **options)


@contextmanager
def _force(question: _Question, config: Config) -> Iterator[None]:
    token = _forced.set({**_forced.get({}), question.identity: config})
    try:
        yield
    finally:
        _forced.reset(token)


def interleaved(thunks: Sequence[Callable[[], Any]]) -> list[float]:
    """Median microseconds of each thunk, from replays of CUDA graphs in turn; the L2 cache is warm."""

    def repeat(thunk: Callable[[], Any]) -> None:  # no result is kept: the next call may have its memory
        for _ in range(REPEATS):
            thunk()

    stream = _stream(torch.cuda.current_device())
    graphs = [captured([functools.partial(repeat, thunk)], stream)[0] for thunk in thunks]
    return [us / REPEATS for us in replayed(graphs, ROUNDS)]


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    """The stream that all candidates of a GPU are captured on; none outlives its comparison."""
    return own_stream(torch.device("cuda", index))


# On disk


def cache_folder() -> Path:
    """Where graphopt keeps what it measured: ``GRAPHOPT_CACHE``, else a folder in the user's cache."""
    given = os.environ.get("GRAPHOPT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphopt"


def _circumstances(question: _Question) -> dict[str, Any]:
    """All that a measurement is only good for, as JSON has it."""
    gpu = torch.cuda.get_device_name(question.device) if question.device.type == "cuda" else "cpu"
    facts = {
        "kernel": question.name,
        "key": [str(part) for part in question.key],
        "gpu": gpu,
        "triton": getattr(triton, "__version__", None),
        "torch": torch.__version__,
        "source": getattr(question.kernel, "cache_key", None),
    }
    return json.loads(json.dumps(facts))  # type: ignore[no-any-return]


def _path(question: _Question, facts: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / "tuning" / f"{question.name}-{digest}.json"


def _read(question: _Question) -> Config | None:
    """What was measured before, or None; a file that cannot be read is said and passed over."""
    facts = _circumstances(question)
    path = _path(question, facts)
    try:
        found = json.loads(path.read_text())
        if found["for"] != facts:
            raise ValueError("it was measured under other circumstances")
        config = Config(**found["config"])
        numbers = (*config.tiles.values(), config.num_warps, config.num_stages)
        if not all(type(number) is int for number in numbers):
            raise ValueError("it holds no configuration")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{path} is passed over, tune again: {error}", RuntimeWarning, stacklevel=3)
        return None
    return config


def _write(question: _Question, config: Config, us: list[float | None]) -> None:
    """Put the file in its place in one step, so that nobody ever reads half of one."""
    facts = _circumstances(question)
    path = _path(question, facts)
    text = json.dumps({"for": facts, "config": asdict(config), "us": us}, indent=1)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            part = Path(file.name)
            file.write(text)
        part.replace(path)
    except OSError as error:
        if part is not None:  # a full disk wants it gone
            part.unlink(missing_ok=True)
        warnings.warn(
            f"{path} cannot be written, the tuning lasts this process: {error}", RuntimeWarning, stacklevel=3
        )
