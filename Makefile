# the commands of this project; `make help` lists them
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALL := $(PIP) install --no-build-isolation -c constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: help demo test tests interpreted scale audit asan fuzz lint format recipe bench benchtests pages docs gpu gpu-proof gpu-measure gpu-kit wheel clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## label the committed recordings and print label, truth and error rate
	$(BIN)/python examples/demo.py $(ARGS)

test: lint tests audit ## lint, the fast test suite, then the audit of the GPU kernels

tests: $(VENV)/.dev ## the fast test suite alone; ARGS="-k NAME" and the like go to pytest, once, without `interpreted`
	$(BIN)/python -m pytest -q -n auto -m "not slow and not gpu" $(ARGS)
	$(if $(ARGS),,$(MAKE) --no-print-directory interpreted)

# Triton reads the setting when it compiles, so that this wants a process of its own
interpreted: $(VENV)/.dev ## the Triton kernels' tests on the CPU, in Triton's interpreter; part of `tests`
	@if $(BIN)/python -c 'import triton' 2>/dev/null; then \
	  TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n auto -m "not slow and not gpu" -k triton \
	    $(wildcard tests/test_ops_*.py tests/test_triton_*.py) $(ARGS); \
	else echo "Triton is not installed here: its kernels are not tested"; fi

scale: $(VENV)/.scale ## tests of labelling by datatrove, on Ray and by Slurm (where there is one), with workers killed; minutes
	$(BIN)/python -m pytest -q -n 0 tests/test_label_datatrove.py tests/test_label_ray.py tests/test_label_slurm.py $(ARGS)

# a build of its own, which is found before the installed one; the sanitizer must be there before anybody allocates, and
# libstdc++ with it, or exceptions pass it by
asan: $(VENV)/.dev ## the tests of the C++ ops, and of device code on the CPU, under AddressSanitizer and UndefinedBehaviorSanitizer
	SPEAR_FAST_BUILD=require SPEAR_FAST_SANITIZE=address,undefined \
	  $(BIN)/python setup.py -q build --build-base build/asan --build-lib build/asan/lib
	compiler=$${CXX:-c++}; PYTHONPATH=build/asan/lib PYTHONSAFEPATH=1 \
	  LD_PRELOAD="$$($$compiler -print-file-name=libasan.so) $$($$compiler -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 SPEAR_FAST_TEST_SANITIZED=1 \
	  $(BIN)/python -m pytest -q -n auto -m "not slow and not gpu" -k "not triton and not compiles" \
	  $(wildcard tests/test_ops_*.py tests/test_cuda_emulated*.py tests/test_native_step.py) $(ARGS)

fuzz: $(VENV)/.dev ## ops and native classes with hostile arguments, under an electric fence; ARGS="--seed 0 --cases 1000"
	$(BIN)/python tests/fuzz/fuzz_ops.py $(ARGS)

audit: $(VENV)/.dev ## compile the GPU kernels, without a GPU, and look for spilled registers and the like; AUDIT="--only WORD"
	TRITON_INTERPRET= $(BIN)/python -m spear_fast.kernels.audit $(AUDIT)

lint: $(VENV)/.dev ## ruff, mypy, the import-direction rule and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/.dev ## let ruff and clang-format mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

recipe: $(VENV)/.recipe ## speak sentences, train and measure the demo's model from scratch
	@command -v espeak-ng >/dev/null || { echo "make recipe speaks its sentences with espeak-ng, which is not installed: apt-get install espeak-ng (or brew install espeak-ng)" >&2; exit 1; }
	$(BIN)/python examples/espeak/recipe.py $(ARGS)

bench: $(VENV)/.dev ## measure this machine: ARGS="op --ops rms_norm", "generate --cases b8-beam4", "train", "compare"
	$(BIN)/python -m benchmarks $(or $(ARGS),op)

benchtests: $(VENV)/.dev ## the cases of the ops under pytest-benchmark; ARGS="--benchmark-compare" and the like go to it
	$(BIN)/python -m pytest -q -n 0 benchmarks/test_operations.py $(ARGS)

pages: $(VENV)/.dev ## write the tables of README.md and docs, and the picture, from the committed rows
	$(BIN)/python -m benchmarks pages

docs: $(VENV)/.docs ## build the documentation into build/docs; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

gpu: ## on a machine with a CUDA GPU: build, prove, measure and test there, into OUT (benchmarks/results); no network
	$(PYTHON) -m benchmarks gpu --out $(or $(OUT),benchmarks/results) $(ARGS)

gpu-proof: ## the first minutes there: whether all is right, and what a step takes; under four minutes after the build
	$(PYTHON) -m benchmarks gpu --stages build info proof --budget $(or $(BUDGET),400) --out $(or $(OUT),benchmarks/results) $(ARGS)

gpu-measure: ## rows of steps, labelling, ops, generation, training and peers; STAGES="step op" selects
	$(PYTHON) -m benchmarks gpu --budget $(or $(BUDGET),360) --out $(or $(OUT),benchmarks/results) \
	  --stages build $(or $(STAGES),step label op generate train label-peers generate-peers) $(ARGS)

gpu-kit: $(VENV)/.dev ## without a GPU: what a GPU machine without a network would build first, into build/gpu-kit; ARGS="--torch 2.11.*"
	$(BIN)/python -m benchmarks.kit build $(ARGS)

wheel: $(VENV)/.torch ## a wheel with the extension, for all x86-64 machines or those like this one, in dist/
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

clean: ## remove the environment and everything built (not what the recipe trained, build/espeak)
	rm -rf $(VENV) build/lib* build/temp* build/bdist* build/asan build/audit build/fuzz build/docs build/gpu-kit* dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f spear_fast/_C*.so spear_fast/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch: constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "spear_fast needs Python 3.11 or newer and found no $(PYTHON): name one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "spear_fast needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) -V 2>&1): name another with make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch: some minutes, once"
	$(PIP) install -c constraints.txt torch numpy "setuptools>=77" ninja
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(INSTALL) -e ".[label]" jiwer
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES) tests/requirements-reference.txt
	SPEAR_FAST_BUILD=require $(INSTALL) -e ".[dev]"
	$(PIP) install --no-deps -r tests/requirements-reference.txt
	touch $@

$(VENV)/.scale: $(VENV)/.dev
	SPEAR_FAST_BUILD=require $(INSTALL) -e ".[datatrove,ray]"
	touch $@

$(VENV)/.docs: $(VENV)/.torch $(SOURCES)
	$(INSTALL) -e ".[docs]"
	touch $@

$(VENV)/.recipe: $(VENV)/.torch $(SOURCES)
	$(INSTALL) -e ".[recipe]"
	touch $@
