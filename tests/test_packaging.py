"""pyproject.toml and constraints.txt say what the folders hold: no package, data file or pin is forgotten."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {"graphopt": "graphopt", "passes": "graphopt.passes", "kernels": "graphopt.kernels"}
OWNERS = importlib.metadata.packages_distributions()

# torch's CUDA builds require these at exact versions, other ones with each build.
PINNED_BY_TORCH = re.compile(r"triton|cuda-.*|nvidia-.*|setuptools")


def packages() -> dict[str, Path]:
    """Every folder that holds Python files, by the name it is installed under."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted({file.parent for file in (ROOT / folder).rglob("*.py")}):
            found[".".join((package, *path.relative_to(ROOT / folder).parts))] = path
    return found


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names_versions = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in names_versions}


def test_every_package_is_shipped() -> None:
    assert sorted(packages()) == sorted(SETUPTOOLS["packages"]), (
        "[tool.setuptools] packages in pyproject.toml"
    )


def test_every_package_has_an_init_file() -> None:
    assert [name for name, path in packages().items() if not (path / "__init__.py").is_file()] == []


def test_every_data_file_is_shipped() -> None:
    forgotten = []
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_dir() or path.suffix in (".py", ".pyc"):
                continue
            owner = ".".join((package, *path.parent.relative_to(ROOT / folder).parts))
            if not any(fnmatch(path.name, glob) for glob in SETUPTOOLS["package-data"].get(owner, [])):
                forgotten.append(str(path.relative_to(ROOT)))
    assert forgotten == [], "[tool.setuptools.package-data] in pyproject.toml"


def test_pins_are_public_versions_inside_the_supported_ranges() -> None:
    assert [f"{name}=={version}" for name, version in pins().items() if "+" in version] == []
    project = PROJECT["project"]
    stated = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    for requirement in map(Requirement, stated):
        if PINNED_BY_TORCH.fullmatch(requirement.name):
            continue
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), requirement


def undeclared(source: str) -> set[str]:
    """Third-party packages that a file imports and `[project] dependencies` does not name."""
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"]}
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        for root in {name.split(".")[0] for name in names} - {"graphopt", *sys.stdlib_module_names}:
            if not declared & {canonicalize_name(owner) for owner in OWNERS.get(root, [root])}:
                found.add(root)
    return found


def test_every_import_of_shipped_code_is_a_dependency() -> None:
    files = [file for folder in packages().values() for file in folder.glob("*.py")]
    faults = {str(file.relative_to(ROOT)): undeclared(file.read_text()) for file in files}
    assert {file: names for file, names in faults.items() if names} == {}


def test_an_undeclared_import_is_seen() -> None:
    assert undeclared("import os\ndef f():\n    from sklearn.cluster import KMeans\n    import nowhere") == {
        "sklearn",
        "nowhere",
    }
    assert (
        undeclared("import torch.nn, onnx_ir, jinja2\nfrom . import x\nfrom graphopt.ir import op") == set()
    )


def test_everything_that_an_install_brings_is_pinned() -> None:
    """Walks what the installed packages require, from graphopt with its extras on."""
    unpinned, seen = set(), set()
    todo = [("graphopt", frozenset({"demo", "dev"}))]
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen or PINNED_BY_TORCH.fullmatch(name):
            continue
        seen.add((name, extras))
        if name != "graphopt" and name not in pins():
            unpinned.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed: `make test` installs everything")
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    assert unpinned == set(), "constraints.txt"
