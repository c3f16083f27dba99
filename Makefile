# `make` lists the targets.
#
# Every target installs what it needs, unless it is up to date: stamp files inside .venv are compared with the files that
# they depend on. Variables for the command line:
#   PYTHON=python3.12   interpreter for .venv (3.11 or newer); another version recreates .venv
#   DEVICE=tpu          cpu, cuda12 or tpu: the requirements file to install; by default, what this machine has
#   ARGS="-k kl -x"     further arguments: for pytest (test, parity) or for the experiment (quickstart)
#   JOBS=2              number of pytest workers

ifeq ($(origin PYTHON),undefined)
PYTHON := $(if $(wildcard .venv/.setup-*),.venv/bin/python,python3)
endif
ifeq ($(origin DEVICE),undefined)
DEVICE := $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),cuda12,cpu)
endif
JOBS ?= 2
ARGS ?=

# The ends of the supported range of Python and jax. The versions pinned for .venv are in between.
OLDEST_PYTHON := 3.11
OLDEST_JAX := 0.10.2
NEWEST_PYTHON := 3.12
find_python = $(or $(shell python$(1) -c 'import sys; print(sys.executable)' 2>/dev/null),$(lastword \
  $(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python)),python$(1))

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
SETUP := .venv/.setup-$(VERSION)-$(DEVICE)
DEV := .venv/.dev-$(VERSION)
JUPYTER := .venv/.notebooks-$(VERSION)
DOCS := .venv/.docs-$(VERSION)
PARITY := .venv-parity/.parity-$(VERSION)
LOCK := .venv-requirements/.lock-$(VERSION)

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
PYTEST := -m pytest -n $(JOBS) --dist worksteal
# Tests for .venv-parity, which also has the clients of Weights & Biases and MLflow.
COMPARED := tests/parity tests/runtime/test_trackers.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup dev docs quickstart notebooks test nightly versions mutation lint format parity requirements \
  address clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(SETUP) ## install the package and its pinned dependencies into .venv
	@echo ".venv is ready: Python $(VERSION), requirements-$(DEVICE).txt"

quickstart: $(SETUP) ## run SFT, a reward model, Best-of-N, DPO and PPO on movie reviews, and write a report
	.venv/bin/rlhf-jax fetch movie_reviews
	.venv/bin/python -m rlhf_jax --config=experiments/movie_reviews/quickstart.py --workdir=runs/quickstart $(ARGS)

notebooks: $(JUPYTER) ## open the notebooks in JupyterLab
	cd notebooks && ../.venv/bin/jupyter lab 01_quickstart.ipynb $(ARGS)

test: lint ## run lint, type checks and the quick tests, with shapes unchecked
	.venv/bin/python $(PYTEST) --no-shapes $(ARGS)

nightly: lint $(PARITY) ## run all tests: quick, slow, parity, and the oldest and newest versions
	@status=0; \
	.venv/bin/python $(PYTEST) -m "" $(ARGS) || status=1; \
	.venv-parity/bin/python $(PYTEST) -m "" $(COMPARED) $(ARGS) || status=1; \
	exit $$status
	$(MAKE) versions

versions: .venv-oldest/.ready .venv-newest/.ready ## run the quick tests with the oldest and the newest supported Python and jax
	.venv-oldest/bin/python $(PYTEST) $(ARGS)
	.venv-newest/bin/python $(PYTEST) $(ARGS)

mutation: $(DEV) ## change core/ in one place at a time; print changes that no test notices (ARGS="core/kl")
	.venv/bin/python -m tests.mutation --jobs=$(JOBS) $(ARGS)

lint: $(DEV) ## check formatting, lint, types and the direction of imports
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyrefly check --python-interpreter-path .venv/bin/python
	.venv/bin/lint-imports

format: $(DEV) ## format the code, and fix what ruff can fix
	.venv/bin/ruff check --fix-only .
	.venv/bin/ruff format .

dev: $(DEV) ## setup, and install the tools for tests, lint and notebooks

docs: $(DOCS) ## build the documentation site in build/site, with warnings as errors
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --quiet

parity: $(PARITY) ## compare with torch, TRL, transformers and PEFT (in .venv-parity; a large download)
	.venv-parity/bin/python $(PYTEST) $(COMPARED) $(ARGS)

requirements: $(LOCK) ## pin the dependencies of pyproject.toml; ARGS=--upgrade takes the newest releases
	@set -e; \
	compile() { .venv-requirements/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
	  --custom-compile-command 'make requirements' "$$@" pyproject.toml >/dev/null; }; \
	compile $(ARGS) --output-file requirements-cpu.txt; \
	for extra in cuda12 tpu dev notebooks docs; do \
	  all=.venv-requirements/$$extra.txt; \
	  cat requirements-cpu.txt requirements-$$extra.txt 2>/dev/null | grep -v '^-r' >$$all || true; \
	  compile $(ARGS) --constraints requirements-cpu.txt --extra $$extra --output-file $$all; \
	  { grep '^#' $$all; echo '-r requirements-cpu.txt'; grep -vxFf requirements-cpu.txt $$all; } >$$all.new; \
	  mv $$all.new requirements-$$extra.txt; \
	done; \
	if grep -i '^torch' requirements-*.txt --exclude=requirements-parity.txt; then \
	  echo 'torch takes gigabytes, and only `make parity` may install it: find the dependency that requires it' >&2; exit 1; \
	fi

address: ## write the address of the repository where it belongs: make address URL=https://github.com/OWNER/NAME
	@case '$(URL)' in https://github.com/?*/?*) ;; *) echo 'URL=https://github.com/OWNER/NAME is missing' >&2; exit 1;; esac
	@old=$$(sed -n 's|^Repository = "https://github.com/\(.*\)"|\1|p' pyproject.toml); new='$(URL:https://github.com/%=%)'; \
	sed -i "s|\(github[.com]*/\)$$old|\1$$new|g" pyproject.toml README.md CONTRIBUTING.md notebooks/*.py notebooks/*.ipynb; \
	sed -i "s|git+URL|git+https://github.com/$$new|g; s|git clone URL|git clone https://github.com/$$new|" README.md CONTRIBUTING.md

clean: ## remove the environments and caches, but not runs/
	rm -rf .venv .venv-parity .venv-requirements .venv-oldest .venv-newest build dist *.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find rlhf_jax experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A virtual environment with the interpreter that PYTHON names.
%/.python-$(VERSION):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'rlhf_jax needs Python 3.11 or newer, and PYTHON=$(PYTHON) is $(or $(VERSION),no Python that runs here).' \
	    'Name another one, as in: make setup PYTHON=python3.12' >&2; exit 1; }
	@echo "Making $* with Python $(VERSION)"
	@$(PYTHON) -m venv --clear $*
	@touch $@

$(SETUP): requirements-$(DEVICE).txt requirements-cpu.txt pyproject.toml | .venv/.python-$(VERSION)
	@echo "Installing requirements-$(DEVICE).txt into .venv (minutes the first time)"
	@.venv/bin/python $(PIP_INSTALL) -r requirements-$(DEVICE).txt
	@.venv/bin/python $(PIP_INSTALL) --no-deps --editable .
	@touch $@

# libtpu compiles for TPUs without one, so that the tests of `rlhf-jax plan` run. It exists for this platform only, and has
# a directory of its own, since JAX looks for a TPU, and complains, in every environment that has it.
TPU_COMPILER := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),.venv/libtpu/.ready)

$(DEV): requirements-dev.txt $(SETUP) | $(TPU_COMPILER)
	@echo "Installing requirements-dev.txt into .venv"
	@.venv/bin/python $(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

.venv/libtpu/.ready: requirements-tpu.txt $(SETUP)
	@echo "Installing libtpu into .venv/libtpu"
	@grep '^libtpu' requirements-tpu.txt >.venv/libtpu.txt
	@.venv/bin/python $(PIP_INSTALL) --no-deps --upgrade --target .venv/libtpu -r .venv/libtpu.txt
	@touch $@

$(JUPYTER): requirements-notebooks.txt $(SETUP)
	@echo "Installing requirements-notebooks.txt into .venv"
	@.venv/bin/python $(PIP_INSTALL) -r requirements-notebooks.txt
	@touch $@

$(DOCS): requirements-docs.txt $(SETUP)
	@echo "Installing requirements-docs.txt into .venv"
	@.venv/bin/python $(PIP_INSTALL) -r requirements-docs.txt
	@touch $@

# torch first and alone, so that a package that requires any "torch" cannot choose another release.
$(PARITY): requirements-parity.txt requirements-dev.txt requirements-cpu.txt pyproject.toml | .venv-parity/.python-$(VERSION)
	@echo "Installing torch and requirements-parity.txt into .venv-parity"
	@.venv-parity/bin/python $(PIP_INSTALL) torch==2.13.0
	@.venv-parity/bin/python $(PIP_INSTALL) -r requirements-parity.txt
	@.venv-parity/bin/python $(PIP_INSTALL) --no-deps --editable .
	@touch $@

.venv-newest/.ready: requirements-dev.txt requirements-tpu.txt requirements-cpu.txt pyproject.toml
	@echo "Installing requirements-dev.txt and libtpu into .venv-newest, with Python $(NEWEST_PYTHON)"
	@$(call find_python,$(NEWEST_PYTHON)) -m venv --clear .venv-newest
	@.venv-newest/bin/python $(PIP_INSTALL) -r requirements-dev.txt -r requirements-tpu.txt
	@.venv-newest/bin/python $(PIP_INSTALL) --no-deps --editable .
	@touch $@

.venv-oldest/.ready: requirements-dev.txt requirements-cpu.txt pyproject.toml
	@echo "Installing requirements-dev.txt into .venv-oldest, with Python $(OLDEST_PYTHON), and jax $(OLDEST_JAX)"
	@$(call find_python,$(OLDEST_PYTHON)) -m venv --clear .venv-oldest
	@.venv-oldest/bin/python $(PIP_INSTALL) -r requirements-dev.txt
	@.venv-oldest/bin/python $(PIP_INSTALL) jax==$(OLDEST_JAX) jaxlib==$(OLDEST_JAX)
	@.venv-oldest/bin/python $(PIP_INSTALL) --no-deps --editable .
	@touch $@

$(LOCK): | .venv-requirements/.python-$(VERSION)
	@.venv-requirements/bin/python $(PIP_INSTALL) uv==0.13.9
	@touch $@
