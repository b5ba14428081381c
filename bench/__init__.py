"""The suites of the benchmark runner, and the results that were recorded with them."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
