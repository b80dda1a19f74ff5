# make demo   a vLLM server with our backend answers a question
# make test   all tests that this machine can run
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(CURDIR)/$(VENV)/bin

.PHONY: demo test test-gpu lint clean

demo: $(READY)
	$(BIN)/sparsek demo $(if $(ASK),--ask "$(ASK)") --port 0

test: lint
	$(BIN)/python -m pytest tests --ignore tests/gpu

test-gpu:
	$(PYTHON) -m pytest tests/gpu

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(READY): pyproject.toml .ci/venv.sh
	PYTHON=$(PYTHON) bash .ci/venv.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
