# Tuanyuan's tasks; `make` alone lists them. Written for GNU make 3.81 (macOS) and later, and a POSIX shell.
#
# .venv/.run and .venv/.dev say that the environment holds what the lock files ask for. They depend on the lock files
# and on pyproject.toml, so that a second `make setup` does nothing.

VENV = .venv
BIN = $(VENV)/bin
PYTHON ?=
PYTEST_ARGS ?=
UPGRADE ?=
SOAK_ARGS ?=
LOADTEST_ARGS ?=
SEEDS ?= 1000
FUZZ_RUNS ?= 10000000

# Only wheels whose hashes are locked: nothing is built from a source archive, nothing unlocked is downloaded.
PIP_INSTALL = $(BIN)/python -m pip --disable-pip-version-check install
LOCKED = --require-hashes --only-binary :all:
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	--custom-compile-command 'make lock' --constraint requirements/constraints.in $(if $(UPGRADE),--upgrade)
YAML_RULES = '{extends: default, rules: {document-start: disable, line-length: {max: 120}}}'
SHELL_SCRIPTS = scripts/find-python scripts/make-venv .ci/run

.DEFAULT_GOAL := help
.PHONY: help setup demo test page page-bench screenshots loadtest simulate soak fuzz check format lock image-steps clean \
	distclean ask-python

help: ## List the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  Variables: PYTHON=/path/to/python3.12 (setup), DEMO_SECONDS=20 (demo), PYTEST_ARGS="-k ring" (test),'
	@echo '  SEEDS=200 (simulate), SOAK_ARGS="kill-flow --minutes 5" (soak),'
	@echo '  LOADTEST_ARGS="rush-hour --minutes 5" (loadtest), FUZZ_RUNS=100000 (fuzz), UPGRADE=1 (lock)'

setup: $(VENV)/.dev ## Create .venv with the locked requirements and Tuanyuan itself

demo: $(VENV)/.run ## Watch a missing child's alert reach the phones around, with a server and a world of its own
	@$(BIN)/tuanyuan demo

test: $(VENV)/.dev ## Run the tests
	@$(BIN)/tuanyuan warmup
	@$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

soak: $(VENV)/.dev ## Break a deployment in every way of the fault table, at full size: 25 to 35 minutes, alone on the machine
	@$(BIN)/tuanyuan soak $(SOAK_ARGS)

loadtest: $(VENV)/.dev ## Put a system of its own under load for two minutes: who was missed, what is slow, what gives way first
	@$(BIN)/python -m loadtest $(LOADTEST_ARGS)

page: ## Build the operator's page from web/ into gateway/page: needs Node 20 or later, and npm
	@cd web && npm ci --no-fund --no-audit && npm run build

page-bench: $(VENV)/.dev ## Measure what the page costs: bytes, frames, main thread, memory over hours; needs Chromium, 4 minutes
	@$(BIN)/python -m scripts.page_bench

screenshots: $(VENV)/.dev ## Make the pictures of the operator's page in docs/images: needs Chromium, about 5 minutes
	@$(BIN)/tuanyuan warmup
	@$(BIN)/python -m scripts.screenshots

simulate: $(VENV)/.run ## Play SEEDS=1000 small worlds full of faults against the oracles
	@$(BIN)/tuanyuan simulate --seeds $(SEEDS)

fuzz: $(VENV)/.dev ## Feed every decoder of outside bytes with FUZZ_RUNS=10000000 inputs, then that of CAP: over an hour; Linux
	@$(BIN)/python -m tests.fuzz.decoders --runs $(FUZZ_RUNS)
	@$(BIN)/python -m tests.fuzz.cap -runs=$(FUZZ_RUNS)

check: $(VENV)/.dev ## Check format, lint, types, Dockerfile, compose.yaml, shell scripts, known weaknesses; list what is shipped
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/yamllint --strict --config-data $(YAML_RULES) compose.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	$(BIN)/python scripts/known_weaknesses.py requirements/run.txt
	@mkdir -p out
	$(BIN)/python -W ignore::UserWarning -m cyclonedx_py requirements --pyproject pyproject.toml --of JSON --output-file out/sbom.cdx.json requirements/run.txt
	@if [ -x $(BIN)/shellcheck ]; then echo '$(BIN)/shellcheck $(SHELL_SCRIPTS)'; $(BIN)/shellcheck $(SHELL_SCRIPTS); \
	else echo 'shellcheck: not available for this machine, skipped'; fi

format: $(VENV)/.dev ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

lock: $(VENV)/.dev ## Derive requirements/*.txt from pyproject.toml; UPGRADE=1 takes newer versions
	$(COMPILE) pyproject.toml --group dev --output-file requirements/dev.txt
	$(COMPILE) pyproject.toml --constraint requirements/dev.txt --output-file requirements/run.txt
	$(COMPILE) --group pyproject.toml:build --constraint requirements/dev.txt --output-file requirements/build.txt

image-steps: $(VENV)/.dev ## Play the Dockerfile's install steps in a temporary directory, without a container engine
	$(BIN)/python scripts/image_steps.py

clean: ## Remove caches and build output
	rm -rf build dist out .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove the virtual environment too
	rm -rf $(VENV)

# What the program needs, and the program itself: editable, so that a change of the source needs no new set-up.
$(VENV)/.run: requirements/build.txt requirements/run.txt pyproject.toml $(if $(PYTHON),ask-python)
	@scripts/make-venv $(VENV) '$(PYTHON)'
	@echo 'Installing the locked requirements: about 180 MB, once'
	$(PIP_INSTALL) $(LOCKED) -r requirements/build.txt -r requirements/run.txt
	$(PIP_INSTALL) --quiet --no-index --no-deps --no-build-isolation --editable .
	@touch $@

# A PYTHON that was named is compared with the one in use, whatever the stamps say.
ask-python:

$(VENV)/.dev: $(VENV)/.run requirements/dev.txt
	@echo 'Installing the tools for tests and checks: about 130 MB, once'
	$(PIP_INSTALL) $(LOCKED) -r requirements/dev.txt
	@touch $@
