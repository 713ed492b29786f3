# make demo   install into .venv and show the main job
# make test   install into .venv and run the default test suite
# make test-extras   install the optional extra auto-gptq as well and run its tests
# make bench [DATA=DIR], make bench-quick [DATA=DIR]   the claims about speed and memory
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

.PHONY: install demo test test-slow test-extras lint bench bench-quick
install: $(INSTALLED)

demo: install
	$(BIN)/qbench demo

# one thread per worker: two workers with two threads each only get in each other's way
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

test-extras: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,auto-gptq]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/test_auto_gptq.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# hours; the other in small sizes, minutes. DATA is a folder as for qbench --data
bench: install
	$(BIN)/python -m benchmarks.run $(if $(DATA),--data $(DATA))

bench-quick: install
	$(BIN)/python -m benchmarks.run --quick $(if $(DATA),--data $(DATA))
