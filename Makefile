# What a newcomer, a developer and CI run. A clean clone needs only Python 3.11 to 3.13 and make.
# ARGS adds arguments: make test ARGS="tests/ir -k graph"

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
VENV := $(CURDIR)/.venv
RUN := "$(VENV)/bin/python" -m
CLEAN := $(CURDIR)/build/clean

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format types wheel wheel-test clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

demo: .venv/.installed  ## optimize a real model, embed real sentences, write report.html
	$(RUN) examples.demo $(ARGS)

# A file goes to one worker, so that fixtures are made once. A worker has one thread: more threads than cores
# make PyTorch many times as slow. Where MKL is told a number of its own, PyTorch goes by that.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) pytest --numprocesses 2 --dist loadfile

test: .venv/.installed  ## run the tests, but for the slow ones
	$(PYTEST) $(ARGS)

test-all: .venv/.installed  ## run the tests, the slow ones too
	$(PYTEST) --slow $(ARGS)

lint: .venv/.installed  ## look for mistakes and for formatting that differs
	$(RUN) ruff check .
	$(RUN) ruff format --check .

format: .venv/.installed  ## mend what lint can mend
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

# graphopt.passes and graphopt.kernels resolve only in the built tree, so that is what mypy reads: it runs in
# there, before the checkout and the editable install can answer to the same names.
types: wheel  ## type-check what ships
	rm -rf build/tree
	$(RUN) zipfile -e build/wheel/*.whl build/tree
	cd build/tree && $(RUN) mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p graphopt

# build/lib would carry files that the checkout has lost into the wheel.
wheel: .venv/.installed  ## build the wheel into build/wheel
	rm -rf build/lib build/bdist.* build/wheel
	$(RUN) pip wheel --quiet --no-deps --wheel-dir build/wheel .

wheel-test: wheel  ## install the wheel into an empty venv and import every module of it
	rm -rf "$(CLEAN)"
	$(RUN) venv "$(CLEAN)"
	"$(CLEAN)/bin/python" -m pip install --quiet --no-compile -c constraints.txt build/wheel/*.whl
	cd / && "$(CLEAN)/bin/python" -I "$(CURDIR)/.ci/import_every_module.py"
	rm -rf "$(CLEAN)"

clean:  ## remove what was built, the venv excepted
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "graphopt needs Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(RUN) pip --version >/dev/null 2>&1 || $(PYTHON) -m venv "$(VENV)"
	$(RUN) pip install -c constraints.txt -e '.[demo,dev]'
	@touch $@
