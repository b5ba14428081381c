"""A plan's steps side by side on a CPU: each lane a thread of its own, with its share of the cores."""

from __future__ import annotations

import functools
import os
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch

from graphopt.errors import ExecutionError
from graphopt.runtime import scheduler
from graphopt.runtime.executors import Program
from graphopt.runtime.executors._protocol import Threaded
from graphopt.runtime.plan import Plan, Value

_LOOK_S = 0.5  # how often a caller looks whether the lanes that it waits for are alive
Job = Callable[[], None]


class Lanes:
    """Runs a plan on threads: every lane runs its steps in order, and waits for those that it reads from.

    Each lane has cores of its own where there are enough, and so have the threads that its operators start.
    The threads end when nobody holds the lanes any more.

    Args:
        plan: the plan; its lanes say which thread runs which step.
        threads: that an operator inside a step may use: of PyTorch's own pool of a lane, or of a program's.

    Attributes:
        plan: the same with programs that have no more threads than their lane.

    Raises:
        LoweringError: a program cannot be had with fewer threads.
    """

    def __init__(self, plan: Plan, threads: int) -> None:
        self._steps = [
            [index for index, lane in enumerate(plan.lanes) if lane == number]
            for number in range(max(plan.lanes) + 1)
        ]
        owners = {name: index for index, step in enumerate(plan.steps) for name in step.region.writes}
        self.sources = [
            sorted({owners[name] for name in step.region.reads if name in owners}) for step in plan.steps
        ]
        self.readers = Counter(name for step in plan.steps for name in set(step.region.reads))
        self.readers.update(end.name for end in plan.outputs if isinstance(end, Value))
        cores = _cores(len(self._steps), threads)
        self._workers = [_Worker(number, threads, own) for number, own in enumerate(cores)]
        self._submitting = threading.Lock()
        weakref.finalize(self, _stop, self._workers)
        programs = dict(self._made_in_lanes(plan, threads))
        steps = (replace(step, program=programs[index]) for index, step in enumerate(plan.steps))
        self.plan = replace(plan, steps=tuple(steps))

    def _made_in_lanes(self, plan: Plan, threads: int) -> Iterator[tuple[int, Program]]:
        """Every step's program, made by its lane: the threads that it starts stay on the lane's cores."""
        for worker, indices in zip(self._workers, self._steps, strict=True):
            for index in indices:
                program = plan.steps[index].program
                if isinstance(program, Threaded):
                    made: Future[Program] = Future()
                    worker.submit(functools.partial(_make, made, program, threads))
                    program = made.result()
                yield index, program

    def run(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        """Run the plan; calls from several threads share the lanes, first come, first served.

        Once a lane's thread has died, plans run in order.

        Raises:
            ExecutionError: a lane's thread died in the middle.
        """
        if self._dead() is not None:
            return scheduler.run(self.plan, inputs)
        call = _Call(self.plan, self.sources, self.readers, inputs)
        ended = threading.Semaphore(0)
        with self._submitting:  # in one order on all lanes: otherwise two calls may wait for each other
            for worker, steps in zip(self._workers, self._steps, strict=True):
                worker.submit(functools.partial(call.run_lane, steps, ended))
        try:
            for _ in self._workers:
                while not ended.acquire(timeout=_LOOK_S):
                    self._require_alive()
        except BaseException:  # somebody pressed Ctrl-C, too
            call.fail(ExecutionError("the caller has left"))
            raise
        return call.outputs()

    def _dead(self) -> int | None:
        return next((number for number, worker in enumerate(self._workers) if not worker.alive), None)

    def _require_alive(self) -> None:
        dead = self._dead()
        if dead is not None:
            raise ExecutionError(
                f"the thread of lane {dead} died while a plan ran on it",
                hint="call the model again: it runs in order now",
            )


class _Call:
    """One run of a plan.

    A value is let go of when the last of those who read it has: in which order they come is not known before.
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sequence[Sequence[int]],
        readers: Counter[str],
        inputs: Sequence[torch.Tensor],
    ) -> None:
        self._plan, self._sources = plan, sources
        self._values: dict[str, Any] = dict(zip(plan.inputs, inputs, strict=True))
        self._values.update(plan.constants)
        self._left = Counter(readers)
        self._lock = threading.Lock()
        self._done = [threading.Event() for _ in plan.steps]
        self._failure: BaseException | None = None

    def run_lane(self, steps: Sequence[int], ended: threading.Semaphore) -> None:
        """Run one lane's steps; stops where any lane has failed."""
        try:
            for index in steps:
                for source in self._sources[index]:
                    self._done[source].wait()
                if self._failure is not None:
                    return
                self._run(index)
                self._done[index].set()
        except BaseException as error:
            self.fail(error)
        finally:
            ended.release()

    def _run(self, index: int) -> None:
        step = self._plan.steps[index]
        results = step.run([self._values[name] for name in step.region.reads])
        self._values.update(zip(step.region.writes, results, strict=True))
        with self._lock:
            for name in set(step.region.reads):
                self._left[name] -= 1
            gone = [name for name in (*step.region.reads, *step.region.writes) if not self._left[name]]
        for name in gone:
            self._values.pop(name, None)

    def fail(self, error: BaseException) -> None:
        """Let no lane begin another step; the first failure is the call's."""
        with self._lock:
            self._failure = self._failure or error
        for done in self._done:
            done.set()

    def outputs(self) -> list[Any]:
        """The flat outputs, once all lanes have ended.

        Raises:
            BaseException: what the first step that failed raised.
        """
        if self._failure is not None:
            raise self._failure
        return self._plan.ends(self._values)


class _Worker:
    """A thread that runs jobs in order.

    Args:
        number: of its lane.
        threads: that PyTorch's operators may use in it.
        cores: that it may run on, and whatever threads it starts; empty for any.
    """

    def __init__(self, number: int, threads: int, cores: Sequence[int]) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        ready = threading.Event()
        name = f"graphopt-lane-{number}"
        self._thread = threading.Thread(
            target=_work, args=(self._jobs, threads, cores, ready), name=name, daemon=True
        )
        own = torch.get_num_threads()
        self._thread.start()
        ready.wait()
        torch.set_num_threads(own)  # what a thread sets for itself, threads that start later begin with

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Let a job run after those before it."""
        self._jobs.put(job)

    def stop(self) -> None:
        """End the thread after the jobs that wait."""
        self._jobs.put(None)


def _cores(lanes: int, threads: int) -> list[Sequence[int]]:
    """Cores for each lane, so many as it has threads; none where there are too few, or no way to choose."""
    if not hasattr(os, "sched_setaffinity"):
        return [()] * lanes
    every = sorted(os.sched_getaffinity(0))
    if lanes * threads > len(every):
        return [()] * lanes
    return [every[lane * threads : (lane + 1) * threads] for lane in range(lanes)]


def _make(made: Future[Program], program: Threaded, threads: int) -> None:
    try:
        made.set_result(program.with_threads(threads))
    except BaseException as error:
        made.set_exception(error)


def _work(
    jobs: queue.SimpleQueue[Job | None], threads: int, cores: Sequence[int], ready: threading.Event
) -> None:
    if cores:
        os.sched_setaffinity(0, cores)  # of this thread; those that it starts begin with the same
    torch.get_num_threads()  # the first use of a thread's pool resets what the thread has set before
    torch.set_num_threads(threads)
    ready.set()
    while (job := jobs.get()) is not None:
        job()
        del job  # while it waits for the next, it holds nobody's tensors


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.stop()
