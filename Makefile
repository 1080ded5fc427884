# Every target sets itself up: a fresh clone needs nothing but Python 3.11 and make.
PYTHON ?= python3.11
DEMO := .venv
TEST := .venv-test

.PHONY: help demo test test-slow lint format bench clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(DEMO)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo]'
	@touch $@

$(TEST)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(DEMO)/.ready  ## prune, distil, quantize, export and prove, on real data, in 3 minutes
	$(DEMO)/bin/slimkit run demo --output runs/demo

test: lint  ## all checks of CI
	$(TEST)/bin/python -m pytest -m "not slow"

test-slow: $(TEST)/.ready  ## tests that take minutes
	$(TEST)/bin/python -m pytest -m slow

lint: $(TEST)/.ready  ## style, types and the direction of imports
	$(TEST)/bin/ruff check
	$(TEST)/bin/ruff format --check
	$(TEST)/bin/mypy
	$(TEST)/bin/lint-imports --no-logo

format: $(TEST)/.ready  ## rewrite the code in the house's style
	$(TEST)/bin/ruff check --fix
	$(TEST)/bin/ruff format

bench: $(TEST)/.ready  ## CIFAR-10 on a pretrained ResNet-56; SLIMKIT_DATA names the data folder
	$(TEST)/bin/slimkit run benchmarks/cifar10/recipe.yaml --output runs/cifar10

clean:  ## remove environments and caches, keep runs/
	rm -rf $(DEMO) $(TEST) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
