"""``graphopt bisect``: which rewrite makes a judge say no."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from graphopt.cli import _options
from graphopt.cli._errors import INCONCLUSIVE, NO, told
from graphopt.cli._work import work
from graphopt.compiler.bisect import Answer, Found
from graphopt.compiler.bisect import bisect as search
from graphopt.errors import InputError
from graphopt.observe.files import write_text

if TYPE_CHECKING:
    from graphopt.compiler.remarks import Rewrite
    from graphopt.explain import Problem

_SKIP = 125  # the exit code by which a judge says that it cannot tell, as for git bisect


def bisect(
    spec: _options.Spec,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            show_default=False,
            help=f"Exit code 0 is good, {_SKIP} cannot tell, all others bad. Default: compare with float64.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the reproducer goes.")
    ] = Path(".graphopt"),
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an earlier run found out.")] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds after which a judge counts as bad.")
    ] = None,
    dynamic: _options.DynamicDims = None,
    outputs: _options.Outputs = None,
    level: _options.Level = None,
    enable: _options.Enable = None,
    disable: _options.Disable = None,
    batch: _options.Batch = 1,
    seq: _options.Seq = None,
    json: _options.Json = False,
    debug: _options.Debug = False,
) -> None:
    """Find the rewrite with which a judge turns from good to bad, and write a script that shows it alone.

    The judge is any command. It is run with GRAPHOPT_BISECT_LIMIT=n, which lets graphopt apply the
    first n rewrites only, about log2 of their number times. Without one, the outputs of the rewritten model
    are compared with float64, on the example inputs and on others like them.

    What was found out is kept in DIR: a run that was cut off goes on where it was.

    **Exit codes:** 0 every rewrite is good, 1 one is guilty, 2 wrong use or input, 3 inconclusive: the
    judge says bad without any rewrite, or could not tell, 4 a fault of graphopt.

    **Examples:**

    - graphopt bisect my_models.bert:tiny
    - graphopt bisect my_models.bert:tiny --judge "python evaluate.py --at-least 0.9"
    """
    with told(debug):
        from graphopt.cli import _config, _spec
        from graphopt.explain import problem
        from graphopt.runtime.judge import judge_by_comparison

        chosen = _config.passes(level, enable, disable)
        with work(debug):
            loaded = _spec.load(spec, batch=batch, seq=seq)
            given = problem(
                loaded.model,
                loaded.args,
                loaded.kwargs,
                dynamic=_options.dynamic(dynamic),
                outputs=_options.outputs(outputs),
                level=chosen.level,
                enable=chosen.enable,
                disable=chosen.disable,
            )
            rewrites = _rewrites(given)
        state = _State(output, spec, judge, rewrites, restart)
        ask = (
            _command(judge, timeout)
            if judge is not None
            else judge_by_comparison(given.graph, given.inputs, given.passes, given.limits)
        )
        found = search(len(rewrites), state.told(ask, quiet=json), state.answers)
        guilty = rewrites[found.guilty - 1] if found.guilty else None
        script = _reproducer(given, found.guilty, output) if found.guilty else None
        if json:
            typer.echo(_as_json(found, len(rewrites), guilty, script), nl=False)
        else:
            _print(found, len(rewrites), guilty, script)
        if guilty is not None:
            raise typer.Exit(NO)
        if found.bad is not None or found.good is None:
            raise typer.Exit(INCONCLUSIVE)


def _rewrites(given: Problem) -> list[Rewrite]:
    """All rewrites in the order of their application."""
    from graphopt.compiler.manager import PassManager
    from graphopt.compiler.remarks import Remarks

    manager = PassManager(given.passes, Remarks(), given.limits, limit=_ALL)
    return manager.run(given.graph.clone(), given.inputs).kept


_ALL = 2**31  # the environment's limit is for the judges


def _command(judge: str, timeout: float | None) -> Callable[[int], Answer]:
    from graphopt.compiler.manager import BISECT_LIMIT

    def ask(applied: int) -> Answer:
        environment = {**os.environ, BISECT_LIMIT: str(applied)}
        try:
            done = subprocess.run(  # noqa: S602 (the user's own command, run as a shell would)
                judge,
                shell=True,
                env=environment,
                timeout=timeout,
                stdout=2,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "bad"
        if done.returncode in (126, 127):  # the shell's own: it is not a verdict
            raise InputError(
                f"the judge cannot be run: exit code {done.returncode}", where=f"--judge {judge!r}"
            )
        return "good" if done.returncode == 0 else "skip" if done.returncode == _SKIP else "bad"

    return ask


class _State:
    """The answers so far, on disk; those of another model, judge or list of rewrites do not count."""

    def __init__(
        self, folder: Path, spec: str, judge: str | None, rewrites: Sequence[Rewrite], restart: bool
    ) -> None:
        sites = [f"{row.pass_name} {row.site}" for row in rewrites]
        self._problem = {"spec": spec, "judge": judge, "rewrites": sites}
        digest = hashlib.sha256(json.dumps(self._problem).encode()).hexdigest()[:12]
        self._path = folder / f"bisect-{digest}.json"
        self.answers: dict[int, Answer] = {}
        if self._path.is_file() and not restart:
            try:
                known = json.loads(self._path.read_text(encoding="utf-8"))["answers"]
                self.answers = {int(applied): answer for applied, answer in known.items()}
            except (ValueError, KeyError, AttributeError) as error:
                raise InputError(
                    f"{self._path} is damaged: {error}",
                    where=str(self._path),
                    hint="start anew with --restart",
                ) from error

    def told(self, ask: Callable[[int], Answer], *, quiet: bool) -> Callable[[int], Answer]:
        """The judge, whose every answer is printed and kept."""
        console = Console(stderr=True, soft_wrap=True)

        def asked(applied: int) -> Answer:
            answer = ask(applied)
            if not quiet:
                console.print(Text(f"{applied} rewrites of {len(self._problem['rewrites'] or ())}: {answer}"))
            kept = {**self._problem, "answers": {**self.answers, applied: answer}}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, json.dumps(kept, indent=1) + "\n")
            return answer

        return asked


def _reproducer(given: Problem, guilty: int, folder: Path) -> Path | None:
    from graphopt.compiler.manager import PassManager
    from graphopt.compiler.remarks import Remarks

    manager = PassManager(given.passes, Remarks(), given.limits, limit=guilty, reproduce=(guilty, folder))
    manager.run(given.graph.clone(), given.inputs)
    return manager.reproduced


def _as_json(found: Found, count: int, guilty: Rewrite | None, script: Path | None) -> str:
    row: dict[str, Any] = {
        "rewrites": count,
        "good": found.good,
        "bad": found.bad,
        "guilty": guilty.to_dict() if guilty is not None else None,
        "reproducer": str(script) if script is not None else None,
    }
    return json.dumps(row, indent=1) + "\n"


def _print(found: Found, count: int, guilty: Rewrite | None, script: Path | None) -> None:
    console = Console(soft_wrap=True)
    if guilty is not None:
        place = " ".join(filter(None, (guilty.source, guilty.module)))
        console.print(
            Text.assemble(("guilty: ", "bold red"), f"{guilty.pass_name} at {guilty.site}, {place}")
        )
        console.print(Text(f"  it is rewrite {found.guilty} of {count}"))
        if script is not None:
            console.print(Text(f"  alone, without the model: python {script}"))
    elif found.bad is None:
        console.print(
            Text(f"all {count} rewrites are good" if found.good is not None else "the judge could not tell")
        )
    elif found.good is None:
        console.print(Text("the judge says bad without any rewrite: none of them is guilty"))
    else:
        console.print(Text(f"inconclusive: it turns bad between {found.good} and {found.bad} rewrites"))
