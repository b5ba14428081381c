"""The suites of the benchmark runner, and the results that were recorded with them."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows in a suite's file; none where it was never measured."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
