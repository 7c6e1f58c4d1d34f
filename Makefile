# Two commands matter: `make quickstart` and `make test`. Both build .venv from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread per process: several small processes share the cores without fighting for them.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

# `make test-oldest` keeps torch as above; TORCH=2.11.0 is the oldest supported one.
OLDEST := .venv-oldest
TORCH ?= $(patsubst torch==%,%,$(shell grep '^torch==' constraints.txt))
ORACLES := tests/test_engine_equivalence.py tests/test_engine_generate.py tests/test_stages.py \
	tests/test_checkpoint.py tests/test_method_oracles.py tests/test_positions.py \
	tests/test_combined.py tests/test_yopo.py tests/families tests/test_family_oracles.py \
	tests/test_family_generate.py tests/test_family_scores.py tests/test_family_methods.py \
	tests/test_family_method_answers.py tests/test_family_video.py tests/test_family_input.py \
	tests/test_add_a_family.py tests/test_callers.py tests/test_inner_call.py \
	tests/test_downsample.py tests/test_attention_received.py tests/test_repeats.py \
	tests/serving/test_running.py tests/serving/test_core.py tests/serving/test_saying.py \
	tests/serving/test_encoder.py

# vLLM's CPU build (a package of its own, 3.5 GB) in an environment of its own.
VLLM := .venv-vllm

.PHONY: install quickstart test test-fast test-oldest test-vllm lint types check clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-e '.[train,quant,trl,wandb,plots,app,serve,search,examples,dev]'
	touch $(READY)

quickstart: $(READY)  ## data, pruned LoRA through DeepSpeed, inference, a table and pictures
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m train.quickstart

test: $(READY)  ## the whole suite, slow end-to-end runs included
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 2 --dist loadgroup --ignore tests/vllm

test-fast: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 2 --dist loadgroup --ignore tests/vllm -m 'not slow'

$(OLDEST)/.ready-$(TORCH): pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints-oldest.txt torch==$(TORCH) -e '.[search,serve]' pytest pytest-xdist hypothesis
	touch $@

test-oldest: $(OLDEST)/.ready-$(TORCH)  ## the oracles with the oldest supported transformers
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadgroup $(ORACLES)

$(VLLM)/.ready: constraints-vllm.txt $(READY)
	rm -rf $(VLLM)
	$(BIN)/python -m tests.vllm.environment $(VLLM)
	touch $@

test-vllm: $(READY)  ## the real vLLM; skipped, with the reason, where it cannot be had
	-$(MAKE) --no-print-directory $(VLLM)/.ready
	PATH="$(CURDIR)/$(BIN):$$PATH" ITPRUNE_VLLM_ENV=$(CURDIR)/$(VLLM) \
		$(BIN)/python -m pytest -n 0 -rs tests/vllm

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) $(OLDEST) $(VLLM) build outputs *.egg-info
