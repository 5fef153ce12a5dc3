# make demo   set up, then Figure 1 and the vision experiment on handwritten digits
# make test   set up, then the whole test suite
# make lint   format and type checks
# make bench  operators and trainers beside plain PyTorch
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
NATIVE := $(shell find csrc tests/shim -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: demo test lint format bench setup clean

demo: setup
	$(BIN)/python -m experiments.demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

bench: setup
	$(BIN)/python -m benchmarks.layers
	$(BIN)/python -m benchmarks.bench_linear
	$(BIN)/python -m benchmarks.bench_shallow

setup: $(VENV)/installed

# torch first: the build uses the torch that is installed, not a copy of its own.
$(VENV)/requirements: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "torch>=2.11,<2.15" numpy setuptools wheel pybind11 ninja
	touch $@

$(VENV)/installed: $(VENV)/requirements $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	$(BIN)/python -m metalora
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info metalora/*.so
