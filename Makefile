# `make quickstart` and `make test` do all the set-up on a fresh machine: Python 3.11+, make, a C compiler, a package index.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
RUN := results/quickstart
# The extra: gpu where a driver answers, otherwise cpu.
EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
RECIPE := recipes/quickstart.yaml
# A CUDA build of vLLM needs a GPU, so there the tiny model runs on one, in bfloat16.
OVERRIDES ?= $(if $(filter gpu,$(EXTRA)),cluster.gpus_per_node=1 policy.precision=bfloat16)

.PHONY: quickstart test test-fast test-gpu lint clean

quickstart: .venv/installed-$(EXTRA) $(RUN)/model data/quickstart/train.jsonl
	rm -rf $(RUN)/logs $(RUN)/checkpoints
	$(BIN)/python train_grpo.py --config $(RECIPE) $(OVERRIDES)
	@echo "Metrics and samples: $(RUN)/logs   checkpoints: $(RUN)/checkpoints"
	@echo "To draw them: $(BIN)/python plot_run.py $(RUN)/logs --output $(RUN)/run.png"

data/quickstart/train.jsonl: | .venv/installed-$(EXTRA)
	$(BIN)/python prepare_data.py arithmetic --kinds add --max-operand 20 --output data/quickstart --overwrite

$(RUN)/model: | data/quickstart/train.jsonl
	$(BIN)/python recipes/quickstart_model.py --data data/quickstart/train.jsonl --output $@

# Two processes at a time, since most tests wait or have one thread: these files beside all others, which take as long.
# What they print comes when the others are done. Ctrl-C and SIGTERM stop both: each has a process group of its own.
BESIDE := $(foreach name,slurm launch judge models verifier attention reward_server reward_client prepare_data,\
	tests/test_$(name).py)
test: .venv/installed-$(EXTRA) .venv/installed-dev lint
	@set -m; trap 'kill -INT -- -$$one -$$two' INT TERM; printed=$$(mktemp); \
	$(BIN)/python -m pytest -m "not gpu" $(BESIDE) < /dev/null > $$printed 2>&1 & two=$$!; \
	$(BIN)/python -m pytest -m "not gpu" $(BESIDE:%=--ignore=%) < /dev/null & one=$$!; \
	wait $$one; first=$$?; wait $$two; second=$$?; wait; cat $$printed; rm $$printed; exit $$((first | second))

test-fast: .venv/installed-$(EXTRA) .venv/installed-dev lint
	$(BIN)/python -m pytest -m "not gpu and not slow"

test-gpu: .venv/installed-$(EXTRA) .venv/installed-dev
	$(BIN)/python -m pytest -m gpu

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; run make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip

# Versions are in pyproject.toml, those that were tested in requirements/; tools/requirements.py prints what is asked for.
.venv/installed-cpu: pyproject.toml requirements/cpu.txt | .venv/bin/pip
	@echo "installing for the CPU, about two minutes the first time"
	bash tools/install_cpu.sh $(BIN)
	@touch $@

.venv/installed-gpu: pyproject.toml requirements/gpu.txt | .venv/bin/pip
	@echo "installing for the GPU, some minutes the first time"
	$(BIN)/pip install -q $$($(BIN)/python tools/requirements.py main gpu)
	@touch $@

.venv/installed-dev: pyproject.toml requirements/dev.txt | .venv/installed-$(EXTRA)
	$(BIN)/pip install -q $$($(BIN)/python tools/requirements.py dev)
	@touch $@

clean:
	rm -rf .venv .venv-gym data/quickstart $(RUN)
