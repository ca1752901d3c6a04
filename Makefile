# Two ways to run every target:
#   make test                  makes its own environment in .venv
#   PYTHON=/path make test     uses an existing one (torch >= 2.11, numpy, pybind11, ninja, setuptools); downloads nothing
ifeq ($(origin PYTHON), undefined)
PY := $(CURDIR)/.venv/bin/python
ENVIRONMENT := .venv/.installed
else
PY := $(PYTHON)
ENVIRONMENT :=
endif

export PYTHONPATH := $(CURDIR):$(CURDIR)/python
PACKAGES := torch numpy setuptools wheel pybind11 ninja pytest pytest-xdist hypothesis scipy pyyaml safetensors \
            tqdm matplotlib ruff mypy clang-format
NATIVE = $(shell git ls-files 'benchmarks/*.cpp' 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' \
           'tests/*.cpp' 'tests/*.cu')

.PHONY: install build demo test lint sanitize bench bench-peers gpu clean

install: build

.venv/.installed: .ci/constraints.txt
	@python3 -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or later is needed, python3 is {v.major}.{v.minor}")'
	python3 -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -c .ci/constraints.txt $(PACKAGES)
	@$(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install -q --disable-pip-version-check triton==3.6.0
	$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

build: $(ENVIRONMENT)
	@$(PY) setup.py -q build_ext --inplace

demo: build
	$(PY) -m tscnc demo

test: build
	OMP_NUM_THREADS=1 $(PY) -m pytest $(shell $(PY) -c 'import xdist; print("-n 2")' 2>/dev/null) tests

lint: $(ENVIRONMENT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@$(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run -Werror $(NATIVE)

sanitize: $(ENVIRONMENT)
	.ci/sanitize $(PY)

bench: build
	$(PY) -m benchmarks --quick

# Into the environment of $(PY), without their dependencies. SparseProp's setup.py asks the python3
# of the PATH for pybind11 and compiles for this machine's instruction set (-march=native).
bench-peers: $(ENVIRONMENT)
	@$(PY) -c 'import pybind11, scipy, setuptools' || { echo "bench-peers: SparseProp is built with pybind11, scipy and setuptools, and $(PY) lacks one of them: run make install, or install them with -c .ci/constraints.txt" >&2; exit 1; }
	@for peer in sparseprop torchsparsegradutils; do \
	  if $(PY) -c "import $$peer" 2>/dev/null; then echo "bench-peers: $$peer is installed"; continue; fi; \
	  PATH="$$($(PY) -c 'import os, sys; print(os.path.dirname(sys.executable))'):$$PATH" $(PY) -m pip install -q --disable-pip-version-check --no-deps \
	    --no-build-isolation -c .ci/constraints.txt $$peer && $(PY) -c "import $$peer" \
	    || { echo "bench-peers: $$peer was not installed (it needs the package index and a C++ compiler); the benchmarks show it as missing and run without it" >&2; exit 1; }; \
	done

gpu: build
	$(PY) -m benchmarks.gpu

clean:
	rm -rf build dist *.egg-info tscnc_kernels/_C*.so
