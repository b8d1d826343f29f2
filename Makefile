# Each target sets up what it needs in .venv, once. `make demo PYTHON=python3.12` picks an interpreter.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-all lint figures sanitize clean

demo: $(VENV)/.runtime
	$(BIN)/hf-lowbit demo

# One test process a core, one thread each: most tests are too small to split. `make test WORKERS=8` for more.
WORKERS ?= 2
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test: $(VENV)/.dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.dev
	$(PYTEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The CPU kernels under AddressSanitizer and UBSan: every instruction set here, against a plain product.
SANITIZE := -std=c++17 -O1 -g -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all -pthread
KERNELS  := hf_lowbit/kernels/cpu
sanitize:
	mkdir -p build/sanitize
	for file in $(KERNELS)/*.cpp tests/kernels/sanitize.cpp; do \
		flags="$$($(PYTHON) setup.py --flags $$(basename $$file))"; \
		$(CXX) $(SANITIZE) $$flags -I$(KERNELS) -c $$file -o build/sanitize/$$(basename $$file .cpp).o || exit 1; \
	done
	$(CXX) $(SANITIZE) build/sanitize/*.o -o build/sanitize/kernels
	build/sanitize/kernels

# The measured tables of the README, into eval/results.
figures: $(VENV)/.dev
	$(BIN)/python eval/quality.py
	$(BIN)/python eval/import_time.py
	$(BIN)/python eval/memory.py
	$(BIN)/python eval/kernel_bandwidth.py

# torch first and pinned: a plain `torch` may bring another release with gigabytes of CUDA libraries.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.runtime: $(VENV)/.torch pyproject.toml setup.py $(wildcard hf_lowbit/kernels/cpu/*)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py $(wildcard hf_lowbit/kernels/cpu/*)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.runtime

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
