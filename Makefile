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
PACKAGES := torch numpy setuptools wheel pybind11 ninja pytest pytest-xdist scipy pyyaml safetensors \
            tqdm matplotlib ruff mypy clang-format
NATIVE = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' \
           'tests/*.cpp' 'tests/*.cu')

.PHONY: install build demo test lint sanitize bench gpu clean

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

gpu: build
	$(PY) -m benchmarks.gpu

clean:
	rm -rf build dist *.egg-info tscnc_kernels/_C*.so
