"""Import every module of the installed graphopt and load its commands.

`make wheel-test` runs this outside the checkout, in a venv that holds the wheel and nothing else: a package
that pyproject.toml forgot, a dependency that only `dev` brings and an import that only the checkout resolves
fail here.
"""

import importlib
import importlib.metadata
import pkgutil
import sys
from pathlib import Path

import graphopt

installed = Path(graphopt.__file__).resolve().parent
if not installed.is_relative_to(Path(sys.prefix).resolve()):
    sys.exit(f"graphopt came from {installed}, not from the venv in {sys.prefix}")

names = [module.name for module in pkgutil.walk_packages(graphopt.__path__, "graphopt.")]
for name in names:
    importlib.import_module(name)

# walk_packages passes over a folder without __init__.py: count the files too.
files = {path for path in installed.rglob("*.py") if path.name != "__init__.py"}
walked = {Path(module.__file__ or "") for name in names if (module := sys.modules[name])}
if missed := files - walked:
    sys.exit(f"in the wheel, but not importable: {sorted(map(str, missed))}")

for entry in importlib.metadata.distribution("graphopt").entry_points:
    if entry.group != "pytest11":  # pytest loads it, so pytest is there then
        entry.load()
print(f"imported graphopt and {len(names)} modules of the wheel")
