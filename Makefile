# make book and make test each start from nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BOOK := book/_build

export KVLAB_SCALE ?= tiny
export HF_HUB_OFFLINE ?= 1
# One thread per process; benchmarks choose for themselves.
book test tests check: export OMP_NUM_THREADS ?= 1
book test tests check: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: book test tests check notebooks bench clean

book: $(INSTALLED) $(BOOK)/.fresh
	$(BIN)/jupyter-book build . --config book/_config.yml --toc book/_toc.yml --path-output book -W --keep-going

# Book and tests use a core each. Every notebook runs once, in the book, and two run as Colab opens them
# (tests/test_colab.py). Without the book: pytest --nbmake notebooks
test: check
	$(MAKE) -j2 --output-sync=target book tests
	$(BIN)/pytest $(RAN)

RAN := tests/test_project.py::test_the_book_has_run_this_chapter

tests: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist worksteal --durations=10 --deselect $(RAN)

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/python book/notebooks.py --check
	$(BIN)/python book/readme.py --check

notebooks: $(INSTALLED)
	$(BIN)/python book/notebooks.py

bench: $(INSTALLED)
	set -e; for f in tests/benchmarks/[a-z]*.py; do $(BIN)/python $$f --out kvlab/results/$$(basename $$f .py).json; done
	$(BIN)/python book/readme.py

# .venv stays; remove it by hand to install everything again.
clean:
	rm -rf $(BOOK) build dist .pytest_cache .ruff_cache .hypothesis
	find kvlab tests book notebooks -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and alone, so that pip takes the build of this machine's choice and nothing replaces it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), kvlab needs 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install -c constraints.txt -e '.[book,dev]'
	touch $@

# Neither cache knows the package: what a chapter printed is void when kvlab or a result changes.
$(BOOK)/.fresh: $(shell find kvlab -type f -not -name '*.pyc' 2>/dev/null)
	rm -rf $(BOOK)/.jupyter_cache $(BOOK)/.doctrees
	mkdir -p $(BOOK) && touch $@
