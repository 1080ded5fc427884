# Every target sets itself up: a fresh clone needs nothing but Python 3.11 and make.
PYTHON ?= python3.11
DEMO := .venv
TEST := .venv-test
EXECUTORCH := .venv-executorch
LITERT := .venv-litert
ZOO := torchvision==0.28.0 timm==1.0.31 huggingface_hub==2.4.0
ZOO_PATH := $(TEST)/zoo:../shared/tools

.PHONY: help demo test test-slow test-alone lint format bench clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(DEMO)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo]'
	@touch $@

PLUGINS := plugins/slimkit-aoti plugins/slimkit-octav plugins/slimkit-openvino plugins/slimkit-remote \
	plugins/slimkit-ria plugins/slimkit-skd plugins/slimkit-tensorrt

# torchvision and timm lie apart, for tests that run architectures in a process of their own: beside
# a CPU build of torch, torchvision does not import, and torchmetrics imports it where it finds it.
$(TEST)/.ready: pyproject.toml constraints.txt $(PLUGINS:=/pyproject.toml)
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' $(PLUGINS:%=--editable %)
	$(TEST)/bin/pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(TEST)/zoo $(ZOO)
	@touch $@

# LiteRT's converter asks for versions that slimkit's own dependencies do not allow: an environment
# of its own, and what the converter imports by name.
$(LITERT)/.ready: pyproject.toml constraints.txt plugins/slimkit-litert/pyproject.toml plugins/slimkit-litert/converter.txt
	$(PYTHON) -m venv $(LITERT)
	$(LITERT)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable . --editable plugins/slimkit-litert pytest pytest-timeout
	$(LITERT)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement plugins/slimkit-litert/converter.txt
	@touch $@

# ExecuTorch lies apart: it brings the converters of a dozen other backends along.
$(EXECUTORCH)/.ready: pyproject.toml constraints.txt plugins/slimkit-executorch/pyproject.toml
	$(PYTHON) -m venv $(EXECUTORCH)
	$(EXECUTORCH)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' --editable plugins/slimkit-executorch
	@touch $@

demo: $(DEMO)/.ready  ## prune, distil, quantize, export and prove, on real data, in 3 minutes
	$(DEMO)/bin/slimkit run demo --output runs/demo

test: lint  ## all checks of CI
	OMP_NUM_THREADS=1 $(TEST)/bin/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(TEST)/.ready $(LITERT)/.ready $(EXECUTORCH)/.ready  ## tests that take minutes
	$(TEST)/bin/python -m pytest -m slow
	$(LITERT)/bin/python -m pytest plugins/slimkit-litert/tests
	$(EXECUTORCH)/bin/python -m pytest plugins/slimkit-executorch/tests

test-alone: $(TEST)/.ready  ## the core without any plugin, and each plugin without the others
	SLIMKIT_PLUGINS= OMP_NUM_THREADS=1 $(TEST)/bin/python -m pytest -m "not slow" -n 2 tests/testing/test_conformance.py tests/test_registry.py tests/test_cli.py
	for p in $(PLUGINS:plugins/slimkit-%=%); do SLIMKIT_PLUGINS=$$p $(TEST)/bin/python -m pytest -m "not slow" plugins/slimkit-$$p/tests || exit 1; done

lint: $(TEST)/.ready  ## style, types and the direction of imports
	$(TEST)/bin/ruff check
	$(TEST)/bin/ruff format --check
	$(TEST)/bin/mypy
	$(TEST)/bin/lint-imports --no-logo

format: $(TEST)/.ready  ## rewrite the code in the house's style
	$(TEST)/bin/ruff check --fix
	$(TEST)/bin/ruff format

bench: $(TEST)/.ready $(LITERT)/.ready $(EXECUTORCH)/.ready  ## all of benchmarks/, hours; SLIMKIT_DATA names the data folder
	PYTHONPATH=$(ZOO_PATH) $(TEST)/bin/python benchmarks/zoo/run.py --output runs/zoo
	PYTHONPATH=$(ZOO_PATH) $(TEST)/bin/python benchmarks/zoo/run.py --tool torch-pruning --output runs/zoo-peer
	PYTHONPATH=$(ZOO_PATH) $(TEST)/bin/python benchmarks/zoo/versus.py --output runs/versus.md
	PYTHONPATH=$(ZOO_PATH) $(TEST)/bin/python benchmarks/zoo/quantized.py --output runs/zoo-quantized
	PYTHONPATH=.:benchmarks:$(ZOO_PATH) $(TEST)/bin/python benchmarks/zoo/targets.py --data $(SLIMKIT_DATA) --output runs/targets --python litert=$(LITERT)/bin/python --python executorch=$(EXECUTORCH)/bin/python
	PYTHONPATH=.:benchmarks $(TEST)/bin/python benchmarks/rounding.py --output runs/rounding.md
	PYTHONPATH=.:benchmarks $(TEST)/bin/python benchmarks/criteria.py --data $(SLIMKIT_DATA) --output runs/criteria.md
	PYTHONPATH=.:benchmarks $(TEST)/bin/python benchmarks/allocation.py --data $(SLIMKIT_DATA) --output runs/allocation.md
	PYTHONPATH=. $(TEST)/bin/python benchmarks/sensitivity.py --data $(SLIMKIT_DATA) --output runs/sensitivity.md
	PYTHONPATH=.:benchmarks $(TEST)/bin/python benchmarks/recovery.py --data $(SLIMKIT_DATA) --work runs/recovery --output runs/recovery.md
	PYTHONPATH=. $(TEST)/bin/python benchmarks/qat_step.py --output runs/qat_step.md
	PYTHONPATH=. $(TEST)/bin/python benchmarks/distillation_step.py --output runs/distillation_step.md
	PYTHONPATH=.:benchmarks $(TEST)/bin/python benchmarks/distillation.py --data $(SLIMKIT_DATA) --work runs/distillation --output runs/distillation.md
	PYTHONPATH=.:benchmarks $(TEST)/bin/python benchmarks/ddp.py --data $(SLIMKIT_DATA) --output runs/ddp.md
	PYTHONPATH=.:benchmarks:$(ZOO_PATH) $(TEST)/bin/python benchmarks/calibration.py --output runs/calibration.md
	$(TEST)/bin/pip install --quiet --constraint constraints.txt pycocotools
	PYTHONPATH=.:benchmarks $(TEST)/bin/python benchmarks/rewriting.py --data $(SLIMKIT_DATA) --output runs/rewriting.md
	PYTHONPATH=.:benchmarks $(TEST)/bin/python benchmarks/quantization.py --data $(SLIMKIT_DATA) --output runs/quantization.md
	$(TEST)/bin/slimkit run benchmarks/cifar10/recipe.yaml --output runs/cifar10

clean:  ## remove environments and caches, keep runs/
	rm -rf $(DEMO) $(TEST) $(LITERT) $(EXECUTORCH) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
