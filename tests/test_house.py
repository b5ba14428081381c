"""The rules of the house. Every checker is also shown an offender, so that none passes by seeing nothing."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = {"graphopt": "graphopt", "passes": "graphopt.passes", "kernels": "graphopt.kernels"}

# Imports run downhill: each room sees those after it in this line, besides itself.
LINE = ("cli", "gate", "observe", "runtime", "compiler", "capture", "ir")
SEES = {room: set(LINE[place + 1 :]) for place, room in enumerate(LINE)}
SEES["errors"] = set()  # graphopt/errors.py, a leaf that everybody may import
SEES["kernels"] = {"ir"}
SEES["passes"] = {"ir", "compiler", "kernels"}
for room in ("gate", "observe", "runtime"):
    SEES[room].add("kernels")
# These see every room, but for the two that are built on them.
_TOP = ("", "._face", ".explain", ".optimize", ".optimized_model", ".packing", ".precision", ".torch_compile")
TOP = {f"graphopt{name}" for name in _TOP}
SEES["top"] = {*SEES, "top"} - {"cli"}
SEES["bench"] = {*SEES["top"]}
SEES["cli"] = {*SEES, "top"}

FILE_LINES, TEST_FILE_LINES, FUNCTION_LINES = 420, 500, 75
PICKLES = {"_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
TORCH_PICKLES = {f"torch{part}.{verb}" for part in ("", ".serialization") for verb in ("load", "save")}
HOME_PATH = re.compile(r"(?<![\w.)}\]-])(?:/(?:home|root|Users|work)/|[A-Z]:\\+Users\\+)\w[^\s\"'`]*")


# Reading the repository


def shipped() -> list[tuple[str, Path]]:
    """The name under which each installed file is imported, and the file."""
    found = []
    for folder, package in SHIPPED.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            found.append((".".join((package, *(part for part in inner if part != "__init__"))), path))
    assert found
    return found


def repository() -> list[Path]:
    """Every file that is, or would be, committed."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: nothing says which files are the repository's")
    found = [ROOT / name for name in listed.split("\0") if name]
    assert found
    return [path for path in found if path.is_file()]


def at(path: Path, faults: list[str]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{fault}" for fault in faults]


def none(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


# Imports


def imports(source: str, package: str = "") -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import, inside functions and TYPE_CHECKING blocks too.

    Args:
        source: the text of a file.
        package: the package that the file is in; without it, relative imports keep their dots.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = resolve_name(base, package) if package else base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            by_name = ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__")
            if by_name and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def room_of(name: str) -> str | None:
    """`graphopt.ir.op.Op` is in the room `ir`; None for what is not graphopt's."""
    first, *rest = name.split(".")
    if first != "graphopt":
        return None
    if rest == ["__main__"]:
        return "cli"
    return rest[0] if rest and rest[0] in SEES else "top"


def uphill(module: str, package: str, source: str) -> list[str]:
    here = room_of(module)
    assert here is not None
    faults = []
    for line, target in imports(source, package):
        there = room_of(target)
        if there not in (None, here, "errors", *SEES[here]):
            faults.append(f"{line}: {here} must not import {there} ({target})")
    return faults


def test_imports_run_downhill() -> None:
    faults = []
    for module, path in shipped():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        faults += at(path, uphill(module, package, path.read_text()))
    none(faults)


def test_every_root_module_has_a_room() -> None:
    """A new file or folder beside the rooms would be taken for the top, which may see everything."""
    strays = [
        str(path.relative_to(ROOT))
        for module, path in shipped()
        if room_of(module) == "top" and module not in TOP
    ]
    none([f"{stray}: not in a room; see LINE and TOP in {Path(__file__).name}" for stray in strays])


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("graphopt.ir.op", "import graphopt.compiler"),
        ("graphopt.ir.op", "from graphopt import compiler"),
        ("graphopt.ir.op", "from graphopt import optimize"),
        ("graphopt.ir.op", "import graphopt"),
        ("graphopt.ir.op", "from ..runtime import plan"),
        ("graphopt.ir.op", "from .. import runtime"),
        ("graphopt.ir.op", "def late():\n    from graphopt.kernels.rms_norm import OP"),
        ("graphopt.ir.op", "if TYPE_CHECKING:\n    from graphopt.passes import default"),
        ("graphopt.ir.op", "importlib.import_module('graphopt.capture')"),
        ("graphopt.capture.export", "from graphopt.kernels import rms_norm"),
        ("graphopt.compiler.cost", "from graphopt.passes.fold_constants import PASS"),
        ("graphopt.runtime.plan", "from graphopt.observe import report"),
        ("graphopt.runtime.plan", "from graphopt.passes import default"),
        ("graphopt.gate.lock", "from graphopt.optimize import optimize"),
        ("graphopt.kernels.rms_norm", "from graphopt.compiler import cost"),
        ("graphopt.passes.fold_constants", "from graphopt.capture import export"),
        ("graphopt.errors", "from graphopt.ir import op"),
        ("graphopt.optimize", "from graphopt.bench import peers"),
        ("graphopt.bench.case", "from graphopt.cli import main"),
    ],
)
def test_an_uphill_import_is_seen(module: str, source: str) -> None:
    assert uphill(module, module.rpartition(".")[0], source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("graphopt.ir.op", "from graphopt.errors import GraphoptError"),
        ("graphopt.ir.op", "from . import graph\nimport torch"),
        ("graphopt.runtime.plan", "from graphopt.kernels._triton import AVAILABLE"),
        ("graphopt.passes.fold_constants", "from graphopt.kernels import rms_norm\nfrom ..ir import op"),
        ("graphopt.cli.bench", "from graphopt import optimize\nimport graphopt.passes"),
        ("graphopt.optimize", "from graphopt.passes import default\nfrom graphopt.gate import lock"),
    ],
)
def test_a_downhill_import_is_not_an_offence(module: str, source: str) -> None:
    assert not uphill(module, module.rpartition(".")[0], source)


def second_copies(source: str) -> list[str]:
    return [
        f"{line}: import graphopt.{name}: a top-level import loads a second copy with a second registry"
        for line, name in imports(source)
        if name.split(".")[0] in ("passes", "kernels")
    ]


def test_nobody_imports_passes_or_kernels_at_top_level() -> None:
    none([f for p in repository() if p.suffix == ".py" for f in at(p, second_copies(p.read_text()))])


@pytest.mark.parametrize("source", ["import passes", "from kernels.x import OP", "import_module('passes.x')"])
def test_a_second_copy_is_seen(source: str) -> None:
    assert second_copies(source)
    assert not second_copies("from . import passes\nfrom .kernels import x\nimport graphopt.passes")


# Pickle


def pickles(source: str) -> list[str]:
    """Uses of pickle, of what is built on it, and of `torch.load` and `torch.save` under any name."""
    faults = []
    torch_names = {"torch": "torch"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            torch_names |= {a.asname: a.name for a in node.names if a.asname and a.name.startswith("torch")}
    for line, name in imports(source):
        if name.split(".")[0] in PICKLES or name in TORCH_PICKLES:
            faults.append(f"{line}: {name}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if f"{torch_names.get(first, first)}.{rest}" in TORCH_PICKLES:
                faults.append(f"{node.lineno}: {ast.unparse(node)}")
        elif (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and ast.unparse(node.value) != "False"
        ):
            faults.append(f"{node.lineno}: {ast.unparse(node)}")
    return faults


def test_no_pickle_is_shipped() -> None:
    none([fault for _, path in shipped() for fault in at(path, pickles(path.read_text()))])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "def f():\n    import joblib",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.save(x, 'x')",
        "import torch.serialization as s\ns.load('x')",
        "from torch import load as read",
        "numpy.load('x', allow_pickle=True)",
    ],
)
def test_a_pickle_is_seen(source: str) -> None:
    assert pickles(source)


def test_reading_an_exported_program_is_no_pickle() -> None:
    assert not pickles("import torch\ntorch.export.load('x')\nnumpy.load('x', allow_pickle=False)")


# Size


def too_long(source: str, file_lines: int, function_lines: int | None = None) -> list[str]:
    """Files and functions over the limit; a function's docstring does not count."""
    lines = len(source.splitlines())
    faults = [f"1: {lines} lines, limit {file_lines}"] if lines > file_lines else []
    for node in ast.walk(ast.parse(source)):
        if function_lines and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node):
                length -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if length > function_lines:
                faults.append(f"{node.lineno}: {node.name} has {length} lines, limit {function_lines}")
    return faults


def test_files_and_functions_are_short() -> None:
    faults = []
    for _, path in shipped():
        faults += at(path, too_long(path.read_text(), FILE_LINES, FUNCTION_LINES))
    for path in sorted((ROOT / "tests").rglob("*.py")):
        faults += at(path, too_long(path.read_text(), TEST_FILE_LINES))
    none(faults)


def test_a_long_file_and_a_long_function_are_seen() -> None:
    body = "    x = 1\n" * FUNCTION_LINES
    assert too_long("x = 1\n" * (FILE_LINES + 1), FILE_LINES)
    assert too_long(f"class C:\n  def f():\n{body}", FILE_LINES, FUNCTION_LINES)
    assert too_long(f"async def f():\n{body}", FILE_LINES, FUNCTION_LINES)
    documented = 'def f():\n    """One.\n\n    Three.\n    """\n' + "    x = 1\n" * (FUNCTION_LINES - 1)
    assert not too_long(documented, FILE_LINES, FUNCTION_LINES)


# Paths


def home_paths(text: str) -> list[str]:
    return [
        f"{number}: {match.group()}"
        for number, line in enumerate(text.splitlines(), 1)
        for match in HOME_PATH.finditer(line)
    ]


def test_no_file_holds_a_path_of_somebodys_machine() -> None:
    none([f for p in repository() for f in at(p, home_paths(p.read_text(errors="ignore")))])


@pytest.mark.parametrize("folder", ["home/ann", "root", "Users/ann", "work"])
def test_a_path_of_somebodys_machine_is_seen(folder: str) -> None:
    assert home_paths(f'{{"command": "python /{folder}/graphopt/bench/run.py"}}')
    assert not home_paths(f"https://example.org/{folder}/graphopt and build/{folder}/x")


# One file a pass, one file a kernel


def members(folder: str) -> list[Path]:
    """The files of passes/ or kernels/ that each hold one member."""
    files = sorted((ROOT / folder).glob("*.py"))
    return [path for path in files if not path.name.startswith("_") and path.name != "default.py"]


def registers_last(name: str, kind: str, tree: ast.Module) -> list[str]:
    """A file ends in `OP = register(Op("name of the file", ...))`, or the same with PASS and Pass."""
    wanted = rf"{kind.upper()}\b.*= register\({kind}\((name=)?'{name}'"
    if tree.body and re.match(wanted, ast.unparse(tree.body[-1])):
        return []
    return [f'1: the last statement must be `{kind.upper()} = register({kind}("{name}", ...))`']


def unlisted(module: str, list_file: str, source: str) -> list[str]:
    """A member that the list of all members does not import is never registered."""
    listed = {target for _, target in imports(source)}
    return [] if module in listed else [f"1: not imported by {list_file}"]


def pass_faults(name: str, source: str, test: Path) -> list[str]:
    tree = ast.parse(source)
    faults = registers_last(name, "Pass", tree)
    if "->" not in (ast.get_docstring(tree) or ""):
        faults.append("1: the docstring must be the rewrite: `Before -> After`")
    if not test.is_file():
        faults.append(f"1: no test: {test.relative_to(ROOT)}")
    return faults


def kernel_faults(name: str, source: str) -> list[str]:
    tree = ast.parse(source)
    faults = registers_last(name, "Op", tree)
    if "=" not in (ast.get_docstring(tree) or ""):
        faults.append("1: the docstring must be the formula: `y = f(x)`")
    return faults


def test_every_pass_states_its_rewrite_and_has_a_test() -> None:
    faults = []
    for path in members("passes"):
        test = ROOT / "tests" / "passes" / f"test_{path.name}"
        faults += at(path, pass_faults(path.stem, path.read_text(), test))
    none(faults)


@pytest.mark.parametrize("list_file", ["passes/default.py", "kernels/__init__.py"])
def test_every_pass_and_kernel_is_listed(list_file: str) -> None:
    folder, source = list_file.split("/")[0], (ROOT / list_file).read_text()
    found = {path: unlisted(f"graphopt.{folder}.{path.stem}", list_file, source) for path in members(folder)}
    none([fault for path, faults in found.items() for fault in at(path, faults)])


def test_an_unlisted_pass_is_seen() -> None:
    assert unlisted("graphopt.passes.fold", "x.py", "from graphopt.passes import fold_index")
    assert not unlisted("graphopt.passes.fold", "x.py", "from graphopt.passes import fold, fold_index")


def test_every_kernel_states_its_formula_and_registers_last() -> None:
    none([f for path in members("kernels") for f in at(path, kernel_faults(path.stem, path.read_text()))])


@pytest.mark.parametrize(
    ("docstring", "test", "last"),
    [
        ("Folds constants.", "test_house.py", "PASS = register(Pass('fold', rewrite))"),
        ("Add(x, 0) -> x", "test_of_nothing.py", "PASS = register(Pass('fold', rewrite))"),
        ("Add(x, 0) -> x", "test_house.py", "PASS = register(Pass('other', rewrite))"),
        ("Add(x, 0) -> x", "test_house.py", "PASS = register(Pass('fold', rewrite))\nx = 1"),
    ],
)
def test_a_pass_against_the_rules_is_seen(docstring: str, test: str, last: str) -> None:
    here = Path(__file__).resolve()
    assert pass_faults("fold", f"'{docstring}'\n{last}", here.with_name(test))
    assert not pass_faults("fold", "'Add(x, 0) -> x'\nPASS: Pass = register(Pass('fold', rewrite))", here)


@pytest.mark.parametrize(
    ("docstring", "last"),
    [
        ("RMS norm.", "OP = register(Op('norm', SCHEMA))"),
        ("y = x / rms(x)", "OP = register(Op('other', SCHEMA))"),
        ("y = x / rms(x)", "OP = register(Op('norm', SCHEMA))\nx = 1"),
    ],
)
def test_a_kernel_against_the_rules_is_seen(docstring: str, last: str) -> None:
    assert kernel_faults("norm", f"'{docstring}'\n{last}")
    assert not kernel_faults("norm", "'y = x / rms(x)'\nOP = register(Op(name='norm', schema=SCHEMA))")
