# Two commands do everything: `make train` and `make test`. Each makes .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup train test lint format clean

setup: $(STAMP)

# torch comes first and exact: an open range would let pip pick a CUDA build of several GB.
# The shared-memory collective is built here, once: a build cut short inside a run leaves a lock
# on which the next run would wait for ever.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "haloformer needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --upgrade "pip>=24"
	$(BIN)/pip install -qq torch==2.13.0
	$(BIN)/pip install -qq --editable ".[dev,hf,demo]"
	$(BIN)/python -m haloformer.launcher.prebuild
	touch $@
