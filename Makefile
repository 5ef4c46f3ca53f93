# `make run` and `make test` are all one needs; the others are parts of them. ACCELERATOR=cpu|gpu overrides the
# choice of packages, PYTHON=… the interpreter, CONFIG=… what `make run` runs, ARGS=… is passed on.
ifndef ACCELERATOR
ACCELERATOR := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo gpu || echo cpu)
endif
export ACCELERATOR PYTHON
CONFIG ?= jobs/configs/quickstart.yaml
BIN := .venv/bin
COMPLETE := .venv/.complete-$(ACCELERATOR)

.PHONY: help run test test-slow check lint format install install-dev lock clean
.DEFAULT_GOAL := help

help: ## say what there is
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

run: $(COMPLETE) ## install, then run the quickstart (or CONFIG=…)
	@$(BIN)/ideal run $(CONFIG) $(ARGS)

test: $(COMPLETE)-dev ## install, then run the tests, two files at a time
	@$(BIN)/pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(COMPLETE)-dev ## the tests that take minutes each
	@$(BIN)/pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: lint test ## formatting, lint, types and the tests; CI runs the slow tests too

lint: $(COMPLETE)-dev ## formatting, lint, types, the import contract
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(COMPLETE)-dev ## format and mend what can be mended
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

install: $(COMPLETE) ## install what a run needs into .venv

install-dev: $(COMPLETE)-dev ## and what tests and checks need

lock: $(COMPLETE) ## make deploy/locks/ again from pyproject.toml
	@$(BIN)/pip install --quiet --disable-pip-version-check uv && UV=$(BIN)/uv deploy/locks/lock.sh

clean: ## remove .venv and caches; runs and their records stay
	@rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	@find ideal service jobs deploy tests -name __pycache__ -prune -exec rm -rf {} +

WANTED := deploy/locks/$(ACCELERATOR).txt pyproject.toml deploy/install.sh

$(COMPLETE): $(WANTED)
	@deploy/install.sh

$(COMPLETE)-dev: $(WANTED) deploy/locks/dev.txt
	@deploy/install.sh dev
