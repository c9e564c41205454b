# Everything a newcomer needs: `make run`, `make test`. Only Python 3.11 or newer, git and make are assumed.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin

SOURCES := $(shell find relay -name '*.py') hatch_build.py pyproject.toml
INSTALLED := build/installed

.PHONY: run test lint format sure bench bench-quick bench-peers bench-instructions docs pages lock lowest clean

run: $(VENV)/run ## set up and start the relay with its built-in upstream
	@$(BIN)/relay serve --dev

test: $(VENV)/dev ## set up and run the tests, in two processes
	@$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/dev ## ruff and mypy, as CI runs them
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict relay

format: $(VENV)/dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(VENV)/dev $(INSTALLED) ## all cases, beside a direct send, a naive relay and the peers installed; most of an hour; writes docs/benchmarks.md
	@$(BIN)/python -m bench.run --write

bench-quick: $(VENV)/dev $(INSTALLED) ## under two minutes once the relay is compiled, without peers
	@$(BIN)/python -m bench.run --quick

bench-instructions: $(VENV)/dev $(INSTALLED) ## instructions a message, beside those that are stored (valgrind)
	@$(BIN)/python -m bench.instructions

bench-peers: ## install the peers of the benchmark into .peers (Debian, as root)
	@bench/peers/install.sh

docs: $(VENV)/dev ## the documentation as a site, in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

pages: $(VENV)/dev ## the parts of the documents that follow from the code: settings, commands
	@$(BIN)/python -m tests.support.pages

# The one source of versions is constraints.txt: the locks are its pins of what an image needs, with hashes.
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--constraint constraints.txt

lock: $(VENV)/dev ## requirements.lock and requirements-build.lock, after any change of dependencies
	$(LOCK) pyproject.toml --extra postgres --output-file requirements.lock
	printf '%s\n' hatchling mypy setuptools | $(LOCK) - --output-file requirements-build.lock

lowest: $(VENV)/dev ## the tests that matter for it, with the lowest versions that pyproject.toml allows
	@$(BIN)/pytest -q tests/interop/test_install.py -k lowest

sure: lint docs test ## all that CI runs

$(VENV)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/run: $(VENV)/python pyproject.toml constraints.txt
	@echo "setting up $(VENV) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/dev: $(VENV)/python pyproject.toml constraints.txt
	@echo "setting up $(VENV) for development ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@touch $@ $(VENV)/run

$(INSTALLED): $(SOURCES) | $(VENV)/dev # the relay as it is installed, for the benchmarks
	@echo "installing the relay into $@, compiled where there is a compiler ..."
	@rm -rf $@
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target $@ .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build site
