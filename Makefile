# Set-up, demo and checks. A fresh machine needs make, bash and Python >= 3.11.
#
#   make demo    lose a rank in mid-sentence, recover under each policy, compare
#   make test    everything that must pass
#   make lint    ruff
#   make types   mypy
#   make clean   remove the environment and the caches (runs/ stays)
#
#   make demo PYTHON=python3.12               choose the interpreter
#   make test PYTEST_ARGS='-m "not slow"'     choose the tests
#   make test REFERENCE=                      without torch and transformers,
#     which the tests of public checkpoints compare with: those are skipped
#   make test WORKERS=4                       that many processes run tests; 0:
#     this one. Compilation and tracing take a core each, so two workers need
#     little more than half the time of one on two cores

PYTHON ?= python3
PYTEST_ARGS ?=
REFERENCE ?= reference
WORKERS ?= 2

COMMA := ,
SHELL := bash
VENV := .venv
BIN := $(VENV)/bin
PINS := setup.cfg pyproject.toml constraints/py311.txt constraints/py312.txt
RUN_STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
REFERENCE_STAMP := $(VENV)/.installed-reference

# One word per package as pip reaches it, so that a slow network can be seen.
PROGRESS := awk ' \
  /^(Collecting|Processing) / { n = split($$2, path, "/"); name = path[n]; \
    sub(/[][<>=!~;(].*/, "", name); sub(/-[0-9].*/, "", name); \
    printf "%s ", name; fflush(); some = 1 } \
  /^Installing collected/ { if (some) print ""; \
    print "[set-up] unpacking"; fflush() }'

# $(call install,WHAT,STAMPS): pinned by the file that fits the environment's
# Python.
define install
	@set -o pipefail; \
	pins=constraints/$$($(BIN)/python -c \
	  'import sys; print("py311" if sys.version_info < (3, 12) else "py312")' \
	  ).txt; \
	echo "[set-up] installing $(1), versions from $$pins"; \
	$(BIN)/python -m pip install --disable-pip-version-check \
	  --progress-bar off -c "$$pins" -e '$(1)' | $(PROGRESS); \
	echo "[set-up] done"; \
	touch $(2)
endef

# Two installations into one environment would meet.
.NOTPARALLEL:
.PHONY: help demo test lint types clean

help:
	@sed -n 's/^#   *\(make [a-z]*  .*\)/\1/p' Makefile

demo: $(RUN_STAMP)
	$(BIN)/python -m experiments.run --config=configs/quickstart.py \
	  --workdir=runs/quickstart

test: $(if $(REFERENCE),$(REFERENCE_STAMP),$(TEST_STAMP))
	$(BIN)/python -m pytest -q -n $(WORKERS) $(PYTEST_ARGS)

lint: $(TEST_STAMP)
	$(BIN)/ruff check .

types: $(TEST_STAMP)
	$(BIN)/mypy

# No prerequisites: an environment is made once, and again after `make clean`.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	  "make: $(PYTHON) is Python %d.%d; needed is 3.11 or newer, as in" \
	  " make demo PYTHON=python3.12" % v[:2])'
	@echo "[set-up] creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(RUN_STAMP): $(PINS) | $(BIN)/python
	$(call install,.,$(RUN_STAMP))

# Holds the former, so that a fresh machine installs once for either.
$(TEST_STAMP): $(PINS) | $(BIN)/python
	$(call install,.[test],$(RUN_STAMP) $(TEST_STAMP))

# Holds both.
$(REFERENCE_STAMP): $(PINS) | $(BIN)/python
	$(call install,.[test$(COMMA)$(REFERENCE)],$(RUN_STAMP) $(TEST_STAMP) \
	  $(REFERENCE_STAMP))

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
