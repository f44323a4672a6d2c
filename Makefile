# aigid_repro: everything starts here. `make` alone prints the targets.
PROFILE ?= mini
PAPER   ?=
ITEM    ?=
JOBS    ?=
DATA    ?=
PLAN    ?=
PYTHON  ?= python3
BIN     := .venv/bin
STAMP   := .venv/.installed
SELECT  := --profile $(PROFILE) $(if $(PAPER),--paper $(PAPER)) $(if $(ITEM),--item $(ITEM)) $(if $(JOBS),--jobs $(JOBS))

.DEFAULT_GOAL := help
.PHONY: help setup test reproduce report tables lab clean

help: ## print the targets
	@echo "make TARGET [PROFILE=smoke|mini|gpu|paper] [PAPER=commfor] [ITEM=fig01_scaling] [JOBS=2] [DATA=/path] [PLAN=1]"
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv and install the project in it (uv is used where it is present)

$(STAMP): pyproject.toml
	@if command -v uv >/dev/null 2>&1 && [ -z "$(NO_UV)" ]; then \
	  uv venv --quiet --allow-existing --python $(PYTHON) .venv && uv pip install --quiet --python $(BIN)/python -e '.[dev]'; \
	else \
	  $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'; \
	fi
	@touch $@

test: setup ## notebooks and package in step, ruff, notebook cells, pytest
	@$(BIN)/python tests/notebooks.py
	@$(BIN)/ruff check nbs aigid_repro tests
	@$(BIN)/python -m pytest

reproduce: setup ## regenerate every table and figure of the profile, then the report
	@$(BIN)/python -m aigid_repro reproduce $(SELECT) $(if $(DATA),--data "$(DATA)") $(if $(PLAN),--plan)

report: setup ## build results/PROFILE/report.html from what is there
	@$(BIN)/python -m aigid_repro report --profile $(PROFILE)

tables: setup ## derive every table and figure again from saved predictions and say what changed
	@$(BIN)/python -m aigid_repro tables $(SELECT)

lab: setup ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs/index.ipynb

clean: ## remove caches and unfinished runs of this checkout (results and .venv stay)
	@rm -rf .pytest_cache .ruff_cache build *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	@find results -mindepth 1 \( -name '.*.partial' -o -name '.*.old' \) -prune -exec rm -rf {} +
