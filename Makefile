# Everything that a contributor or CI runs. GNU make 3.81 (macOS) is enough.

ifeq ($(OS),Windows_NT)
$(error shardwise runs on Linux and macOS. On Windows, use WSL (https://learn.microsoft.com/windows/wsl) and run make there)
endif

PYTHON ?= python3
TORCH_INDEX_URL ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
PYTEST_TF4_ARGS ?=
BENCH_ARGS ?=
FUZZ_SECONDS ?= 30
TEST_WORKERS ?= 2

VENV := .venv
VENV_TF4 := .venv-tf4
# The last step of an installation writes this file, so an interrupted one is repeated.
STAMP := $(VENV)/.installed
STAMP_TF4 := $(VENV_TF4)/.installed
STAMP_DOCS := $(VENV)/.installed-docs
WHEEL_TEST := build/wheel-test
LOCK := build/lock
FUZZ := build/fuzz
PIP := -m pip --disable-pip-version-check --quiet
# Succeeds on a Python that shardwise supports.
PYTHON_IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
# Each has ranks of its own; they wait for each other and for timeouts, so that two keep two cores busy. The order of
# files is that of tests/conftest.py.
WORKERS = -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
TF4_TESTS = $(wildcard tests/unit tests/distributed tests/regression)

# Two targets would install into one virtual environment at the same time under `make -j`.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help setup demo test check docs fuzz test-tf4 matrix wheel-test bench experiment lock clean distclean

help: ## Print this list
	@echo "usage: make TARGET [NAME=VALUE ...]"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "names:"
	@echo "  PYTHON=python3.12     the Python that makes the virtual environments (3.11 or later)"
	@echo "  TORCH_INDEX_URL=URL   another package index for torch, for instance one of CPU-only builds"
	@echo "  TEST_WORKERS=2        how many processes run test files at a time"
	@echo "  FUZZ_SECONDS=600      how long to fuzz"
	@echo "  DEMO_ARGS, PYTEST_ARGS, PYTEST_TF4_ARGS, BENCH_ARGS   further arguments of that target's command"

setup: $(STAMP) ## Create .venv with the pinned versions; does nothing when it is up to date

demo: $(STAMP) ## Shard a real model on four local ranks in every mode; print the table and write the picture
	$(VENV)/bin/shardwise demo $(DEMO_ARGS)

test: $(STAMP) ## Run all tests
	$(VENV)/bin/python -m pytest $(WORKERS) $(PYTEST_ARGS)

check: $(STAMP) ## Check lint, format, types and the direction of imports
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m ruff format --check
	$(VENV)/bin/python -m mypy
	$(VENV)/bin/python -m pytest -q tests/unit/test_layers.py

# Without the variable Material prints a notice about its successor at every build.
docs: $(STAMP_DOCS) ## Build the documentation, English and Chinese, into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --clean
	@echo "[docs] built: build/site/index.html"

# 64 KiB of input reach all of the parser; one input may take 10 s and the process 2 GiB.
fuzz: $(STAMP) ## Fuzz the parser of file headers for 30 s (Linux x86-64)
	@mkdir -p $(FUZZ)
	$(VENV)/bin/python tests/fuzz/fuzz_safetensors_header.py $(FUZZ)/corpus -artifact_prefix=$(FUZZ)/ \
		-max_total_time=$(FUZZ_SECONDS) -max_len=65536 -timeout=10 -rss_limit_mb=2048 -verbosity=0 -print_final_stats=1

test-tf4: $(STAMP_TF4) ## Run the tests on transformers 4, in .venv-tf4
	$(VENV_TF4)/bin/python -m pytest $(WORKERS) $(TF4_TESTS) $(PYTEST_TF4_ARGS)

matrix: $(STAMP) $(STAMP_TF4) ## Load every model family on 1, 2, 3 and 7 ranks, on transformers 5 and 4
	$(VENV)/bin/python -m pytest $(WORKERS) tests/matrix $(PYTEST_ARGS)
	$(VENV_TF4)/bin/python -m pytest $(WORKERS) tests/matrix $(PYTEST_TF4_ARGS)

# The new environment sees the installed dependencies through a .pth file. Python does not follow the .pth files of a
# folder that was added that way, so the editable install of this checkout stays invisible to it.
wheel-test: $(STAMP) ## Build the wheel, install it into a fresh environment and run it there
	@rm -rf $(WHEEL_TEST)
	@mkdir -p $(WHEEL_TEST)/elsewhere
	@echo "[wheel-test] building the wheel"
	@$(VENV)/bin/python $(PIP) wheel --no-deps --no-build-isolation --wheel-dir $(WHEEL_TEST) .
	@echo "[wheel-test] installing $$(basename $(WHEEL_TEST)/*.whl) into a fresh environment"
	@$(VENV)/bin/python -m venv --without-pip $(WHEEL_TEST)/venv
	@$(VENV)/bin/python $(PIP) --python $(WHEEL_TEST)/venv/bin/python install --no-deps --no-index $(WHEEL_TEST)/*.whl
	@$(VENV)/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"), s.get_path("platlib"), sep="\n")' \
		> "$$($(WHEEL_TEST)/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	@echo "[wheel-test] running it from another folder"
	@cd $(WHEEL_TEST)/elsewhere && unset PYTHONPATH && \
		../venv/bin/python -c 'import pathlib, sys, shardwise; \
			home = pathlib.Path(shardwise.__file__).parent; \
			print("[wheel-test] package at", home); \
			sys.exit(not (home.is_relative_to(sys.prefix) and (home / "py.typed").is_file()))' && \
		../venv/bin/shardwise --help > script.txt && \
		../venv/bin/python -m shardwise --help > module.txt && \
		../venv/bin/python -m torch.distributed.run --nproc-per-node 2 -m shardwise --help > torchrun.txt && \
		grep -i usage script.txt module.txt torchrun.txt
	@echo "[wheel-test] passed"

bench: $(STAMP) ## Run the benchmarks, each beside its floor; figures go to benchmarks/results (BENCH_ARGS="NAME ..." selects)
	$(VENV)/bin/python benchmarks/run.py $(BENCH_ARGS)

experiment: $(STAMP) $(STAMP_TF4) ## What memory_efficient_init saves, through both strategies, on transformers 4 and 5
	$(VENV)/bin/python benchmarks/experiment.py $(BENCH_ARGS)
	$(VENV_TF4)/bin/python benchmarks/experiment.py $(BENCH_ARGS)

lock: ## Resolve constraints/*.in afresh and rewrite the pinned versions
	$(call require_python)
	$(call lock,tf5,main,setup)
	$(call lock,tf4,transformers 4,test-tf4)
	$(call lock_docs)

clean: ## Remove build output and caches
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## Remove the virtual environments too
	rm -rf $(VENV) $(VENV_TF4)

$(STAMP): pyproject.toml constraints/tf5.txt
	$(call install,$(VENV),constraints/tf5.txt)

$(STAMP_TF4): pyproject.toml constraints/tf4.txt
	$(call install,$(VENV_TF4),constraints/tf4.txt)

$(STAMP_DOCS): $(STAMP) constraints/docs.txt
	@echo "[setup] $(VENV): what builds the documentation, as pinned in constraints/docs.txt"
	@$(VENV)/bin/python $(PIP) install --constraint constraints/tf5.txt --constraint constraints/docs.txt \
		--no-build-isolation --editable '.[docs]'
	@touch $@

define require_python
@command -v "$(PYTHON)" > /dev/null || { \
	echo "expected Python 3.11 or later, but there is no '$(PYTHON)'." \
		"Install Python, or name another one: make PYTHON=python3.12 TARGET" >&2; exit 1; }
@"$(PYTHON)" $(PYTHON_IS_NEW_ENOUGH) || { \
	echo "expected Python 3.11 or later, but '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1)." \
		"Name another one: make PYTHON=python3.12 TARGET" >&2; exit 1; }
endef

# $(1): virtual environment, $(2): constraints file. The build backend is installed first, at its pinned version, so that
# building needs no further environment.
define install
@if test -x $(1)/bin/python && ! $(1)/bin/python $(PYTHON_IS_NEW_ENOUGH); then \
	echo "expected Python 3.11 or later in $(1), but it has $$($(1)/bin/python --version 2>&1)." \
		"Remove $(1) and run make again." >&2; exit 1; fi
@test -x $(1)/bin/python || $(MAKE) --no-print-directory $(1)/bin/python
@$(1)/bin/python $(PIP) --version > /dev/null 2>&1 || $(1)/bin/python -m ensurepip > /dev/null
@echo "[setup] $(1): torch $$(sed -n 's/^torch==//p' $(2))" \
	"from $(if $(TORCH_INDEX_URL),$(TORCH_INDEX_URL),the default package index) (the largest download)"
@$(1)/bin/python $(PIP) install $(if $(TORCH_INDEX_URL),--index-url "$(TORCH_INDEX_URL)",--constraint $(2)) \
	"torch==$$(sed -n 's/^torch==//p' $(2))"
@echo "[setup] $(1): the other packages, as pinned in $(2)"
@$(1)/bin/python $(PIP) install --constraint $(2) editables hatchling
@$(1)/bin/python $(PIP) install --constraint $(2) --no-build-isolation --editable '.[dev]'
@touch $(1)/.installed
@echo "[setup] $(1): ready, $$($(1)/bin/python --version)"
endef

$(VENV)/bin/python $(VENV_TF4)/bin/python:
	$(call require_python)
	@echo "[setup] $(@:/bin/python=): a new virtual environment of $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv --clear $(@:/bin/python=) || { rm -rf $(@:/bin/python=); \
		echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu, install the package python3-venv." >&2; exit 1; }

# $(1): name of the constraints, $(2): the environment in words, $(3): the target that uses it.
define lock
@echo "[lock] resolving constraints/$(1).in"
@rm -rf $(LOCK)
@mkdir -p $(LOCK)
@"$(PYTHON)" -m venv $(LOCK)/venv
@$(LOCK)/venv/bin/python $(PIP) install --requirement constraints/$(1).in --editable '.[dev]'
@$(LOCK)/venv/bin/python $(PIP) freeze --all --exclude-editable --exclude pip --exclude wheel > $(LOCK)/freeze.txt
@{ echo '# Pinned versions of the $(2) development environment; used by `make $(3)`.'; \
	echo '# Renew with `make lock`, which resolves constraints/$(1).in and the extras of the package afresh.'; \
	echo '# torch pins its own CUDA packages exactly, so they are not repeated here.'; \
	sed 's/+.*//' $(LOCK)/freeze.txt | grep -Ev '^(cuda|nvidia|triton)' | LC_ALL=C sort -f; } > $(LOCK)/$(1).txt
@mv $(LOCK)/$(1).txt constraints/$(1).txt
@rm -rf $(LOCK)
endef

# Of what the extra `docs` brings, the versions that constraints/tf5.txt does not have.
define lock_docs
@echo "[lock] resolving the extra docs"
@rm -rf $(LOCK)
@mkdir -p $(LOCK)
@"$(PYTHON)" -m venv $(LOCK)/venv
@$(LOCK)/venv/bin/python -c 'import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(LOCK)/docs.in
@$(LOCK)/venv/bin/python $(PIP) install --constraint constraints/tf5.txt --requirement $(LOCK)/docs.in
@$(LOCK)/venv/bin/python $(PIP) freeze --all --exclude pip --exclude setuptools --exclude wheel > $(LOCK)/freeze.txt
@{ sed -n '/^#/p' constraints/docs.txt; \
	grep -viFx -f constraints/tf5.txt $(LOCK)/freeze.txt | LC_ALL=C sort -f; } > $(LOCK)/docs.txt
@mv $(LOCK)/docs.txt constraints/docs.txt
@rm -rf $(LOCK)
endef
