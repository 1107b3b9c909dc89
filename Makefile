# Every target makes its own .venv when it is missing or older than pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test lint conformance selftest bench clean

help:
	@echo 'make demo         a guest's page table nested on an emulated VT-d, in three seconds'
	@echo 'make test         all tests [IOMMUFDD_ALL_PROGRAMS=1: every recorded program in every way]'
	@echo 'make lint         ruff, mypy --strict, the import contracts'
	@echo 'make conformance  replay what a real Linux 7.2 kernel answered [PROGRAMS=DIR]'
	@echo "make selftest     the kernel's own iommufd tests, unmodified [LINUX_SRC=PATH] [SELFTEST='--rounds 3']"
	@echo 'make bench        speed, as ratios measured side by side [BENCH="roundtrip map"]'
	@echo 'make clean        remove .venv and caches'

$(STAMP): pyproject.toml
	@echo 'Setting up $(VENV) ...'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/iommufdctl demo

test: $(STAMP)
	@$(BIN)/python -m pytest -q

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

conformance: $(STAMP)
	@$(BIN)/python -m tests.conformance.run $(if $(PROGRAMS),--programs $(PROGRAMS)) $(CONFORMANCE)

selftest: $(STAMP)
	@$(BIN)/python -m tests.selftest $(SELFTEST)

bench: $(STAMP)
	@$(BIN)/python -m tests.bench $(BENCH)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
