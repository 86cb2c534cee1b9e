# Every command a newcomer or the continuous integration needs.  `make help` lists them.
#
#   VENV=dir      where the environment lives (default .venv)
#   PYTHON=exe    the Python that creates it (default: the first of Python 3.11 to 3.14 on PATH)
#   PY=exe        use this Python as it is: nothing is created or installed (conda, containers)
#   ARGS="..."    words added to the command of a target, e.g.  make quickstart ARGS="train.steps=50 seed=1"

VENV ?= .venv
PY ?= $(VENV)/bin/python
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && echo $$p && break; done)
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TESTS ?= -n auto --maxprocesses 4 --dist loadfile

# The environment a target needs; none when the caller brought a Python of their own with PY=.
RUN_ENV := $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.installed)
DEV_ENV := $(if $(RUN_ENV),$(VENV)/.installed-dev)

.DEFAULT_GOAL := help
.PHONY: help quickstart check lint format types imports test test-distributed bench gpu-check kernel-report docs env dev clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

quickstart: $(RUN_ENV)  ## train a small model in NVFP4 on this machine (about two minutes; no GPU, no download of data)
	$(PY) launch/train.py recipe=quickstart $(ARGS)

check: lint types imports test  ## everything CI runs: ruff, mypy, import-linter, pytest

lint: $(DEV_ENV)  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(DEV_ENV)  ## rewrite the files as `make lint` wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(DEV_ENV)  ## mypy
	$(PY) -m mypy

imports: $(DEV_ENV)  ## import-linter: who may import whom
	$(PY) -c 'from importlinter.cli import lint_imports_command as main; main()' --no-logo

test: $(DEV_ENV)  ## pytest; TESTS="tests/linear -x" chooses
	$(PY) -m pytest $(TESTS)

test-distributed: $(DEV_ENV)  ## the part of `make test` that starts several processes: layouts, communication, faults
	$(PY) -m pytest $(TESTS) -m distributed

bench: $(RUN_ENV)  ## one linear layer, forward + backward, every recipe against bf16 and fp32
	$(PY) tools/bench_linear.py $(ARGS)

gpu-check: $(RUN_ENV)  ## on a GPU: every kernel and backend against the definition, then their speed against bf16
	$(PY) tools/gpu_check.py $(ARGS)

kernel-report: $(DEV_ENV)  ## docs/kernels.md anew: what every Triton kernel costs by its machine code (no GPU needed; minutes)
	$(PY) tools/kernel_report.py --update $(ARGS)

docs: $(RUN_ENV)  ## docs/recipes.md anew: equations and texts from the YAML, figures measured where a recipe has changed
	$(PY) -m lowprec.tools.recipe_page $(ARGS)

env: $(RUN_ENV)  ## only create the environment for running
dev: $(DEV_ENV)  ## only create the environment for working on lowprec

# torch goes first.  On Linux without an NVIDIA GPU it comes from PyTorch's CPU index (about 200 MB) instead of PyPI, whose
# Linux wheel brings CUDA (several GB).  Where that index does not answer within 5 s, pip's own configuration decides.
$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "lowprec needs Python 3.11 to 3.14 and found none on PATH; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	@echo "creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) could not create $(VENV); on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "installing into $(VENV): about 1.6 GB on disk, one to a few minutes"; index=; \
	if [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then \
		if $(PY) -c 'import signal, sys, urllib.request as u; signal.alarm(5); u.urlopen(sys.argv[1], timeout=4)' $(TORCH_CPU_INDEX)/torch/ 2>/dev/null; \
		then index="--extra-index-url $(TORCH_CPU_INDEX)"; \
		else echo "$(TORCH_CPU_INDEX) does not answer: installing the torch that pip finds by itself (from PyPI on Linux: with CUDA, several GB)"; fi; \
	fi; \
	torch=$$($(PY) -c 'import tomllib; print(*(d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if d.startswith("torch>")))'); \
	set -x; $(PY) -m pip install $$index "$$torch"
	$(PY) -m pip install --quiet --editable .
	@touch $@

# Triton (1 GB) for the proofs of kernels; where there is a GPU, torch brings its own.
$(VENV)/.installed-dev: $(VENV)/.installed
	@kernels=,kernels; nvidia-smi -L >/dev/null 2>&1 && kernels=; echo "installing what development needs (Triton: another GB)"; set -x; $(PY) -m pip install --quiet --editable ".[dev$$kernels]"
	@touch $@

clean:  ## remove build products and caches; environment and runs stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
