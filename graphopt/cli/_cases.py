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

from graphopt.bench.case import Case, Row, Setting, failed_row
from graphopt.bench.side import BUILD
from graphopt.cli._errors import FAULT, INTERRUPTED

Tell = Callable[[str, float], None]

_PATIENCE = 20.0  # seconds for an interrupted case to end by itself, keeping what it has


def measure(case: Case, setting: Setting, tell: Tell, *, debug: bool = False) -> Row:
    """Measure a case; where a peer takes the process down, again without that peer.

    Args:
        case: the case.
        setting: how long, against whom.
        tell: called with (what is being done, fraction done).
        debug: let the process write to stderr.

    Returns:
        Its row, or one that says how it failed.

    Raises:
        KeyboardInterrupt: it was interrupted before there was anything to keep.
    """
    crashed: dict[str, str] = {}
    while True:
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
            job = {"case": asdict(case), "setting": asdict(setting), "crashed": crashed}
            last, doing, code = _run(job, tell, None if debug else stderr)
            if "row" in last:
                row: Row = last["row"]
                return row
            if "failed" in last:
                return failed_row(case, setting, last["failed"])
            if code == INTERRUPTED:
                raise KeyboardInterrupt
            died = _death(code)
            stderr.seek(0)
            words = stderr.read().strip().splitlines()[-1:]
        key = doing.removeprefix(BUILD)
        if not doing.startswith(BUILD) or key in crashed or key.startswith("graphopt"):
            message = ": ".join((f"the process {died} at: {doing}", *words))
            return failed_row(case, setting, {"message": message, "code": FAULT})
        crashed[key] = f"the process {died}"


def _run(job: dict[str, Any], tell: Tell, stderr: IO[str] | None) -> tuple[dict[str, Any], str, int]:
    """The process from beginning to end: what it said last, what it was doing, and its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "graphopt.cli._case"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,  # Ctrl-C on the terminal comes here alone, and is passed on once
    )
    assert process.stdin is not None
    assert process.stdout is not None
    doing, patience = "start", threading.Timer(_PATIENCE, process.kill)
    last: dict[str, Any] = {}
    try:
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once: its exit code says how
                process.stdin.write(json.dumps(job))
                process.stdin.close()
            for line in process.stdout:
                last = json.loads(line)
                if "doing" in last:
                    doing = last["doing"]
                    tell(doing, last["done"])
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            patience.start()
            for line in process.stdout:
                last = json.loads(line)
            if "row" not in last:
                raise KeyboardInterrupt from None
        return last, doing, process.wait()
    finally:
        patience.cancel()
        with contextlib.suppress(ProcessLookupError):  # with what it started: compilers, for one
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def _death(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"died by {signal.Signals(-code).name}"
    except ValueError:
        return f"died by signal {-code}"
