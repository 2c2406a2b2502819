# `make` lists the targets. run, test and the like set up .venv by themselves; that is a no-op when it is up to date.

PYTHON ?=
GPU ?=
DATA ?=
ARGS ?=
TESTS ?=
JOBS ?= 2
UPGRADE ?=
IMAGE ?=
export PYTHON GPU UPGRADE IMAGE

BIN := .venv/bin
FAST_TESTS := $(filter-out tests/e2e tests/conftest.py tests/__pycache__,$(wildcard tests/*))
PACKAGES := pipeline components dataset trainer serving kubeflow benchmarks tests tools setup.py

.DEFAULT_GOAL := help
.PHONY: help setup ready run test tests lint format lock image clean test-debian13

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-22s%s\n", $$1, $$2 }'

setup: ## make .venv from the lock file that fits this machine (PYTHON=path, GPU=1)
	@tools/setup.sh

ready:
	@tools/setup.sh --quiet

run: ready ## run the pipeline: data to pushed model (DATA=path or synthetic, ARGS="--help")
	@VIT_PIPELINE_ARGS= $(BIN)/python -m pipeline.local_runner $(if $(DATA),--data "$(DATA)") $(ARGS)

test: lint tests ## lint, then all tests: the fast ones first, then tests/e2e

tests: ready ## tests alone, JOBS=2 files at a time (TESTS="tests/trainer ...", default all)
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
		$(or $(TESTS),$(FAST_TESTS) $(wildcard tests/e2e))

lint: ready ## ruff and mypy
	@$(BIN)/ruff check --quiet $(wildcard $(PACKAGES))
	@$(BIN)/ruff format --quiet --check $(wildcard $(PACKAGES))
	@$(BIN)/mypy --no-error-summary

format: ready ## format the code and apply ruff's safe fixes
	@$(BIN)/ruff check --quiet --fix $(wildcard $(PACKAGES)) || true
	@$(BIN)/ruff format $(wildcard $(PACKAGES))

lock: ## regenerate requirements/*.txt (UPGRADE=1: newest allowed; UPGRADE=NAME: of one package)
	@tools/lock.sh

test-debian13: ## run `make test` on the newer TFX line, in a Debian 13 container (see tools/test-in-container.sh)
	@tools/test-in-container.sh make test

image: ## build the container image of the pipeline's tasks (GPU=1; IMAGE=name:tag; see tools/build-image.sh)
	@tools/build-image.sh

clean: ## remove .venv and caches (the pipeline's outputs stay)
	@rm -rf .venv .setup.lock .mypy_cache .ruff_cache .pytest_cache build ./*.egg-info
	@find $(wildcard $(PACKAGES)) -name __pycache__ -type d -prune -exec rm -rf {} +
