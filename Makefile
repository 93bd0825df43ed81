# Two commands matter: `make quickstart` (text in, chat endpoint out) and `make test`.
#   make quickstart MODEL=tiny-moe          the same with a Mixture-of-Experts
#   make setup TORCH_INDEX=URL              take torch from an index of your choice (PyTorch has one for CPUs)
#   make setup PYTHON=/path/to/python3.11   another interpreter
#   make test WORKERS=4                     tests in four processes instead of two (0: in one, as a debugger wants it)
#   make setup-vllm                         adds vLLM (CPU or CUDA build) for serve_vllm.py

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV ?= .venv
MODEL ?= tiny
TORCH_INDEX ?=
PYTEST_ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
# nvidia-smi answers only where a driver and a GPU are present: choose the packages by that.
ACCELERATOR := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)

define TORCH_CHECK
import sys, torch
print("torch", torch.__version__, "- sees", torch.cuda.device_count(), "GPU(s)")
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("error: there is a GPU, but this torch cannot use it: see `nvidia-smi` and choose a build for your"
             " driver, then make setup TORCH_INDEX=URL with the address of PyTorch's index for it")
if sys.argv[1] == "cpu" and torch.version.cuda:
    print("note: a CUDA build without a GPU works, but is large; smaller: remove $(VENV), then make setup"
          " TORCH_INDEX=URL with the address of PyTorch's CPU index")
endef
export TORCH_CHECK

# A file's tests stay together: they share what they set up. Threads that wait must not take the core of those that work.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Whole scripts, several processes, browsers, notebooks: what `make test-fast` leaves out.
LONG_TESTS := benchmarks cluster export gpu insight_runs launch_configs notebooks order parallel preferences prepare_hub \
  progress recipes resume runtime shards strategies training training_scripts upcycle
LONG_SERVING_TESTS := app clients guard load scripts

.PHONY: help setup setup-vllm quickstart test test-fast test-all lint clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(VENV)/.installed

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	"$(PYTHON)" -m venv "$(VENV)"

# The stamp is written last, so an interrupted installation is continued and a finished one is not repeated.
$(VENV)/.installed: requirements.txt requirements-dev.txt | $(BIN)/python
	@echo "installing for $(ACCELERATOR) into $(VENV)"
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	@$(BIN)/python -c "$$TORCH_CHECK" $(ACCELERATOR)
	touch $@

setup-vllm: $(VENV)/.installed-vllm

$(VENV)/.installed-vllm: requirements-vllm-$(ACCELERATOR).txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-vllm-$(ACCELERATOR).txt
ifeq ($(ACCELERATOR),cpu)
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	touch $@

quickstart: setup
	PATH="$(abspath $(BIN)):$$PATH" MODEL="$(MODEL)" bash recipes/quickstart.sh

test: setup
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-fast: setup
	$(PYTEST) -m "not slow" $(LONG_TESTS:%=--ignore=tests/test_%.py) \
	  $(LONG_SERVING_TESTS:%=--ignore=tests/serving/test_%.py) --ignore=tests/evaluation/test_harness.py $(PYTEST_ARGS)

test-all: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# Generated files only; the environment stays (remove $(VENV) by hand to start anew).
clean:
	rm -rf out output data/pretrain data/sft data/dpo data/lora data/exam .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
