# One command a question: see `make help`.

PYTHON ?= python3
VENV ?= .venv
NGPU ?= 4
JOBS ?= auto
PYTEST_ARGS ?=
IMPL ?=
TIER ?=
FRESH ?=
OUT ?= out
# The first that has a figure is believed.
RUNS ?= docs/runs/h200.json validation/perf/baselines/nvidia-h200.json docs/runs/again_h200.json docs/runs/stages_h200.json

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# With VENV empty, PYTHON is used as it is and nothing is installed into it; otherwise every target waits for the stamp,
# which only a change of what it lists makes stale.
ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

# A checkout that cannot be written to has no place for caches; name one for results by OUT.
WRITABLE := $(shell test -w . && echo yes)
ifeq ($(WRITABLE),)
export COVERAGE_FILE ?= $(OUT)/.coverage
endif

PYTEST = $(PY) -m pytest --out='$(OUT)' $(IMPL:%=--impl=%) $(if $(COVERAGE),--cov --cov-append --cov-report= --cov-fail-under=0)

.PHONY: help setup lint unit meta smoke integration coverage system perf perf-baseline perf-docs validate faults sanitize train test \
        docs doctor clean

help:  ## list the targets and variables
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "  %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  PYTHON=python3    makes the environment: Python 3.11 or 3.12'
	@echo '  VENV=.venv        where the environment is; `make test VENV= PYTHON=...` uses an existing one as it is'
	@echo '  NGPU=4            processes (and GPUs, where there are any) of the integration layer'
	@echo '  JOBS=auto         processes the unit tests are shared out among: one a core'
	@echo '  IMPL=             implementations under test: eager, triton, a peer or package.module:object (unit, validate)'
	@echo '  TIER=cpu          size of the training runs of validate; the others need a GPU'
	@echo '  PYTEST_ARGS=      passed on to pytest, for example PYTEST_ARGS="-k window -x"'
	@echo '  RUNS=...          saved runs of one machine (perf-docs)'
	@echo '  FRESH=1           train: start over instead of reusing the runs that are already there'
	@echo '  OUT=out           the folder for pictures, and for what train makes'

setup: $(READY)  ## make the environment (every target below does so by itself)

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || { \
	    echo "$(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing): nsa needs Python 3.11 or 3.12." \
	         "Say which one to use: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -n "$(WRITABLE)" || { \
	    echo "setup writes into the checkout, and $(CURDIR) cannot be written to." \
	         "Use an environment that is there already: make test VENV= PYTHON=python" >&2; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

lint: $(READY)  ## style, format and types
	$(PY) -m ruff check $(if $(WRITABLE),,--no-cache) .
	$(PY) -m ruff format --check $(if $(WRITABLE),,--no-cache) .
	$(PY) -m mypy $(if $(WRITABLE),,--cache-dir=/dev/null)

# A layer that ran nothing fails: pytest says 5 where it collected nothing, conftest.py 1 where everything was skipped.

unit: $(READY)  ## is each stage right?
	$(PYTEST) -n $(JOBS) --dist worksteal validation/unit $(PYTEST_ARGS)

meta: $(READY)  ## does the harness itself tell right from wrong? its own tests, for when it changes
	$(PYTEST) -n $(JOBS) --dist worksteal validation/meta $(PYTEST_ARGS)

smoke: $(READY)  ## the few integration tests that show that anything works over NGPU processes
	NGPU=$(NGPU) $(PYTEST) validation/integration -m smoke $(PYTEST_ARGS)

# Two jobs at a time: while one starts or waits, the other computes.
integration: $(READY)  ## do the parts work together, across NGPU processes?
	NGPU=$(NGPU) $(PYTEST) -n 2 --dist worksteal validation/integration $(PYTEST_ARGS)

system: $(READY)  ## does it do its job? short training runs against a dense twin
	$(PYTEST) validation/system -m 'not ladder' $(PYTEST_ARGS)

validate: $(READY)  ## the whole ladder, each layer a little, and what models learn; the report is out/validate/index.html
	$(PY) -m validation.ladder --out '$(OUT)/validate' $(IMPL:%=--impl=%) $(TIER:%=--tier=%)

# The option to compare comes last: it takes what follows for the run to compare with. Pictures are drawn of a run that
# fails its gates too (1), not of one that came to no end; a picture that cannot be drawn says so and fails nothing.
BENCHMARKS = $(PYTEST) validation/perf --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-sort=name
PLOTS = $(PY) -m validation.perf.plots
PICTURES = $(PLOTS) --latest --history --out '$(OUT)/perf' || echo 'The result of the run is the same without pictures.' >&2
REPORT = $(PY) -m validation.perf.report

perf: $(READY)  ## is it fast, and still as fast as yesterday? figures, gates, and pictures in out/perf
	status=0; $(BENCHMARKS) --benchmark-autosave $(PYTEST_ARGS) --benchmark-compare || status=$$?; \
	    [ $$status -gt 1 ] || { $(PICTURES); }; exit $$status

perf-baseline: $(READY)  ## make this machine's figures those that `make perf` compares with
	$(BENCHMARKS) --perf-baseline $(PYTEST_ARGS)
	$(PICTURES)

perf-docs: $(READY)  ## make docs/performance.md, its pictures, and figures in the README and other pages from RUNS
	$(PLOTS) $(RUNS) --history --out docs/img --prefix perf-
	$(REPORT) $(RUNS) > docs/performance.md
	$(REPORT) $(RUNS) --readme README.md
	$(REPORT) $(RUNS) --results docs/results.md
	$(REPORT) $(RUNS) --notes docs/kernel-notes.md

faults: $(READY)  ## do unit tests notice when something is wrong? every seeded fault must make one fail
	$(PY) -m validation.faults

sanitize: $(READY)  ## do the kernels stay within their memory, and free of races? compute-sanitizer on a GPU
	$(PY) -m validation.sanitize

train: $(READY)  ## train NSA and its dense twin on the same data, side by side
	$(PY) -m validation.system.twins --folder '$(OUT)/train' $(if $(FRESH),--fresh)

coverage: $(READY)  ## unit, smoke and system, and how much of nsa/ they reach, by line and branch
	$(PY) -m coverage erase
	$(MAKE) unit smoke system COVERAGE=1
	$(PY) -m coverage report

test: lint coverage meta  ## what any machine can run while you wait; `make integration` has the rest

docs: $(READY)  ## the API reference, as pages in out/docs; warnings are errors
	$(PY) -m mkdocs build --strict --site-dir '$(abspath $(OUT))/docs'

doctor: $(READY)  ## what this machine has, and which layers it can run
	$(PY) -m validation.doctor

clean:  ## remove what runs leave behind; the environment stays
	rm -rf out outputs build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .tox .coverage htmlcov
	find nsa validation -name __pycache__ -type d -prune -exec rm -rf {} +
