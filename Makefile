# Every target runs in a virtual environment, which the first target creates.
#   VENV    folder of the environment             make test VENV=/tmp/env
#   PYTHON  interpreter to create it with         make setup PYTHON=python3.12
#   EXTRAS  optional dependencies to install      make setup EXTRAS=cuda
#   WORKERS test processes; 0 for a debugger      make test WORKERS=0
#   ARGS    arguments passed to the command       make train ARGS='--config.steps=100 --workdir=runs/mine'
VENV ?= .venv
PYTHON ?= python3
EXTRAS ?=
WORKERS ?= 2
ARGS ?=

PY := "$(VENV)/bin/python"
PYTEST := $(PY) -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder
PIP_INSTALL := $(PY) -m pip install -qq --disable-pip-version-check
BENCHMARKS := $(filter-out _% parallel,$(patsubst benchmarks/%.py,%,$(wildcard benchmarks/*.py)))

SMOKE := --config.model.num_layers=1 --config.model.d_model=32 --config.model.d_ff=64 --config.eval.every=10 \
  --config.log_every=10 --config.task.num_train=200 --config.task.num_validation=20 --config.task.num_test=20 \
  --config.eval.batch_size=20 --config.eval.print_samples=0

# Huge pages make a training step on a CPU 10 to 25 % faster.
GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export GLIBC_TUNABLES

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup train test test-long docs table-smoke lint format bench build browser clean

help: ## list the targets
	@awk -F ': .*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(EXTRAS:%=$(VENV)/.installed-%) $(VENV)/.installed ## create the virtual environment
	@echo "$(VENV) is ready."

train: $(VENV)/.installed ## train a tiny model on star graphs
	$(PY) -m ilm_jax.main --config=configs/star.py:tiny $(ARGS)

test: $(VENV)/.installed-test ## run the tests
	$(PYTEST) $(ARGS)

test-long: $(VENV)/.installed-test-long $(VENV)/.installed-tpu browser ## run all tests, including the long ones
	$(PYTEST) -m '' $(ARGS)

docs: $(VENV)/.installed-docs ## build the documentation site in build/site
	$(PY) -m mkdocs build --strict --site-dir build/site $(ARGS)

table-smoke: $(VENV)/.installed-report ## a miniature of the results table, in two minutes
	@runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && \
	RUNS="$$runs" STEPS=20 PYTHON=$(PY) FLAGS="$(SMOKE)" launch/table.sh star.py:tiny

lint: $(VENV)/.installed-lint ## check style and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.installed-lint ## fix style and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(VENV)/.installed ## run the benchmarks
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(PY) -m benchmarks.$$name $(ARGS); done

build: $(VENV)/.installed-dev ## build the source distribution and the wheel in dist/
	rm -rf build/lib build/bdist.*
	$(PY) -m build

# Long tests play a trace page in Chromium; without a browser they are skipped.
browser:
	@command -v chromium chromium-browser google-chrome > /dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null \
	    && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null; } \
	  || echo "No Chromium, and it could not be installed: the browser tests will be skipped."

clean: ## remove .venv, build products and caches; runs/ stays
	rm -rf .venv build dist ilm_jax.egg-info .pytest_cache .ruff_cache
	find ilm_jax benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# An existing environment is used as it is if it has pip.
$(VENV)/.created:
	@command -v "$(PYTHON)" > /dev/null || { echo "$(PYTHON) not found: give a Python 3.11.4 or newer, make PYTHON=..."; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' \
	  || { echo "ilm_jax needs Python 3.11.4 or newer and $(PYTHON) is older: make PYTHON=python3.12"; exit 1; }
	@if ! $(PY) -c 'import pip' 2> /dev/null; then \
	  "$(PYTHON)" -c 'import ensurepip, venv' 2> /dev/null \
	    || { echo "$(PYTHON) cannot create virtual environments: install python3-venv, or use another Python, make PYTHON=..."; exit 1; }; \
	  echo "Creating $(VENV) with $$("$(PYTHON)" --version) ..."; \
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
