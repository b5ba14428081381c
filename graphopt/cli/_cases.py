"""Measuring cases, each in a process of its own: one that dies takes neither the others nor the run with it.

In its own process a case also starts from nothing: its first optimization is a cold one, and what the case
before compiled, allocated or pinned is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import IO, Any

from graphopt.bench.case import failed_row
from graphopt.bench.setting import Case, Row, Setting
from graphopt.bench.side import side_of
from graphopt.cli._errors import FAULT, INTERRUPTED, WRONG_USE

Tell = Callable[[str, float], None]

_COMMAND = [sys.executable, "-m", "graphopt.cli._case"]
_LATE = 1 << 16  # no exit code of a process
_PATIENCE = 60.0  # seconds for an interrupted case to end by itself, keeping what it has


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a case was measured, of which there is something to keep.

    Args:
        row: the case's, complete or with the rounds that were.
    """

    def __init__(self, row: Row) -> None:
        super().__init__("interrupted")
        self.row = row


def measure(case: Case, setting: Setting, tell: Tell, *, debug: bool = False) -> Row:
    """Measure a case; where a peer takes the process down or does not end, again without that peer.

    Args:
        case: the case.
        setting: how long, against whom.
        tell: called with (what is being done, fraction done).
        debug: let the process write to stderr.

    Returns:
        Its row, or one that says how it failed.

    Raises:
        Interrupted: it was interrupted, and there is a row.
        KeyboardInterrupt: it was interrupted before there was anything to keep.
    """
    crashed: dict[str, str] = {}
    while True:
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
            job = {"case": asdict(case), "setting": asdict(setting), "crashed": crashed}
            last, doing, code = _run(job, tell, None if debug else stderr, setting.limit)
            if "row" in last:
                row: Row = last["row"]
                return row
            if "failed" in last:
                return failed_row(case, setting, last["failed"])
            if code == INTERRUPTED:
                raise KeyboardInterrupt
            late = code == _LATE
            died = f"timed out after {setting.limit:g} s" if late else f"the process {_death(code)}"
            stderr.seek(0)
            words = [] if late else stderr.read().strip().splitlines()[-1:]
        key = side_of(doing)
        if not key or key in crashed:
            failed: dict[str, Any] = {"message": ": ".join((f"{died} at: {doing}", *words)), "code": FAULT}
            if late:
                failed |= {"hint": "--limit SECONDS gives a side more time, 0 all of it", "code": WRONG_USE}
            return failed_row(case, setting, failed)
        crashed[key] = died


def _run(
    job: dict[str, Any], tell: Tell, stderr: IO[str] | None, limit: float | None
) -> tuple[dict[str, Any], str, int]:
    """The process from beginning to end: what it said last, what it was doing, and its exit code."""
    process = subprocess.Popen(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,  # Ctrl-C on the terminal comes here alone, and is passed on once
    )
    assert process.stdin is not None
    assert process.stdout is not None
    doing, patience, watch = "start", threading.Timer(_PATIENCE, process.kill), _Watch(process, limit)
    last: dict[str, Any] = {}
    try:
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once: its exit code says how
                process.stdin.write(json.dumps(job))
                process.stdin.close()
            watch.fed()
            for line in process.stdout:
                last = json.loads(line)
                if "doing" in last:
                    doing = last["doing"]
                    tell(doing, last["done"])
                watch.fed()
        except KeyboardInterrupt:
            watch.stop()
            process.send_signal(signal.SIGINT)
            patience.start()
            for line in process.stdout:
                last = json.loads(line)
            if "row" not in last:
                raise KeyboardInterrupt from None
            raise Interrupted(last["row"]) from None
        code = process.wait()
        return last, doing, _LATE if watch.bit else code
    finally:
        patience.cancel()
        watch.stop()
        _kill_all(process)
        process.wait()
        process.stdout.close()


class _Watch:
    """Ends a process that says nothing for too long.

    Args:
        process: leads a group, which ends with it.
        limit: seconds from one word to the next; None for ever.

    Attributes:
        bit: it had to.
    """

    def __init__(self, process: subprocess.Popen[str], limit: float | None) -> None:
        self.bit = False
        self._process, self._limit = process, limit
        self._timer: threading.Timer | None = None

    def fed(self) -> None:
        """The process said something."""
        self.stop()
        if self._limit is not None:
            self._timer = threading.Timer(self._limit, self._bite)
            self._timer.daemon = True
            self._timer.start()

    def stop(self) -> None:
        """Whatever comes, the process is not ended."""
        if self._timer is not None:
            self._timer.cancel()

    def _bite(self) -> None:
        self.bit = True
        _kill_all(self._process)


def _kill_all(process: subprocess.Popen[str]) -> None:
    """End a process with what it started: compilers, for one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _death(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"died by {signal.Signals(-code).name}"
    except ValueError:
        return f"died by signal {-code}"
