# Two commands do all the set-up and all the work: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export NO_ALBUMENTATIONS_UPDATE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MPLBACKEND ?= Agg

.PHONY: demo test test-long test-last-bits prepare book

demo: .venv/installed
	$(BIN)/biomass_demo

# Small models: two processes of one thread each are done before two of two threads, which wait for each other.
ONE := OMP_NUM_THREADS=1
NOTEBOOKS := $(ONE) CUDA_VISIBLE_DEVICES= $(BIN)/python tests/notebooks.py --n_workers 2 --do_print
# Files begin in the order of their names; by default those of few, long tests would begin last, when nothing is left
# for the other process.
PYTEST := $(ONE) $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

# Notebooks are tests, on the CPU, and tests/ holds what a notebook cannot show.
test: .venv/installed
	$(NOTEBOOKS)
	$(PYTEST)

# tests/ with its long forms, which take minutes each.
test-long: .venv/installed
	$(PYTEST) --long

# Everything once more on a processor, played, where other shapes give other last bits.
test-last-bits: .venv/installed
	PYTHONPATH=tests/last_bits $(NOTEBOOKS)
	PYTHONPATH=tests/last_bits $(PYTEST)

# After editing notebooks: export the library, clean the notebooks, write the page of names and the README.
prepare: .venv/installed
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/render_names.py
	$(BIN)/python tests/render_readme.py > README.md

# The notebooks as static HTML, to read without Jupyter: open _book/index.html.
book: .venv/installed
	$(BIN)/python tests/render_book.py _book

.venv/installed: settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and f"Python 3.11 or 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --editable '.[dev]' --constraint constraints.txt
	touch $@
