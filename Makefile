# Two commands do everything: `make train` and `make test`. Each makes .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := kernels model launcher data_pipeline configs
ENWIKI := data/raw/enwiki-slice.xml.bz2

.PHONY: setup train train-led test lint format bench bench-gpu compile-check clean help setup-root

help:
	@echo 'make train   fetch and prepare the demo text, train on 2 sequence-parallel ranks'
	@echo 'make train-led   the same for a small LED on article leads, and its ROUGE'
	@echo 'make test    all default tests (no GPU, no network beyond the package index)'
	@echo 'make lint    ruff, mypy, import layers, file sizes'
	@echo 'make bench   time and memory of the attention (ten minutes) and of whole steps (half an hour)'
	@echo '             on this CPU, beside their peers and beside bench/history.jsonl'
	@echo 'make bench-gpu   the kernels and whole steps on CUDA GPUs; without one it says so and fails'
	@echo 'make compile-check   every attention kernel for sm_80, sm_90 and gfx942, without a GPU'
	@echo 'make setup-root   what the tests with several hosts and with SLURM need (Debian, as root)'
	@echo 'make clean   remove .venv, data and caches; runs and mlflow.db stay'

setup: $(STAMP)

# torch comes first and exact: an open range would let pip pick a CUDA build of several GB.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "haloformer needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo 'installing into $(VENV) (about two minutes, once)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --upgrade 'pip>=24'
	@$(BIN)/pip install -qq torch==2.13.0
	@$(BIN)/pip install -qq --editable '.[dev,hf,demo,rouge,remote]'
	@touch $@

# Network namespaces, ssh between them and pdsh; a SLURM of one node. Without them those tests skip.
setup-root:
	apt-get update -qq
	apt-get install -y -qq iproute2 openssh-server pdsh slurm-wlm

# The slice of Wikipedia that the gensim package carries: 6 MB of MediaWiki XML, sha256 checked.
$(ENWIKI): | $(STAMP)
	@$(BIN)/python -m haloformer.data_pipeline.enwiki $(@D)

train: $(STAMP) $(ENWIKI)
	@$(BIN)/haloformer prepare --input $(ENWIKI) --format mediawiki --tokenizer byte --output data/enwiki
	@$(BIN)/haloformer train enwiki_mlm --ranks 2

train-led: $(STAMP) $(ENWIKI)
	@$(BIN)/haloformer prepare --input $(ENWIKI) --format mediawiki_lead --tokenizer train:4096 \
		--holdout 0.15 --output data/wiki_lead
	@$(BIN)/haloformer train wiki_led --ranks 2
	@$(BIN)/haloformer evaluate latest --data data/wiki_lead/eval

# Two processes: one alone waits for ranks half of its time, more would want more cores and memory.
test: $(STAMP)
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy -p haloformer
	@$(BIN)/lint-imports
	@$(BIN)/python tests/file_sizes.py

bench: $(STAMP)
	@$(BIN)/haloformer bench attention --json bench.json --png bench.png
	@$(BIN)/haloformer bench step --sweep --json step.json --png step.png --history bench/history.jsonl

bench-gpu: $(STAMP)
	@$(BIN)/python tests/bench/gpu_all.py

compile-check: $(STAMP)
	@$(BIN)/python -m haloformer.kernels.compile_check

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) data build dist *.egg-info .pkg/*.egg-info .pytest_cache .mypy_cache .ruff_cache
