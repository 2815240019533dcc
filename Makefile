# Everything runs in .venv, which the first `make test` makes. Needs make and Python >= 3.11.
# `make test ARGS="-k shards"` passes arguments to pytest; `PYTHON=...` names another interpreter.

VENV := .venv
RUN := $(VENV)/bin/python -m
STAMP := $(VENV)/.installed
PYTHON :=
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3)
RECENT := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format docs report dist clean distclean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r name text; do \
		printf 'make %-10s %s\n' "$$name" "$$text"; done

install: $(STAMP)  ## make .venv and install the project in it, editable, with its tools

demo: $(STAMP)  ## caption, answer, draw, edit and search with the starter; leaves demo.html
	@$(VENV)/bin/multimodal demo

test: $(STAMP)  ## run the tests, without those marked slow or gpu
	@$(RUN) pytest -q -n 2 --dist worksteal $(ARGS)

test-all: $(STAMP)  ## run every test that this machine can run
	@$(RUN) pytest -q -n 2 --dist worksteal -m "" $(ARGS)

lint: $(STAMP)  ## check style (ruff), format (ruff) and types (mypy)
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

format: $(STAMP)  ## put the code into the project's format, and sort its imports
	@$(RUN) ruff check --select I --fix .
	@$(RUN) ruff format .

dist: $(STAMP)  ## build the wheel and the sdist in dist/, and check them
	@$(RUN) build --no-isolation --outdir dist .
	@$(RUN) twine check --strict dist/*

docs: $(STAMP)  ## build the documentation into site/, offline, warnings are errors
	@$(RUN) mkdocs --quiet build --strict
	@echo "site/index.html opens in a browser, without a server"

report: $(STAMP)  ## fill docs/report.md with its numbers, draw its figures, and write build/report.pdf
	@$(RUN) docs.reporting --pdf build/report.pdf

-include train/recipes/starter.mk

clean:  ## remove caches and build outputs; .venv and runs stay
	@rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . \( -path ./$(VENV) -o -path ./runs -o -path ./.git \) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## remove .venv too
	@rm -rf $(VENV)

# A candidate is tried by running it: a version manager's shim can exist and still not start.
$(STAMP): pyproject.toml constraints.txt
	@if [ ! -e $(VENV) ]; then \
		for python in $(CANDIDATES); do \
			if $$python -c '$(RECENT)' >/dev/null 2>&1; then found=$$python; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "error: Python 3.11 or newer is needed; tried: $(CANDIDATES). Name one with make PYTHON=..." >&2; exit 1; \
		fi; \
		echo "making $(VENV) with $$found"; \
		$$found -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; \
	fi
	@$(RUN) pip --version >/dev/null 2>&1 && $(VENV)/bin/python -c '$(RECENT)' || { \
		echo "error: $(VENV) has no working Python 3.11 or newer with pip; 'make distclean' removes it" >&2; exit 1; }
	@echo "installing into $(VENV) (the first time about 6 GB: minutes)"
	@$(RUN) pip install $$([ -t 1 ] || echo --quiet) --no-user --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)
