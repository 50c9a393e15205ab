# make setup   a virtual environment from the lock        make demo    the whole line on synthetic cells, some minutes
# make test    lint, types and all quick tests            make bench   side-by-side measurements (minutes)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint test-slow bench lock clean

setup: .venv/installed

# Hashes are checked; which index serves the files is the machine's own pip configuration.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -qq --no-build-isolation --no-deps -e .
	touch $@

demo: setup
	$(BIN)/malaria-ray demo demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# First what mostly waits or takes one core, two files at a time; then what has a Ray on all cores. A failure of the first
# does not hide those of the second.
RAY_TESTS := tests/stages tests/cluster

test: lint
	status=0; \
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile $(RAY_TESTS:%=--ignore=%) || status=1; \
	$(BIN)/python -m pytest -q -m "not slow" $(RAY_TESTS) || status=1; \
	exit $$status

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

# Daft, the strongest peer, asks for an older pyarrow than it runs with (26.0.1, measured): without its dependencies.
bench: setup
	$(BIN)/python -m pip install -qq --require-hashes --no-deps -r tests/benchmarks/requirements.lock
	$(BIN)/python -m tests.benchmarks

# uv is only needed by whoever changes the dependencies: pip install uv
lock:
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
	    --no-emit-find-links --no-annotate --extra cpu --extra test pyproject.toml -o requirements.lock
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
	    --no-emit-find-links --no-annotate -c requirements.lock --extra cpu --extra s3 --extra gcs --extra iceberg \
	    pyproject.toml -o requirements-cpu.lock
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
	    --no-emit-find-links --no-annotate --extra gpu --extra s3 --extra gcs --extra iceberg pyproject.toml -o requirements-gpu.lock
	echo daft | uv pip compile -q --no-deps --universal --python-version 3.11 --generate-hashes --no-header \
	    --no-emit-index-url --no-emit-find-links --no-annotate - -o tests/benchmarks/requirements.lock

clean:
	rm -rf .venv demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
