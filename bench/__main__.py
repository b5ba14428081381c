"""``python -m bench SUITE``: measure a suite and record its rows under ``bench/results``."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import RESULTS, catalogue, compile_time, kernels
from bench.models import SUITES
from bench.readme import update_readme
from graphopt.bench.case import Setting, run_case
from graphopt.bench.peers import PEERS


def main() -> None:
    """Measure, record, print, and bring the README's tables up to date."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "suite",
        choices=[*SUITES, "kernels", "time", "readme", "catalogue"],
        help="a suite; or kernels: the Triton kernels, on a GPU; or time: how long optimizing takes; or"
        " readme: only rewrite its tables; or catalogue: what is found in every architecture",
    )
    parser.add_argument("--against", default="eager,onnxruntime,inductor", help="peers, by comma")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--dry", action="store_true", help="print, record nothing")
    parser.add_argument("--tune", action="store_true", help="kernels: measure their configurations first")
    given = parser.parse_args()
    if given.suite == "kernels":
        kernels.run(given.only, given.against.split(","), tuned=given.tune, record=not given.dry)
        return
    if given.suite == "catalogue":
        every = track(list(catalogue.cases()), "architectures")
        catalogue.update_page([catalogue.measure(*case) for case in every])
        return
    if given.suite == "time":
        layers = {case: count for case, count in compile_time.CASES.items() if given.only in case}
        rows = [compile_time.measure(case, count, given.threads) for case, count in layers.items()]
        Console().print(compile_time.table(rows))
        if not given.dry:
            _record("time", rows, f"python -m bench time --threads {given.threads}")
        return
    if given.suite != "readme":
        peers = [peer for peer in given.against.split(",") if peer]
        unknown = [peer for peer in peers if peer not in PEERS]
        if unknown:
            parser.error(f"unknown peer {unknown[0]!r}; the peers are: {', '.join(PEERS)}")
        cases = {name: make for name, make in SUITES[given.suite].items() if given.only in name}
        rows = [run_case(n, make, peers, Setting(given.rounds, given.threads)) for n, make in cases.items()]
        _print(rows)
        if given.dry:
            return
        _record(
            given.suite,
            rows,
            f"python -m bench {given.suite} --against {given.against} --rounds {given.rounds}",
        )
    update_readme()


def _record(suite: str, rows: list[dict[str, object]], command: str) -> None:
    """One JSON line a case; a case measured again takes its old row's place."""
    path = RESULTS / f"{suite}.jsonl"
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    new = {row["case"] for row in rows}
    kept = [row for row in old if row["case"] not in new]
    lines = [json.dumps({**row, "command": command} if row in rows else row) for row in (*kept, *rows)]
    path.write_text("\n".join(lines) + "\n")


def _print(rows: list[dict[str, object]]) -> None:
    table = Table("case", "side", "median ms", "ratio to graphopt [95%]", "error")
    for row in rows:
        for side, times in row["ms"].items():  # type: ignore[attr-defined]
            ratio = row["noise"] if side == "graphopt again" else row["ratio"].get(side)  # type: ignore[attr-defined]
            text = f"{ratio['ratio']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else ""  # type: ignore[index]
            table.add_row(str(row["case"]), side, f"{times['median']:.2f}", text, f"{row['error'][side]:.1e}")  # type: ignore[index]
    Console().print(table)


if __name__ == "__main__":
    main()
