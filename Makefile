# make demo         set up, then Figure 1 and tasks in conflict on handwritten digits
# make check        set up, then the tests of every change: all but those marked slow
# make test         set up, then the tests of every day
# make exhaustive   set up, then the rest: builds from a copy, sanitizers, full disks
# make test-latest  the test suite with the newest packages that pyproject.toml allows
# make fuzz         new random cases for every operator: FUZZ_CASES of each test
# make sanitize     the operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make wheel-test   source distribution and wheels, built and tested outside of the checkout
# make lint         format and type checks
# make docs         the documentation site, in build/docs
# make bench        every operator beside plain PyTorch
# make lock         requirements.lock anew: the exact versions that the set-up installs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LATEST := .venv-latest
FUZZ_CASES ?= 15000
# The interpreters to make wheels for, as in: make wheel-test PYTHONS="python3.10 python3.13"
PYTHONS ?= $(PYTHON)
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
NATIVE := $(shell find csrc tests/shim -name '*.cpp' -o -name '*.cu' -o -name '*.h')
# What the build needs, as in pyproject.toml.
BUILD := "torch>=2.11,<2.15" numpy "setuptools>=77" wheel "pybind11>=2.13" ninja
# Locked as one pair: newer ones are large, and to be tried with test-latest first.
TORCH := torch==2.14.1 torchvision==0.29.1

# A process per core; the tests of a file stay together, as do the fixtures that they share.
PYTEST := -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: demo check test exhaustive test-latest fuzz sanitize wheel-test lint format docs bench lock setup check-machine clean

demo: setup
	$(BIN)/python -m experiments.demo

check: setup
	$(BIN)/python $(PYTEST) -m "not slow and not exhaustive"

test: setup
	$(BIN)/python $(PYTEST)

exhaustive: setup
	$(BIN)/python $(PYTEST) -m exhaustive

test-latest: check-machine
	rm -rf $(LATEST)
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/pip install --quiet $(BUILD)
	$(LATEST)/bin/pip install --quiet --no-build-isolation --editable ".[dev]"
	$(LATEST)/bin/python $(PYTEST)

fuzz: setup
	FUZZ_CASES=$(FUZZ_CASES) $(BIN)/python -m pytest --numprocesses auto --hypothesis-show-statistics \
		tests/ops/test_fuzz.py

sanitize: setup
	$(BIN)/python tests/sanitize.py

wheel-test: setup
	$(BIN)/python tests/wheels.py --pythons $(PYTHONS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

docs: setup
	$(BIN)/python -m experiments.report --check
	$(BIN)/sphinx-build -q -W --keep-going docs build/docs
	@echo "open build/docs/index.html"

bench: setup
	$(BIN)/python -m benchmarks.lora_linear
	$(BIN)/python -m benchmarks.lora_linear_symmetric
	$(BIN)/python -m benchmarks.shared_input
	$(BIN)/python -m benchmarks.merge_lora
	$(BIN)/python -m benchmarks.task_matvec
	$(BIN)/python -m benchmarks.dropout_mask
	$(BIN)/python -m benchmarks.packed_attention
	$(BIN)/python -m benchmarks.token_losses
	$(BIN)/python -m benchmarks.linear_training --threads 1
	$(BIN)/python -m benchmarks.shallow_training --threads 1

lock: setup
	$(BIN)/pip install --quiet uv
	printf '%s\n' $(TORCH) $(BUILD) | $(BIN)/uv pip compile - pyproject.toml --extra dev \
		--universal --python-version 3.10 --upgrade --no-annotate --quiet \
		--custom-compile-command "make lock" --output-file requirements.lock

setup: check-machine $(VENV)/installed

check-machine:
	@$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))" || { \
		echo "make: requirements.lock is for Python 3.10 to 3.14, and $(PYTHON) is not one;" \
		"choose another, as in: make PYTHON=python3.12" >&2; exit 1; }
	@[ "$$METALORA_BUILD" = none ] || [ -n "$$CXX" ] || command -v c++ > /dev/null || \
		command -v g++ > /dev/null || { \
		echo "make: no C++ compiler was found; install g++, or set CXX, or METALORA_BUILD=none" \
		"for pure Python" >&2; exit 1; }

# The build uses the torch that is installed, not a copy of its own.
$(VENV)/requirements: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	touch $@

$(VENV)/installed: $(VENV)/requirements $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	$(BIN)/python -m metalora
	touch $@

clean:
	rm -rf $(VENV) $(LATEST) build dist runs *.egg-info metalora/*.so
