# Each target works in a fresh clone with nothing but python3 (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

AOT := $(VENV)-aot

.PHONY: demo test test-slow test-aot lint types clean

demo: $(VENV)/.demo
	$(BIN)/gemma-jax generate "The capital of Japan is" --max-new-tokens 32

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

# Kernels and programs compiled for TPUs and GPUs that are not there, and their static cost beside the baseline. Bars on
# seconds of compilation are for a machine of one's own: elsewhere they are so many times as long.
test-aot: export GEMMA_JAX_SLOWER ?= 6
test-aot: $(AOT)/.aot
	JAX_PLATFORMS=cpu $(AOT)/bin/python -m pytest -m aot -n 2 --dist worksteal
	JAX_PLATFORMS=cpu $(AOT)/bin/python -m benchmarks.kernels --check --quick --jobs 2

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.test
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) $(AOT)

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.venv
	$(BIN)/python -m pip install -q -e ".[demo]"
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.venv
	$(BIN)/python -m pip install -q -e ".[demo,dev,parity]"
	touch $@ $(VENV)/.demo

$(AOT)/.aot: pyproject.toml
	$(PYTHON) -m venv $(AOT)
	$(AOT)/bin/python -m pip install -q -e ".[aot]"
	touch $@
