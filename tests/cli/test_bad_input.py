"""Whatever is wrong with the input: exit code 2, one clear error, no traceback, nothing on disk."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.cli import _options
from graphopt.errors import InputError

Run = Callable[..., Any]

SPECS = {
    "nothing.like:this": ("no module named 'nothing'", "run from the folder that holds it"),
    "zoo.inner:block": ("no module named 'zoo.inner'", "zoo.inner:block"),
    "unsound:block": (
        "unsound does not import: ModuleNotFoundError: No module named 'zoo_of_nothing'",
        "unsound.py:2",
    ),
    "garbled:block": ("garbled does not import: SyntaxError", "garbled.py:1"),
    "zoo:blok": ("zoo has no 'blok'", "did you mean zoo:block"),
    "zoo:Block.foward": ("zoo:Block has no 'foward'", "did you mean zoo:Block.forward?"),
    "zoo:raises": ("zoo:raises raises: ValueError: no such luck", "zoo.py:52"),
    "zoo:needs": ("zoo:needs takes arguments: size", "name a callable without arguments"),
    "zoo:number": ("zoo:number returns int", "return (model, args)"),
    "zoo:tensor_args": ("zoo:tensor_args returns (Block, Tensor)", "return (model, args)"),
    "zoo:bare": ("zoo:bare returns a Block without example inputs", "zoo.py"),
    "zoo:instance": ("zoo:instance is a Block, not a callable", "name a function"),
    "zoo:ZOO_IS_NO_NAME": ("zoo has no 'ZOO_IS_NO_NAME'", "did you mean"),
    "zoo:training": ("Block is in training mode", "call model.eval() first"),
    "zoo": ("SPEC 'zoo' leads to no model", "package.module:factory"),
    "zoo.py": ("SPEC 'zoo.py' is a file that graphopt does not read", "package.module:factory"),
    "https://example.org/m:x": ("leads to no model", "package.module:factory"),
    "brocken.pt2": ("brocken.pt2 does not exist", "did you mean broken.pt2?"),
    "broken.pt2": ("broken.pt2 is not an exported program", "torch.export.save"),
    "cut.pt2": ("cut.pt2 is not an exported program", "torch.export.save"),
    "empty": ("empty holds no config.json", "save_pretrained"),
    "odd": ("config.json cannot be read", "odd"),
    "unknown": ("knows no architecture 'NoSuchModel'", "config.json"),
    "pickled": ("holds its weights as a pickle, pytorch_model.bin", "safetensors"),
    "whisper": ("graphopt makes no inputs for WhisperModel", "package.module:factory"),
}
OPTIONS = {
    "--target tpu": ("unknown target 'tpu'", "one of"),
    "--executors ort,eagre": ("unknown executor 'eagre'", "eager"),
    "--executors ,": ("--executors names none", "--executors ort,eager"),
    "--disable fuse_linaer": ("there is no pass 'fuse_linaer'", "fuse_linear"),
    "--enable x": ("there is no pass 'x'", ""),
    "--dynamic x": ("it names no input", "--dynamic input_ids:0=batch"),
    "--dynamic x:a=b": ("'a=b' does not read as DIM=NAME", "--dynamic x:a=b"),
    "--dynamic y:0=batch": ("'y'", "x"),
    "--dynamic x:9=batch": ("dimension 9", "x"),
    "-o zoo.py": ("zoo.py exists already", "name another folder"),
    "-o taken": ("taken exists already", "name another folder"),
    "-o missing/out": ("missing does not exist", "create it first"),
    "-o zoo.py/out": ("zoo.py is a file", "name another place"),
}


@pytest.fixture
def place(workspace: Path) -> Path:
    """The workspace, with broken files and folders in it."""
    (workspace / "broken.pt2").write_bytes(b"PK not a zip file")
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.randn(1, 2),))
    torch.export.save(program, workspace / "whole.pt2")
    (workspace / "cut.pt2").write_bytes((workspace / "whole.pt2").read_bytes()[:2000])
    bert = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    configs: dict[str, Any] = {
        "odd": "{",
        "unknown": {**bert, "architectures": ["NoSuchModel"]},
        "pickled": {**bert, "architectures": ["BertModel"]},
        "whisper": {
            "model_type": "whisper",
            "architectures": ["WhisperModel"],
            "d_model": 8,
            "vocab_size": 60000,
        }
        | {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")},
    }
    for folder, config in configs.items():
        (workspace / folder).mkdir()
        (workspace / folder / "config.json").write_text(
            config if isinstance(config, str) else json.dumps(config)
        )
    (workspace / "pickled" / "pytorch_model.bin").touch()
    (workspace / "empty").mkdir()
    (workspace / "taken").mkdir()
    return workspace


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def check(result: Any, wanted: tuple[str, ...]) -> None:
    said = result.stderr.replace("the factory speaks\n", "")
    assert result.exit_code == 2, said
    assert said.startswith("error: ")
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 4
    for text in wanted:
        assert text in said
    assert result.stdout == ""


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_that_leads_nowhere(place: Path, run: Run, spec: str) -> None:
    before = contents(place)
    check(run("optimize", spec, "-o", "out"), SPECS[spec])
    assert contents(place) == before


@pytest.mark.parametrize("options", OPTIONS)
def test_an_option_that_makes_no_sense(place: Path, run: Run, options: str) -> None:
    before = contents(place)
    output = () if options.startswith("-o") else ("-o", "out")
    check(run("optimize", "zoo:block", *options.split(), *output), OPTIONS[options])
    assert contents(place) == before


def test_a_pt2_file_has_its_own_dynamic_dimensions(place: Path, run: Run) -> None:
    check(
        run("optimize", "whole.pt2", "--dynamic", "auto"), ("a .pt2 file has its dynamic dimensions in it",)
    )


def test_debug_shows_the_users_own_line(place: Path, run: Run) -> None:
    result = run("optimize", "zoo:raises", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert re.search(r'zoo\.py", line 52, in raises', result.stderr)
    assert result.stderr.count("error: ") == 1


@pytest.mark.parametrize("args", [("--level", "9"), ("--effort", "much"), ("--no-such",), ("--batch", "0")])
def test_wrong_usage_is_told_by_the_parser(workspace: Path, run: Run, args: tuple[str, ...]) -> None:
    result = run("optimize", "zoo:block", *args)
    assert result.exit_code == 2
    assert args[0] in result.stderr
    assert "Traceback" not in result.stderr


def test_dynamic_dimensions_in_every_spelling() -> None:
    wanted = {"input_ids": {0: "batch", 1: "seq"}, "mask": {0: "batch"}}
    assert _options.dynamic(["input_ids:0=batch,1=seq", "mask:0=batch"]) == wanted
    assert _options.dynamic(["input_ids:0=batch", "mask:0=batch", "input_ids: 1 = seq"]) == wanted
    assert _options.dynamic([json.dumps(wanted)]) == wanted
    assert _options.dynamic(["auto"]) is True
    assert _options.dynamic(None) is None
    for text in (
        "",
        ":0=b",
        "x:",
        "x:0",
        "x:0=",
        "x:-1=b",
        "x:0=a,0=b",
        "{",
        '{"x": 1}',
        '{"x": {"a": "b"}}',
    ):
        with pytest.raises(InputError, match="cannot read the dynamic dimensions"):
            _options.dynamic([text])
    with pytest.raises(InputError, match="has two names"):
        _options.dynamic(["x:0=a", "x:0=b"])


def test_a_name_that_is_everywhere_is_no_luck(place: Path, run: Run) -> None:
    """A folder named like a module is taken for a folder: SPEC says which with its colon."""
    shutil.copytree(place / "empty", place / "zoo")
    check(run("optimize", "zoo"), ("zoo holds no config.json",))
