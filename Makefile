# Builds, runs and tests Trivium in its own .venv. Needs Python >= 3.11 and make, nothing else.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint requirements.lock

.PHONY: help install quickstart demo tokenizers test test-long test-gpu lint format notebook bench clean

help:
	@echo "make quickstart   watch models learn, from nothing and then in every way (installs what it needs; minutes)"
	@echo "make demo         teach a real chat model a format and a persona (downloads 93 MB more; minutes)"
	@echo "make install      the command .venv/bin/trivium"
	@echo "make test         the tests; also test-long, test-gpu, lint, format, bench, clean"

install: .venv/core.stamp

quickstart: .venv/core.stamp
	$(BIN)/trivium quickstart

demo: .venv/core.stamp
	$(BIN)/trivium demo

# The published Qwen tokenizers, from packages, into .cache/tokenizers.
tokenizers: .venv/dev.stamp
	$(BIN)/python -m tests.support.qwen_tokenizers

test: tokenizers
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not long"

test-long: tokenizers
	$(BIN)/pytest -q -m long

test-gpu: .venv/dev.stamp
	$(BIN)/pytest -q -m gpu

lint: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports --no-logo
	$(BIN)/python bench/readme.py --check
	$(BIN)/python bench/planner_page.py --check

format: .venv/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Run the example and write its outputs back.
notebook: .venv/dev.stamp
	$(BIN)/python examples/execute.py
	$(BIN)/ruff format examples

# bench/tokenize_corpus.py needs a checkout of Megatron-LM and bench/sft.py a folder with Qwen3's tokenizer: run them by hand.
bench: .venv/dev.stamp
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/pretrain.py
	$(BIN)/python bench/readme.py
	$(BIN)/python bench/planner_page.py

clean:
	rm -rf .venv .cache .pytest_cache .hypothesis .ruff_cache .import_linter_cache dist
	find src tests bench examples -name __pycache__ -prune -exec rm -rf {} +

# The build backend is installed first, from the lock, so that nothing that pip fetches floats.
.venv/core.stamp: pyproject.toml requirements.lock
	@echo "Installing Trivium into .venv; this is done once and takes a few minutes."
	$(PYTHON) -m venv .venv
	$(INSTALL) hatchling editables
	$(INSTALL) --no-build-isolation --editable ".[gpu,demo]"
	touch $@

.venv/dev.stamp: .venv/core.stamp
	$(INSTALL) --no-build-isolation --editable ".[dev]"
	touch $@
