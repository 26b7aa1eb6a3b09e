# make demo: compress a real model, end to end; make test: everything the project claims. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test check bench bench-inference report clean-stale help
.DEFAULT_GOAL := help

help:
	@grep -E '^# make' Makefile; grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /: /'

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(BIN)/.installed-test: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: $(BIN)/.installed ## compress SmolLM2-135M to 60 % of its linear parameters and measure it
	snakemake --cores 2 --resources gpu=1 results/smollm2-135m_r0.6/eval.json
	@python -m aasvd.report results/smollm2-135m_r0.6/eval.json

test: $(BIN)/.installed-test ## format, lint, types, then the whole test suite
	ruff format --check aasvd tests
	ruff check aasvd tests
	mypy
	OMP_NUM_THREADS=1 python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(BIN)/.installed-test ## format, lint and types only
	ruff format aasvd tests
	ruff check --fix aasvd tests
	mypy

bench: $(BIN)/.installed ## seconds per stage and block, fixed cost per job, GFLOP/s, memory; BENCH=paper: only that
	python -m aasvd.bench $(BENCH)

bench-inference: $(BIN)/.installed ## tokens per second and memory, dense against compressed; QUICK=1 only sees whether it runs
	python -m aasvd.bench_inference $(if $(QUICK),--quick)

report: $(BIN)/.installed ## report.html from the finished runs
	snakemake --report report.html

clean-stale: $(BIN)/.installed ## list artifacts no run of today's params.yaml refers to; YES=1 removes them
	python -m aasvd.stale $(if $(YES),--remove)
