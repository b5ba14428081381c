"""Around the work of a command: stdout is for its result alone."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def work(debug: bool) -> Iterator[None]:
    """Keep stdout for the report: what others print goes to stderr, and warnings only with ``--debug``."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
        yield
