# Everything runs in .venv, which `make install` makes from constraints.txt and makes again only when that or pyproject.toml changes.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo test lint docs bench bench-finetuning constraints clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

install: .venv/installed ## make .venv, with all that the other commands need

# torch first and by its pin: a range would bring the newest build, and gigabytes of CUDA with it.
# The build backend next, pinned too, so that the last line needs no environment of its own to build in.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Hanse needs Python 3.11 or newer, and '$(PYTHON)' is not. Name one that is: make PYTHON=python3.11 install" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -q -c constraints.txt hatchling editables
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: install ## fine-tune a vendor's model at a client, as processes of this machine; ends with a table, a verdict and a report
	$(BIN)/python examples/finetuning/demo.py

# Files in the order of their names: the longest are in the middle, where by their number of tests they would come last, when the other
# worker has nothing left to do.
# Ray by itself, since it changes what a signal does to its process.
test: install ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/simulation/test_ray.py
	$(BIN)/python -m pytest tests/simulation/test_ray.py

lint: install ## style, types, and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: install ## build the documentation into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: install ## measure each claim beside a bare loop in the same run
	$(BIN)/python benchmarks

bench-finetuning: install ## measure the claims of vendor–client fine-tuning
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks finetuning

constraints: ## pin the newest versions of everything; run the tests after it
	rm -rf build/pins
	$(PYTHON) -m venv build/pins
	build/pins/bin/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	build/pins/bin/python -m pip install -q '.[dev]'
	{ grep '^#' constraints.txt; build/pins/bin/python -m pip freeze --all --exclude hanse --exclude pip | sed 's/+cpu$$//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/pins

clean: ## remove what the commands made, .venv included
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
