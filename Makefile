# `make demo` and `make test` set up .venv by themselves, with uv where it is installed, else with pip.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The first Python >= 3.11 that starts. Name another with: make PYTHON=/path/to/python test
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	"$$p" -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
UV ?= $(shell command -v uv)

BIN := .venv/bin
READY := .venv/ready

TORCH := .venv-torch/bin
TORCH_READY := .venv-torch/ready

.PHONY: help demo test test-slow test-torch test-launch soak lint notebooks lock clean

help:
	@echo 'make demo       train the demo into runs/demo and write its report (about 10 minutes)'
	@echo 'make test       lint, types, import rules, tests'
	@echo 'make test-slow  whole runs and other tests that take long (CI runs them too)'
	@echo 'make test-torch the tests against PyTorch, transformers and open_clip (a .venv-torch of 2 GB)'
	@echo 'make test-launch job files against xpk and SkyPilot themselves (two environments of 0.8 GB)'
	@echo 'make soak       kills, full disks and lost devices in real processes, Slurm (long)'
	@echo 'make lint       the first three alone'
	@echo 'make notebooks  run the notebooks'
	@echo 'make lock       resolve requirements/*.txt anew (needs uv)'
	@echo 'make clean      remove .venv, .venv-*, caches and build folders; runs/ stays'

demo: $(READY)
	$(BIN)/m2jax train --config configs/emoji.py --workdir runs/demo

test: lint
	$(BIN)/python -m pytest -n 2

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 -m 'slow and not soak and not slurm'

test-torch: $(TORCH_READY)
	$(TORCH)/python -m pytest -n 0 -m torch

# Each tool in an environment of its own: their pins and ours do not fit together.
.venv-xpk/ready:
	$(PYTHON) -m venv .venv-xpk
	.venv-xpk/bin/python -m pip install --quiet xpk==1.16.0
	touch $@

.venv-sky/ready:
	$(PYTHON) -m venv .venv-sky
	.venv-sky/bin/python -m pip install --quiet skypilot==0.14.1
	touch $@

test-launch: $(READY) .venv-xpk/ready .venv-sky/ready
	$(BIN)/python -m pytest -n 0 tests/launch/test_tools.py

soak: $(READY)
	$(BIN)/python -m pytest -n 0 -m 'soak or slurm'
	$(BIN)/python -m tests.multiprocess.soak

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

notebooks: $(READY)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest --nbmake -n 0 notebooks

# Written last, so an interrupted set-up starts again; remade when the requirements change.
$(READY): requirements/dev.txt pyproject.toml
	@test -n '$(PYTHON)' || { echo 'no Python >= 3.11 found: install one, or name it: make PYTHON=...' >&2; exit 2; }
	@echo 'setting up .venv: about a minute with pip, seconds with uv'
	rm -rf .venv
ifneq ($(UV),)
	$(UV) venv --quiet --python '$(PYTHON)' .venv
	$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r requirements/dev.txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
else
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
endif
	touch $@

# Always with pip: only it takes the CPU build of torch (see requirements/torch.txt).
$(TORCH_READY): requirements/torch.txt requirements/dev.txt
	@echo 'setting up .venv-torch: about two minutes'
	rm -rf .venv-torch
	$(PYTHON) -m venv .venv-torch
	$(TORCH)/python -m pip install --quiet "$$(grep '^torch==' requirements/torch.txt)"
	$(TORCH)/python -m pip install --quiet --no-deps --require-hashes -r requirements/dev.txt
	$(TORCH)/python -m pip install --quiet --no-deps -r requirements/torch.txt
	$(TORCH)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

COMPILE := uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' --upgrade --quiet

lock:
	$(COMPILE) -o requirements/base.txt
	$(COMPILE) --extra dev -o requirements/dev.txt

clean:
	rm -rf .venv .venv-torch .venv-xpk .venv-sky .cache build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
