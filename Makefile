# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

.PHONY: demo test test-fast faults lint clean
demo: .venv/installed
	$(BIN)/python scripts/make_demo.py $(DEMO)
	$(BIN)/omni optimize $(DEMO)/demo.mp4 -o $(DEMO)/run --config cpu
	$(BIN)/python scripts/demo_report.py $(DEMO)

# Two processes of one thread each: torch's own threads would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test: .venv/installed
	$(PYTEST)

test-fast: .venv/installed
	$(PYTEST) -m "not slow"

# Hours: 30 kills, 20,000 crafted files for each reader (docs/reliability.md).
faults: .venv/installed
	$(BIN)/python tests/faults/kills.py --kills 30
	$(BIN)/python tests/faults/fuzz.py --inputs 20000

# Style, types and spelling.
lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
