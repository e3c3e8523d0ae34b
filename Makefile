# The two commands of the README are `make demo` and `make test`; each makes .venv when there is none.
#
#   make test       linters, types and the tests that a contributor runs: 10 to 13 minutes on 2 cores, installation
#                   included
#   make test-slow  the tests that `make test` leaves out (the mark `slow`): kills, buckets, the demo, ranks, the
#                   explorer in Chromium, which it installs where it can
#   make test-all   `make test-slow`, and after it `make test-cluster`
#   make test-long  more cases of what the two others test (the mark `long`): before a release
#   make test-cluster  the tests with the mark `cluster`: installs SLURM, Ray and vLLM where it can, and runs them; what
#                   it cannot install within ten minutes is skipped, and the summary says why
#   make docs       the documentation as a site, in build/site; a link that leads nowhere is an error
#   make gpu        the tests with the mark `gpu` and the GPU benchmarks: at most 8 minutes on one card; without one it says so

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c 'import sys, ensurepip; print("$(p)") if (3, 11) <= sys.version_info < (3, 14) else None' 2>/dev/null)))
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The demo needs half of what the tests do. Whoever has that for the tests has it for the demo, too.
DEMO_STAMP := $(VENV)/.installed-for-demo
# pip compiles every module on one core, which takes most of its time. The demo compiles what it imports; the tests, which
# take a warning of a compiler for an error, find all compiled, on two cores.
INSTALL := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt

# What runs `make gpu`: a Python whose torch sees the card. Nothing is installed for it.
GPU_PYTHON ?= $(firstword $(wildcard $(BIN)/python) python3)
GPU_RESULTS ?= benchmarks/results/gpu.json

# How long each installation of a program for tests may take. One that hangs must not keep the tests from running.
INSTALL_SECONDS ?= 600

.PHONY: demo test test-all test-slow test-long test-cluster docs gpu check clean

demo: $(if $(wildcard $(STAMP)),$(STAMP),$(DEMO_STAMP))
	rm -rf kdcache-demo
	$(BIN)/kdcache demo --out kdcache-demo

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not long and not gpu"

# The tests with the mark `cluster` run even if others fail.
test-all:
	@status=0; \
	for part in test-slow test-cluster; do $(MAKE) --no-print-directory $$part || status=1; done; \
	exit $$status

test-slow: $(STAMP)
	@timeout --kill-after 10 $(INSTALL_SECONDS) bash tests/explorer/install_chromium.sh || echo "no Chromium: its tests are skipped"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not long and not cluster and not gpu"

test-long: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "long and not gpu"

test-cluster: $(STAMP)
	@for script in tests/cluster/install_*.sh; do \
		{ PATH="$(abspath $(BIN)):$$PATH" timeout --kill-after 10 $(INSTALL_SECONDS) bash $$script || \
			echo "$$script did not end within $(INSTALL_SECONDS) s: its tests are skipped"; } & \
	done; wait
	$(BIN)/python -m pytest -n 2 --dist loadfile --timeout 600 -m "cluster and not long and not gpu" tests/cluster

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

gpu:
	@$(GPU_PYTHON) -m benchmarks.gpu --json $(GPU_RESULTS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	@$(BIN)/python -W ignore -m compileall -qq -j 2 $(VENV)/lib || true
	touch $@

$(DEMO_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[gguf,plots]'
	touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "kdcache needs Python 3.11 to 3.13 with venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) kdcache-demo build dist
