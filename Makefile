PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet

.PHONY: demo check lint types quick-tests test docs docs-serve wheel quality speed gpu clean help

help:
	@echo "make demo     quantize and evaluate a small real model, in a few minutes"
	@echo "make check    before each commit: lint, types and the quick tests, in under two minutes"
	@echo "make test     run all tests"
	@echo "make docs     build the documentation in site/; warnings are errors (make docs-serve shows it)"
	@echo "make wheel    build one wheel with the compiled kernels, for every Python and torch, in dist/"
	@echo "make quality  measure every scheme on SmolLM2-135M: make quality DATA=wiki.test.raw"
	@echo "make gpu      check and measure the CUDA kernels on this machine's GPU, in nine minutes, without a network"
	@echo "make speed    compare the speed of export with cp, calibrate and eval with a forward pass, CPU kernels with memcpy (25 GB of disk)"

demo: $(VENV)/installed
	$(VENV)/bin/quantkit demo --overwrite

# The type checker takes one core while the tests start.
check: $(VENV)/installed
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint types quick-tests

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/installed
	$(VENV)/bin/mypy

# tests/conftest.py makes the groups and their order.
PYTEST := $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 \
	--dist loadfile --no-loadscope-reorder

quick-tests: $(VENV)/installed
	$(PYTEST) -m "not slow"

test: $(VENV)/installed
	$(PYTEST)

# Pages that follow from code and measurements are committed; `python docs/generate.py` writes them.
docs: $(VENV)/installed
	$(VENV)/bin/python docs/generate.py --check
	$(VENV)/bin/zensical build --clean --strict

docs-serve: $(VENV)/installed
	$(VENV)/bin/zensical serve

wheel: $(VENV)/installed
	$(PIP) wheel --no-deps --wheel-dir dist .
	@ls dist/*.whl

quality: $(VENV)/installed
	$(VENV)/bin/python benchmarks/quality.py --data $(DATA)

speed: $(VENV)/installed
	$(VENV)/bin/python kernels/bench/quantize_blocks.py -o kernels/bench/results/quantize_blocks.md
	$(VENV)/bin/python kernels/bench/observe_rows.py -o kernels/bench/results/observe_rows.md
	$(VENV)/bin/python kernels/bench/matmul.py -o kernels/bench/results/matmul.md --json kernels/bench/results/matmul.json
	$(VENV)/bin/python kernels/bench/score_logits.py -o kernels/bench/results/score_logits.md
	$(VENV)/bin/python kernels/bench/eval_levels.py -o kernels/bench/results/eval_levels.md
	$(VENV)/bin/python benchmarks/export.py
	$(VENV)/bin/python benchmarks/calibrate.py
	$(VENV)/bin/python benchmarks/eval.py

gpu:
	$(PYTHON) kernels/bench/gpu.py

# The stamp is written last, so an interrupted install starts again.
$(VENV)/installed: pyproject.toml constraints.txt $(wildcard kernels/CMakeLists.txt kernels/cpu/* kernels/cuda/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build site .cache quantkit-demo
