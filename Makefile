# Each target works in a fresh clone with nothing but python3 (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint types clean

demo: $(VENV)/.demo
	$(BIN)/gemma-jax generate "The capital of Japan is" --max-new-tokens 32

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.test
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV)

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.venv
	$(BIN)/python -m pip install -q -e ".[demo]"
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.venv
	$(BIN)/python -m pip install -q -e ".[demo,dev,parity]"
	touch $@ $(VENV)/.demo
