"""``graphopt explain``: what the passes did, what they did not, why, and what that is worth."""

from __future__ import annotations

import enum
import json as strict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from graphopt.cli import _options
from graphopt.cli._errors import told
from graphopt.cli._work import work
from graphopt.observe.files import write_text
from graphopt.observe.summary import jsonable

if TYPE_CHECKING:
    from graphopt.observe.explanation import Explanation

_WIDTH = 140  # where there is no terminal to ask


class Shown(enum.StrEnum):
    """Which remarks are shown."""

    missed = "missed"
    passed = "passed"
    analysis = "analysis"
    all = "all"


def explain(
    spec: _options.Spec,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", show_default=False, help="Write all of it as JSON."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Show what differs from an earlier one."),
    ] = None,
    kind: Annotated[Shown, typer.Option(help="Which remarks to show.")] = Shown.missed,
    top: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 20,
    target: Annotated[
        str, typer.Option(help='What prices are for: "auto", "cpu", "cuda", or a GPU: "h100", "l4".')
    ] = "auto",
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
    """Show every rewrite made or missed, where in the source, why, and its price on the target.

    The passes run with verification; nothing is lowered and nothing is timed: prices are rooflines. SPEC may
    also be a file that an earlier run wrote with **-o**; the target need not be there.

    **Exit codes:** 0 done, 2 wrong use or input, 4 a fault of graphopt.

    **Examples:**

    - graphopt explain my_models.bert:tiny --target h100
    - graphopt explain my_models.bert:tiny -o before.json, later: graphopt explain SPEC --against before.json
    """
    with told(debug):
        from graphopt.cli import _config, _spec
        from graphopt.explain import explain as run
        from graphopt.observe.explanation import KINDS, Explanation

        older = Explanation.read(against) if against is not None else None
        if spec.endswith(".json"):
            found = Explanation.read(Path(spec))
        else:
            chosen = _config.passes(level, enable, disable)
            with work(debug):
                loaded = _spec.load(spec, batch=batch, seq=seq)
                found = run(
                    loaded.model,
                    loaded.args,
                    loaded.kwargs,
                    target=target,
                    dynamic=_options.dynamic(dynamic),
                    outputs=_options.outputs(outputs),
                    level=chosen.level,
                    enable=chosen.enable,
                    disable=chosen.disable,
                )
        if output is not None:
            write_text(output, found.dumps())
        if json:
            typer.echo(found.dumps() if older is None else _changes(found, older), nl=False)
            return
        console = Console(width=None if Console().is_terminal else _WIDTH)
        if older is not None:
            found.show_against(older, console, top)
        else:
            found.show(console, [name for name in KINDS if kind.value in (name, "all")], top)


def _changes(found: Explanation, older: Explanation) -> str:
    rows = jsonable([change.to_dict() for change in found.against(older)])
    return strict.dumps({"changes": rows}, indent=1, allow_nan=False) + "\n"
