# `make` alone lists the targets.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q -q
STAMP := .venv/.installed
TEST_STAMP := .venv/.test-installed
# The CPU build of torch by default; `make install CUDA=1` takes PyPI's, which brings CUDA on Linux.
TORCH := $(shell grep '^torch==' constraints.txt)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# Implementations by others that tests compare with. Without their dependencies, which would bring
# another torch; a test that misses one is skipped.
ORACLES := spikingjelly loguru rwkv fla-core einops
ifndef CUDA
# Interprets the CUDA kernels. A CUDA build of torch brings its own.
ORACLES += "triton==3.9.0; sys_platform == 'linux'"
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format types imports unit sanitize neon test-gpu soak docs build clean

help:
	@awk -F ': .*## ' '/^[a-z-]+: .*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## set up .venv with everything below (PYTHON=python3.12 picks another Python)

demo: install ## train, convert, measure and serve a small model on this machine
	@$(BIN)/python -m spikelm_serve.demo

test: lint types imports unit ## everything a change must pass

lint: install ## style and formatting, unchanged files
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: install ## rewrite the files in the house format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: install ## mypy, strict
	@$(BIN)/mypy

imports: install ## imports point down, and optional packages stay where they belong
	@$(BIN)/lint-imports

# A file's tests stay in one process: they share what they set up.
WORKERS := -n logical --maxprocesses 4 --dist loadfile

unit: $(TEST_STAMP) ## the tests; warnings are errors
	@$(BIN)/python -m pytest -q $(WORKERS)

TESTED := $(wildcard native/matrix*.cpp) $(addprefix native/,memory.cpp outputs.cpp pool.cpp rows.cpp)

sanitize: ## native matrices and threads against plain loops, watched by address, UB and thread sanitizers
	@mkdir -p build
	@for kinds in address,undefined thread; do \
	  $(CXX) -std=c++20 -O1 -g -fsanitize=$$kinds -fno-sanitize-recover=all -pthread -o build/sanitize \
	    native/sanitize.cpp $(TESTED) && build/sanitize || exit 1; done

ARM_CXX ?= aarch64-linux-gnu-g++
QEMU ?= qemu-aarch64
NEON_FLAGS := -std=c++20 -O3 -Wall -Wextra -Werror -pthread

neon: ## the native code compiled for 64-bit ARM, its matrices and threads run in an emulator
	@for tool in $(ARM_CXX) $(QEMU); do command -v $$tool > /dev/null || \
	  { echo "$$tool is missing; on Debian: apt install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }; done
	@mkdir -p build
	@$(ARM_CXX) $(NEON_FLAGS) -fPIC -shared -Wl,--no-undefined -o build/neon.so \
	  $(filter-out native/sanitize.cpp,$(wildcard native/*.cpp))
	@$(ARM_CXX) $(NEON_FLAGS) -static -o build/neon native/sanitize.cpp $(TESTED)
	@# The second one has no dot products.
	@for cpu in max cortex-a72; do echo "$$cpu:" && $(QEMU) -cpu $$cpu build/neon || exit 1; done

test-gpu: ## the tests that need a CUDA device (BIN=/usr/bin uses a Python outside .venv)
	@$(BIN)/python -m pytest -q -m gpu

soak: install ## the server's long tests: thousands of requests and of fuzzed ones (docs/reliability.md)
	@SPIKELM_FUZZ_CASES=2000 SPIKELM_SOAK_REQUESTS=10000 SPIKELM_KILLS=100 SPIKELM_SCHEMATHESIS=300 \
	  SPIKELM_ATTACKS=1000 \
	  $(BIN)/python -m pytest -q tests/serve \
	  -k "fuzz or soak or killed_while_saving or schemathesis" --log-cli-level=INFO

docs: install ## write docs/cli.md from the commands' --help, and the table of docs/models.md
	@COLUMNS=100 $(BIN)/python -c "import pathlib, spikelm.cli as c; pathlib.Path('docs/cli.md').write_text(c.reference())"
	@$(BIN)/python -m spikelm.eval.presets docs/models.md

build: install ## sdist and wheel in dist/
	@$(BIN)/python -m build

clean: ## remove build products and caches, but neither .venv nor runs/
	@rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find spikelm train serve tests -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "spikelm needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1); name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "installing into .venv; the first time takes a few minutes"
	@$(PYTHON) -m venv .venv
ifdef CUDA
	@$(PIP) install "$(TORCH)"
else
	@$(PIP) install "$(TORCH)+cpu" 2>/dev/null || $(PIP) install "$(TORCH)" --extra-index-url $(TORCH_CPU_INDEX)
endif
	@$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

$(TEST_STAMP): $(STAMP)
	@$(PIP) install -c constraints.txt --no-deps $(ORACLES)
	@touch $@
