# Everything runs in a virtual environment that the first command makes.
#   VENV    where it is                          make test VENV=/tmp/env
#   PYTHON  what it is made with                 make setup PYTHON=python3.12
#   EXTRAS  what `make setup` adds to it         make setup EXTRAS=cuda
#   WORKERS processes that share the tests       make test WORKERS=0 (this one, for a debugger)
#   ARGS    what is passed on to the command     make train ARGS='--config.steps=100 --workdir=runs/mine'
VENV ?= .venv
PYTHON ?= python3
EXTRAS ?=
WORKERS ?= 2
ARGS ?=

PY := "$(VENV)/bin/python"
PYTEST := $(PY) -m pytest --numprocesses=$(WORKERS) --dist=loadfile
PIP_INSTALL := $(PY) -m pip install -qq --disable-pip-version-check
BENCHMARKS := $(filter-out _% parallel,$(patsubst benchmarks/%.py,%,$(wildcard benchmarks/*.py)))

SMOKE := --config.model.num_layers=1 --config.model.d_model=32 --config.model.d_ff=64 --config.eval.every=10 \
  --config.log_every=10 --config.task.num_train=200 --config.task.num_validation=20 --config.task.num_test=20 \
  --config.eval.batch_size=20 --config.eval.print_samples=0

# Huge pages save 10-25 % of a training step on CPU.
GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export GLIBC_TUNABLES

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup train test test-long table-smoke lint format bench clean

help: ## list the targets
	@awk -F ': .*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(EXTRAS:%=$(VENV)/.installed-%) $(VENV)/.installed ## make the virtual environment
	@echo "$(VENV) is ready."

train: $(VENV)/.installed ## train a tiny model on star graphs
	$(PY) -m ilm_jax.main --config=configs/star.py:tiny $(ARGS)

test: $(VENV)/.installed-test ## run the tests
	$(PYTEST) $(ARGS)

test-long: $(VENV)/.installed-test $(VENV)/.installed-tpu ## run all tests, the long ones too
	$(PYTEST) -m '' $(ARGS)

table-smoke: $(VENV)/.installed-report ## a miniature of the table of all families, in two minutes
	@runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && \
	RUNS="$$runs" STEPS=20 PYTHON=$(PY) FLAGS="$(SMOKE)" launch/table.sh star.py:tiny

lint: $(VENV)/.installed-lint ## check style and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.installed-lint ## mend style and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(VENV)/.installed ## run the benchmarks
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(PY) -m benchmarks.$$name $(ARGS); done

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv build ilm_jax.egg-info .pytest_cache .ruff_cache
	find ilm_jax configs benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# An existing environment with pip is taken as it is.
$(VENV)/.created:
	@command -v "$(PYTHON)" > /dev/null || { echo "$(PYTHON) not found: name a Python 3.11.4 or newer, make PYTHON=..."; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' \
	  || { echo "ilm_jax needs Python 3.11.4 or newer, $(PYTHON) is older: make PYTHON=python3.12"; exit 1; }
	@if ! $(PY) -c 'import pip' 2> /dev/null; then \
	  "$(PYTHON)" -c 'import ensurepip, venv' 2> /dev/null \
	    || { echo "$(PYTHON) cannot make virtual environments: install python3-venv, or name another, make PYTHON=..."; exit 1; }; \
	  echo "Making $(VENV) with $$("$(PYTHON)" --version) ..."; \
	  "$(PYTHON)" -m venv "$(VENV)"; \
	fi
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.created
	@echo "Installing ilm_jax into $(VENV), a minute or two the first time ..."
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(VENV)/.created
	@echo "Installing ilm_jax[$*] into $(VENV), a minute or two the first time ..."
	@$(PIP_INSTALL) --editable '.[$*]'
	@touch $(VENV)/.installed $@
