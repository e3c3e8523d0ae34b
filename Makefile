# The two commands of the README are `make demo` and `make test`; each makes .venv when there is none.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c 'import sys, ensurepip; print("$(p)") if (3, 11) <= sys.version_info < (3, 14) else None' 2>/dev/null)))
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check clean

demo: $(STAMP)
	rm -rf kdcache-demo
	$(BIN)/kdcache demo --out kdcache-demo

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_layers.py

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "kdcache needs Python 3.11 to 3.13 with venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) kdcache-demo build dist
