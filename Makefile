# The Python for the virtual environment, and the environment's folder:
#     PYTHON=python3.12 make test
PYTHON ?= python3
VENV ?= .venv
# Arguments for the program that a target runs:  make test ARGS="-k cancel"
ARGS ?=
# The kinds of tests that quick leaves out: CONTRIBUTING.rst describes them.
QUICK := not (mongo or postgres or mariadb or process or browser or campaign or slow)
# How many processes run tests at a time. Tests wait more than they compute, so two cores are enough for five.
PROCESSES ?= 5
# The store of a soak, if it is not SQLite:  make soak ON=mongo ARGS="--kills 200"
ON ?=
# The hours of a soak:  make soak HOURS=2
HOURS ?=
# The folder of a Python without the interpreter's lock. make clean leaves it alone: to build it takes minutes.
FREE_THREADED ?= $(HOME)/.cache/taskx/python3.13t
# The number of seeds of a simulation; or any value to search the planted bugs:  make simulate PLANTED=1
SEEDS ?= 1000
PLANTED ?=

MAKEFLAGS += --no-print-directory
# Keep bytecode. Otherwise each program that a test starts would compile the whole package again.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
# One stamp file for the Python, and one for each set of packages. They are in the environment, so another
# PYTHON, which makes a new environment, removes them all.
MADE := $(VENV)/made-with-$(subst /,-,$(PYTHON))
PACKAGE := setup.cfg setup.py taskx/__init__.py
# Bytecode of packages is made when a program first imports them. Pip would make it for all of their modules,
# which takes as long as the rest of the installation.
INSTALL = echo "Installing $(1) into $(VENV)" && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517 --no-compile \
		--editable "$(1)" && touch $@

.PHONY: help packages demo quick test test-free-threaded soak cuts simulate lint format typecheck layers docs bench build ci ci-all clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

packages: $(VENV)/installed-all ## install the packages of all targets but bench, in one go

demo: $(VENV)/installed-core ## run the demo: hash the standard library with tasks
	@$(BIN)/python examples/checksum.py $(ARGS)

quick: $(VENV)/installed-test ## run the quick tests, in a few minutes
	@$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal -m "$(QUICK)" \
		--durations 5 --durations-min 1 $(ARGS)

test: $(VENV)/installed-test ## run all tests
	@$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal $(ARGS)

test-free-threaded: $(FREE_THREADED)/bin/python3.13t ## run the quick tests without the interpreter's lock
	@$(MAKE) quick PYTHON=$< VENV=.venv-3.13t \
		INSTALL='$$(BIN)/python tools/install_wheels.py && touch $$@'

soak: $(VENV)/installed-test ## kill processes a thousand times, or for HOURS, and check that no task is lost
	@$(BIN)/python -m tests.campaign.$(if $(HOURS),soak --hours $(HOURS) $(if $(ON),--on $(ON)),campaign --kills 1000 $(if \
		$(filter mongo postgres,$(ON)),--$(ON))) $(ARGS)

cuts: $(VENV)/installed-test ## cut the power at each write of SQLite, and check what is left
	@$(BIN)/python -m tests.campaign.cuts $(ARGS)

simulate: $(VENV)/installed-test ## simulate new SEEDS, each in two processes, or search the PLANTED bugs
	@$(BIN)/python -m tests.testing.zoo $(if $(PLANTED),--planted,--seeds $(SEEDS)) $(ARGS)

lint: $(VENV)/installed-dev ## check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/installed-dev ## fix style and formatting automatically
	@$(BIN)/ruff check --fix --exit-zero .
	@$(BIN)/ruff format .

typecheck: $(VENV)/installed-dev ## check the types of the package and of its public interface
	@$(BIN)/mypy
	@$(BIN)/mypy tests/typing
	@$(BIN)/basedpyright --pythonpath $(BIN)/python tests/typing

layers: $(VENV)/installed-dev ## check that imports only go down the layers
	@$(BIN)/lint-imports --no-cache

docs: $(VENV)/installed-docs ## build the documentation as a site into build/docs, and check it
	@$(BIN)/python -m sphinx -W --keep-going -q -b html -c docs -d build/doctrees . build/docs
	@$(BIN)/python tools/check_site.py build/docs
	@echo "built build/docs/index.html"

bench: $(VENV)/installed-bench ## measure TaskX, a plain loop and similar libraries
	@$(BIN)/python -m benchmarks $(ARGS)

build: $(VENV)/installed-dev ## build the sdist and the wheel into dist/, and try the wheel
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist .
	@$(BIN)/python -m twine check --strict dist/*
	@$(BIN)/python tools/follow_tutorial.py 'dist/*.whl'

ci: ## run all checks for a change: style, types, builds, tests on every Python
	@.ci/run

ci-all: ## run the same before a release, with all tests on every Python
	@.ci/run --all

clean: ## remove all files that make has created
	rm -rf .venv .venv-* build dist *.egg-info
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

$(FREE_THREADED)/bin/python3.13t:
	@tools/free_threaded.sh $(FREE_THREADED)

$(MADE):
	@command -v "$(PYTHON)" > /dev/null || { echo "$(PYTHON) was not found: install Python" \
		"3.10 or newer, or name another one, as in: PYTHON=python3.12 make test" >&2; exit 1; }
	@"$(PYTHON)" tools/bootstrap.py $(VENV)
	@touch $@

$(VENV)/installed-core: $(MADE) $(PACKAGE)
	@$(call INSTALL,.)

$(VENV)/installed-test: $(MADE) $(PACKAGE)
	@$(call INSTALL,.[test])

$(VENV)/installed-dev: $(MADE) $(PACKAGE)
	@$(call INSTALL,.[test$(COMMA)dev])

$(VENV)/installed-docs: $(MADE) $(PACKAGE)
	@$(call INSTALL,.[docs])

# This installation has the packages of these targets, too.
$(VENV)/installed-all: $(MADE) $(PACKAGE)
	@$(call INSTALL,.[test$(COMMA)dev$(COMMA)docs])
	@touch $(addprefix $(VENV)/installed-,core test dev docs)

$(VENV)/installed-bench: $(MADE) $(PACKAGE)
	@$(call INSTALL,.[bench])

COMMA := ,
