# One command each. `make demo` installs what a user needs; the others add the tools. Both use .venv in the checkout.

SHELL := bash
.DEFAULT_GOAL := help
.SHELLFLAGS := -eu -o pipefail -c

# The first interpreter that runs and is new enough (a version manager's shim may be there and not run).
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
endif
VENV ?= .venv
BIN := $(VENV)/bin
comma := ,
NATIVE := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
INPUTS := pyproject.toml setup.py Makefile $(shell find csrc -type f)

.PHONY: help env demo test test-oldest lint type fmt wheel bench docs mutants

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

# $(call install,VENV,CONSTRAINTS,REQUIREMENT). torch is named first and by its pinned version: left to itself, a
# resolver picks the newest build there is. The package is built with the environment's own setuptools and pybind11; the
# native extension takes a minute, and is left out where there is no C++ compiler.
define install
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "installing $(3) into $(1) with $(PYTHON) (the first time takes a minute or two)"
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install -q -c $(2) "setuptools>=77.0.3" pybind11 torch==$$(sed -n 's/^torch==//p' $(2))
	@$(1)/bin/python -m pip install -q -c $(2) --no-build-isolation -e "$(3)"
	@touch $@
endef

$(VENV)/.core: constraints.txt $(INPUTS)
	$(call install,$(VENV),constraints.txt,.)

$(VENV)/.dev: constraints.txt $(INPUTS)
	$(call install,$(VENV),constraints.txt,.[dev])
	@touch $(VENV)/.core

.venv-oldest/.dev: constraints-oldest.txt $(INPUTS)
	$(call install,.venv-oldest,constraints-oldest.txt,.[train$(comma)test])

env: $(VENV)/.dev ## the environment with every tool, in .venv

demo: $(VENV)/.core ## the whole method on the model that ships with the package
	@$(BIN)/icon2 demo

# Most of a test is the dispatch of small operations: a process per core, one thread each. A file's tests stay together,
# for what they share. Triton's interpreter is chosen when a kernel is defined, so its lane is a process of its own. The
# GPU's lane runs on the CPU, which shows that its tests are right; what is minutes of work there, at sizes of real
# models, is left out.
# $(call tests,VENV)
PYTEST := -m pytest -n auto --maxprocesses 8 --dist loadfile
define tests
	OMP_NUM_THREADS=1 $(1)/bin/python $(PYTEST)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(1)/bin/python $(PYTEST) tests/interpret
	OMP_NUM_THREADS=1 GPU_LANE_DEVICE=cpu $(1)/bin/python $(PYTEST) tests/gpu -k "not linear and not 128256 and not 152064"
endef

test: $(VENV)/.dev ## every test, then the kernels under Triton's interpreter, and the GPU's tests on the CPU
	$(call tests,$(VENV))

test-oldest: .venv-oldest/.dev ## the same tests with the oldest supported triton and transformers, in .venv-oldest
	$(call tests,.venv-oldest)

lint: $(VENV)/.dev ## rules and formatting: ruff for Python, clang-format and clang-tidy for C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	echo $(filter %.cpp,$(NATIVE)) | xargs -n 1 -P 4 sh -c \
		'$(BIN)/clang-tidy --quiet $$0 -- -std=c++17 -Icsrc '"$$($(BIN)/python -m pybind11 --includes)"

type: $(VENV)/.dev ## mypy on the package
	$(BIN)/mypy

fmt: $(VENV)/.dev ## mend formatting, and what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(NATIVE)

wheel: $(VENV)/.dev ## a wheel for manylinux with the native extension, into dist (PYTHON=python3.12 VENV=.venv312: for another)
	rm -rf build/wheel
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	PATH="$(BIN):$$PATH" $(BIN)/python -m auditwheel repair -w dist build/wheel/*.whl

bench: $(VENV)/.dev ## the benchmarks
	$(BIN)/icon2 bench

docs: $(VENV)/.dev ## the API reference, into build/docs
	$(BIN)/python -m pdoc -o build/docs icon2_rt icon2_rt.formats icon2_rt.pipeline icon2_rt.tiny

mutants: $(VENV)/.dev ## how many planted faults the tests see, by module (hours): into bench/results/mutants.json
	$(BIN)/python tools/mutants.py
