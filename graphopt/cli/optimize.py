"""``graphopt optimize``: make a model faster, and write down what was done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from graphopt.cli import _options
from graphopt.cli._errors import told
from graphopt.cli._progress import bar
from graphopt.cli._work import work
from graphopt.errors import InputError
from graphopt.observe.files import require_place

if TYPE_CHECKING:
    from graphopt.cli import _folder, _spec
    from graphopt.optimized_model import OptimizedModel


def optimize(
    spec: _options.Spec,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", show_default=False, help="Write report, plan and ONNX here."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace DIR, if graphopt wrote it and it holds nothing else.")
    ] = False,
    export_onnx: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Write the whole model as ONNX here."),
    ] = None,
    portable: Annotated[bool, typer.Option("--portable", help="In ONNX's own operators only.")] = False,
    target: _options.Target = "auto",
    executors: _options.Executors = None,
    dynamic: _options.DynamicDims = None,
    outputs: _options.Outputs = None,
    level: _options.Level = None,
    enable: _options.Enable = None,
    disable: _options.Disable = None,
    padding: _options.Padding = _options.PaddingChoice.keep,
    precision: _options.Precision = None,
    calibration: _options.Calibration = None,
    max_loss: _options.MaxLoss = None,
    effort: _options.Effort = _options.EffortChoice.measured,
    batch: _options.Batch = 1,
    seq: _options.Seq = None,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
    debug: _options.Debug = False,
) -> None:
    """Rewrite a model, verify every rewrite, choose the fastest executor, and report.

    The model is captured as a graph and rewritten. Every rewrite is checked against float64 and put back if
    it is less exact; what runs it is decided by measurement.

    With **-o DIR** the result is a folder of use outside graphopt: report.html (one page, opens
    anywhere), report.json, plan.txt, an ONNX model for every part that runs on ONNX Runtime, and
    manifest.json. DIR appears when everything is in it, or not at all.

    With **--export-onnx FILE** the whole rewritten model is one ONNX model that plain ONNX Runtime runs, with
    the names of the original's inputs and outputs.

    A factory is code and runs, and a .pt2 file may hold pickled values: name only what you trust. Nothing is
    ever downloaded.

    **Exit codes:** 0 done, 1 no executor (of those insisted on) gives the right answer, 2 wrong
    use or input, 4 a fault of graphopt, 130 interrupted. Only 0 writes anything.

    **Examples:**

    - graphopt optimize my_models.bert:tiny -o bert
    - graphopt optimize ./bert-base --dynamic input_ids:1=seq --dynamic attention_mask:1=seq
    """
    with told(debug):
        from graphopt.cli import _config, _folder, _spec
        from graphopt.optimize import optimize as run

        folder = _folder.Folder(output, force) if output is not None else None
        _require_place(export_onnx, portable)
        names, dims = _options.executors(executors), _options.dynamic(dynamic)
        passes = _config.passes(level, enable, disable)
        with work(debug), bar(quiet) as progress:
            loaded = _spec.load(spec, batch=batch, seq=seq, target=target)
            if dims and loaded.kind == "pt2":
                raise InputError(
                    "a .pt2 file has its dynamic dimensions in it",
                    where="--dynamic",
                    hint="export it again with torch.export.export(..., dynamic_shapes=...)",
                )
            optimized = run(
                loaded.model,
                loaded.args,
                loaded.kwargs,
                target=target,
                executors=names,
                dynamic=dims,
                outputs=_options.outputs(outputs),
                level=passes.level,
                enable=passes.enable,
                disable=passes.disable,
                padding=padding.value,
                precision=_config.precision(precision),
                calibration=_spec.calibration(calibration),
                max_loss=max_loss,
                effort=effort.value,
                progress=progress,
            )
            if folder is not None:
                progress("write", 0.95)
                folder.write(lambda place: _folder.fill(place, optimized, loaded, spec))
            if export_onnx is not None:
                optimized.export_onnx(export_onnx, portable)
        _print(optimized, loaded, folder, export_onnx, json=json, quiet=quiet)


def _require_place(export_onnx: Path | None, portable: bool) -> None:
    """Look at the place of the ONNX model before the work begins."""
    if export_onnx is not None:
        require_place(export_onnx, "model.onnx")
    elif portable:
        raise InputError(
            "--portable says how to write an ONNX model, and none is written", hint="--export-onnx"
        )


def _print(
    optimized: OptimizedModel,
    loaded: _spec.Loaded,
    folder: _folder.Folder | None,
    export_onnx: Path | None,
    *,
    json: bool,
    quiet: bool,
) -> None:
    if json:
        typer.echo(optimized.report.dumps(), nl=False)
    elif not quiet:
        optimized.report.print()
    if quiet:
        return
    notes = [f"note: {note}" for note in loaded.notes]
    if folder is not None:
        from graphopt.cli import _folder

        notes += [
            f"wrote {folder.path}",
            *(f"  {line}" for line in _folder.where_regions_run(optimized.plan)),
        ]
    if export_onnx is not None:
        notes.append(f"wrote {export_onnx}")
    console = Console(stderr=json, soft_wrap=True)
    for note in notes:
        console.print(Text(note))
