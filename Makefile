# Needs Python 3.11 or newer, make and a C compiler. Everything is installed into .venv.

PYTHON ?= python3
# Test processes. 0 runs them all in one.
JOBS ?= 2
# More arguments for pytest, as in: make test ARGS="-k plan"
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help venv .venv demo check format families methods test test-all clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train a small Llama, grow every axis in mid-run, prove each growth, write a report"
	@echo "make check     lint, format, types, import layers, public names"
	@echo "make test      check, then the tests"
	@echo "make test-all  check, every family and method, then every test, the slow ones too"
	@echo "make families  grow and prove every family; writes its results and docs/families.md"
	@echo "make methods   measure every method; writes its results and docs/methods.md"
	@echo "make format    fix what the linter and the formatter can fix"
	@echo "make clean     remove what was built, .venv too"

venv .venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/growformer demo

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest -q tests/test_contract.py -k public_names

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The derandomized hypothesis profile: the same tree gives the same result. A bare pytest explores.
test: check
	$(BIN)/pytest -q -n $(JOBS) --dist loadscope --hypothesis-profile=ci $(ARGS)

# Two processes a family: one grows, one proves.
families: $(STAMP)
	$(BIN)/python -m tests.families.sweep --jobs $(JOBS)

# What is trained on the pretrained model needs it beside the repository.
methods: $(STAMP)
	$(BIN)/python -m tests.methods.sweep

test-all: check families methods
	$(BIN)/pytest -q -n $(JOBS) --dist loadscope -m "" $(ARGS)

clean:
	rm -rf .venv build dist growformer-demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
