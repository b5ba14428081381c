"""``graphopt bench``: a model against its peers, measured so that the numbers can be relied on."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from graphopt.bench import rows, table
from graphopt.bench.page import write_page
from graphopt.bench.pytest_json import write_pytest_json
from graphopt.bench.setting import LIMIT, Case, Row, Setting
from graphopt.cli import _options
from graphopt.cli._errors import GOOD, INTERRUPTED, NO, told
from graphopt.cli._progress import bar
from graphopt.errors import InputError
from graphopt.observe.files import require_folder

_PEERS = "eager, inductor, inductor-max, onnxruntime, graphopt-ort, openvino, tensorrt"
_WIDTH = 140  # where there is no terminal to ask
_RECORDED = Path("bench") / "results"


class Lengths(enum.StrEnum):
    """How long the sentences of a batch are."""

    full = "full"
    real = "real"
    uniform = "uniform"


def bench(
    specs: Annotated[
        list[str] | None,
        typer.Argument(metavar="SPEC...", help="Models; with --report, files of rows.", show_default=False),
    ] = None,
    against: Annotated[
        str, typer.Option(metavar="PEER,PEER", help=f"Who to compare with: {_PEERS}.")
    ] = "eager,inductor,onnxruntime",
    batch: Annotated[
        str | None, typer.Option(metavar="N,N", help="Batch sizes; a factory takes them as `batch`.")
    ] = None,
    seq: Annotated[
        str | None, typer.Option(metavar="N,N", help="Lengths in tokens; a factory takes them as `seq`.")
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=N,N", help="Of another parameter of the factory. Repeatable."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE,DTYPE", help="float32, float16, bfloat16; by default as it is."),
    ] = None,
    precision: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="Also those that optimize takes: bf16, int8, int4, ...")
    ] = "exact",
    device: Annotated[
        str, typer.Option(help='"cpu", "cuda", "cuda:1", or "auto": where the model is.')
    ] = "auto",
    lengths: Annotated[
        Lengths, typer.Option(help="Ragged, the rest masked. real: as sentences are; uniform: from 16 on.")
    ] = Lengths.full,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds a case at most, each of two calls a side.")] = 30,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Begin no round of a case after so many; three are always run.")
    ] = 60.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of every side on a CPU; PyTorch's default is all cores.")
    ] = None,
    limit: Annotated[
        float,
        typer.Option(min=0.0, help="Seconds a side may take to build, or to run once; 0: all it wants."),
    ] = LIMIT,
    seed: Annotated[int, typer.Option(help="Of the model's random numbers, and of the lengths.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", show_default=False, help="Add a row a case (.jsonl)."),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write tables and plots as one page, beside the rows.")
    ] = False,
    benchmark_json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Write what `pytest-benchmark compare` reads."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print rows as JSON lines on stdout.")] = False,
    quiet: _options.Quiet = False,
    debug: _options.Debug = False,
) -> None:
    """Measure models against their peers, each in its best mode, and say only what the noise allows.

    A case is a SPEC with a batch, a length and a dtype. It runs in a process of its own: graphopt and all
    peers on the same inputs, in interleaved rounds, A B B A, and graphopt against itself, which gives the
    noise floor. Every side is held against float64: what is wrong is marked and does not count. With
    **--precision** graphopt and whoever can also compute in narrower numbers, all within the loss that
    optimize allows by default, and rows tell what each of them loses. A factory
    gets the sizes that are asked for by name: `def bert(batch, seq)`. A peer that crashes, or takes longer
    than **--limit** to build or for one call, is marked, and the case goes on without it.

    **-o FILE** adds a row a case as soon as it is measured. Ctrl-C keeps what was measured. With
    **--report** a page is written, too: `graphopt bench --report rows.jsonl` makes it of rows that are there.

    **Exit codes:** 0 every case was measured and graphopt is right in all, 1 not so in some, 2 wrong use or
    input, or no case could be measured, 4 a fault of graphopt, 130 interrupted.

    **Examples:**

    - graphopt bench my_models:bert --batch 1,8 --seq 128 -o rows.jsonl --report
    - graphopt bench ./bert-base --batch 32 --seq 512 --lengths real --against eager,openvino
    - graphopt bench --report rows.jsonl
    """
    with told(debug):
        from graphopt.bench import peers
        from graphopt.bench.problem import device_named

        places = Places.of(specs or [], output, report, benchmark_json)
        if places.rows:
            measured = rows.read_all(places.rows)
            _show(measured, places, json=json, quiet=quiet)
            return
        setting = Setting(tuple(peers.named(against)), rounds, seconds, threads, limit or None)
        device_named(device)
        ragged = None if lengths is Lengths.full else lengths.value
        axes = _grid_sizes(batch, seq, sizes), _kinds(dtype, precision)
        cases = list(grid(specs or [], *axes, ragged, device, seed))
        run = run_cases(cases, setting, output, quiet=quiet, debug=debug)
        _show(run.rows, places, json=json, quiet=quiet)
        raise typer.Exit(run.exit_code)


@dataclass(frozen=True)
class Places:
    """What is read, and what is written where.

    Args:
        rows: files to report on; () where cases are measured.
        page: the page to write.
        benchmark_json: pytest-benchmark's file to write.
    """

    rows: tuple[Path, ...] = ()
    page: Path | None = None
    benchmark_json: Path | None = None

    @staticmethod
    def of(specs: Sequence[str], output: Path | None, report: bool, benchmark_json: Path | None) -> Places:
        """What the command line says; all of it is looked at before the work begins.

        Raises:
            InputError: there is nothing to do, or SPECs are mixed with files of rows.
            OutputError: a place cannot be written to.
        """
        files = [spec for spec in specs if spec.endswith((".jsonl", ".json"))]
        if files and len(files) != len(specs):
            raise InputError(
                "files of rows and SPECs are mixed", hint="report on the one, or measure the other"
            )
        if files and not report:
            raise InputError(f"{files[0]} is no SPEC", hint=f"graphopt bench --report {files[0]}")
        if not specs:
            recorded = sorted(_RECORDED.glob("*.jsonl")) if report else []
            files = [str(path) for path in recorded if rows.holds_rows(path)]
            if not files:
                hint = "graphopt bench SPEC, or graphopt bench --report rows.jsonl"
                raise InputError(
                    "no SPEC was given" if not report else "no file of rows was given", hint=hint
                )
        page = None
        if files:
            page = output or Path("bench.html")
        elif output is not None:
            rows.require_appendable(output)
            page = output.with_suffix(".html") if report else None
        elif report:
            page = Path("bench.html")
        for place in filter(None, (page, benchmark_json)):
            require_folder(place.absolute().parent)
        return Places(tuple(map(Path, files)), page, benchmark_json)


def grid(
    specs: Iterable[str],
    sizes: Sequence[tuple[str, Sequence[int]]],
    kinds: Sequence[tuple[str | None, str]],
    lengths: str | None,
    device: str,
    seed: int,
) -> Iterator[Case]:
    """Every SPEC with every size, and every kind of numbers: dtype and precision."""
    names = [name for name, _ in sizes]
    for spec, values, (dtype, precision) in itertools.product(
        dict.fromkeys(specs), itertools.product(*(values for _, values in sizes)), kinds
    ):
        given = dict(zip(names, values, strict=True))
        yield Case(spec, given, dtype, lengths, device, seed, precision=precision)


def _grid_sizes(batch: str | None, seq: str | None, others: list[str] | None) -> list[tuple[str, list[int]]]:
    given = [("batch", batch, "--batch"), ("seq", seq, "--seq")]
    for text in others or ():
        name, equals, values = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise InputError("it does not read as NAME=N,N", where=f"--set {text}", hint="--set layers=2,4,8")
        given.append((name.strip(), values, f"--set {name}"))
    named = [name for name, text, _ in given if text is not None]
    if twice := {name for name in named if named.count(name) > 1}:
        raise InputError(f"{min(twice)} is given twice", hint="one list of values: 1,8,32")
    return [(name, _numbers(text, option)) for name, text, option in given if text is not None]


def _numbers(text: str, option: str) -> list[int]:
    numbers = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in numbers):
        raise InputError(f"{text!r} is no list of sizes", where=option, hint="numbers above 0: 1,8,32")
    return list(dict.fromkeys(map(int, numbers)))


def _dtypes(text: str | None) -> list[str | None]:
    if text is None:
        return [None]
    from graphopt.bench.inputs import dtype_named

    names = [str(dtype_named(name.strip())).removeprefix("torch.") for name in text.split(",")]
    return list(dict.fromkeys(names))


def _kinds(dtype: str | None, precision: str) -> list[tuple[str | None, str]]:
    """Every dtype in every precision."""
    from graphopt.precision import passes_of

    names = list(dict.fromkeys(name.strip() for name in precision.split(",")))
    for name in names:
        passes_of(name)
    return list(itertools.product(_dtypes(dtype), names))


@dataclass
class Ran:
    """What a run came to.

    Args:
        rows: of the cases that were measured or failed, in order.
        interrupted: Ctrl-C ended it.
    """

    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """As the command's help says."""
        if self.interrupted:
            return INTERRUPTED
        failed = [row["failed"]["code"] for row in self.rows if "failed" in row]
        if failed and len(failed) == len(self.rows):
            return int(max(failed))
        wrong = any({"wrong", "failed"} & row["sides"][0].keys() for row in self.rows if "failed" not in row)
        return NO if failed or wrong else GOOD


def run_cases(
    cases: Sequence[Case], setting: Setting, output: Path | None, *, quiet: bool = False, debug: bool = False
) -> Ran:
    """Measure cases one after the other, and add each row to a file as soon as it is there.

    Args:
        cases: what to measure.
        setting: how long, against whom.
        output: takes the rows; None for none.
        quiet: say nothing on stderr.
        debug: show what the cases' processes print.

    Raises:
        OutputError: a row cannot be written; those before it are.
    """
    from graphopt.cli._cases import Interrupted, measure

    ran, console = Ran(), Console(stderr=True, soft_wrap=True)
    try:
        with bar(quiet, left=True) as progress:
            for index, case in enumerate(cases):

                def tell(what: str, done: float, index: int = index, case: Case = case) -> None:
                    progress(f"{index + 1}/{len(cases)} {case.name}: {what}", (index + done) / len(cases))

                stopped = False
                try:
                    row = measure(case, setting, tell, debug=debug)
                except Interrupted as interrupt:
                    row, stopped = interrupt.row, True
                ran.rows.append(row)
                if output is not None:
                    rows.append(output, row)
                if not quiet:
                    console.print(Text(table.told(row)))
                if stopped or row.get("interrupted"):
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        ran.interrupted = True
        kept = f"the rows are in {output}" if output is not None and ran.rows else "nothing was written"
        console.print(Text(f"interrupted: {len(ran.rows)} of {len(cases)} cases measured; {kept}"))
    return ran


def _show(found: Sequence[Row], places: Places, *, json: bool, quiet: bool) -> None:
    """Print the tables or the rows, and write what was asked for."""
    written = []
    if places.page is not None and found:
        write_page(places.page, found)
        written.append(places.page)
    if places.benchmark_json is not None and found:
        write_pytest_json(places.benchmark_json, found)
        written.append(places.benchmark_json)
    if json:
        for row in found:
            typer.echo(rows.line(row), nl=False)
    elif not quiet and found:
        table.show(found, Console(width=None if Console().is_terminal else _WIDTH))
    if not quiet:
        for path in written:
            Console(stderr=True, soft_wrap=True).print(Text(f"wrote {path}"))
