# Each target sets up what it needs in .venv, once. `make demo PYTHON=python3.12` picks an interpreter.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-all test-gpu lint figures sanitize neon arm-tools clean

demo: $(VENV)/.runtime
	$(BIN)/hf-lowbit demo

# One test process a core, one thread each: most tests are too small to split. `make test WORKERS=8` for more.
WORKERS ?= 2
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test: $(VENV)/.dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.dev
	$(PYTEST)

# The Triton kernels on a GPU instead of in Triton's interpreter. It needs a .venv with a CUDA build of torch.
test-gpu: $(VENV)/.dev
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/kernels/test_triton.py tests/kv/test_kernel.py tests/plugin/test_triton_model.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The CPU kernels under AddressSanitizer and UBSan: every instruction set here, against a plain product. `make -j2 sanitize`
# compiles two files at a time. Without optimization, which would make the compiler take a minute for a body and drop accesses.
SANITIZE := -std=c++17 -O0 -g -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all -pthread
KERNELS  := hf_lowbit/kernels/cpu
HEADERS  := $(wildcard $(KERNELS)/*.h)
OBJECTS  := $(notdir $(patsubst %.cpp,%.o,$(wildcard $(KERNELS)/*.cpp))) sanitize.o
vpath %.cpp $(KERNELS) tests/kernels

build/sanitize/%.o: %.cpp $(HEADERS) setup.py | $(VENV)/.torch
	@mkdir -p $(@D)
	flags=$$($(BIN)/python setup.py --flags $(<F)) && $(CXX) $(SANITIZE) $$flags -I$(KERNELS) -c $< -o $@

build/sanitize/kernels: $(addprefix build/sanitize/,$(OBJECTS))
	$(CXX) $(SANITIZE) $^ -o $@

sanitize: build/sanitize/kernels
	$<

# The same program for AArch64 under an emulator: on a processor with the dot product extension, then on one without, and built
# by a compiler that does not know it. Debian: g++-aarch64-linux-gnu and qemu-user-static.
ARM_CXX   ?= aarch64-linux-gnu-g++
ARM_EMU   ?= qemu-aarch64-static
ARM_FLAGS := -std=c++17 -O3 -ffp-contract=off -Wall -Wextra -pthread -static

build/neon/%.o: %.cpp $(HEADERS) setup.py | arm-tools $(VENV)/.torch
	@mkdir -p $(@D)
	flags=$$($(BIN)/python setup.py --flags $(<F) aarch64) && $(ARM_CXX) $(ARM_FLAGS) $$flags -I$(KERNELS) -c $< -o $@

build/neon/plain/body_neon.o: body_neon.cpp $(HEADERS) | arm-tools
	@mkdir -p $(@D)
	$(ARM_CXX) $(ARM_FLAGS) -march=armv8-a -I$(KERNELS) -c $< -o $@

build/neon/kernels: $(addprefix build/neon/,$(OBJECTS))
	$(ARM_CXX) $(ARM_FLAGS) $^ -o $@

build/neon/plain/kernels: build/neon/plain/body_neon.o $(addprefix build/neon/,$(filter-out body_neon.o,$(OBJECTS)))
	$(ARM_CXX) $(ARM_FLAGS) $^ -o $@

neon: build/neon/kernels build/neon/plain/kernels
	$(ARM_EMU) -cpu max build/neon/kernels neon
	$(ARM_EMU) -cpu cortex-a57 build/neon/kernels
	$(ARM_EMU) -cpu max build/neon/plain/kernels

arm-tools:
	@command -v $(ARM_CXX) > /dev/null || { echo "make neon needs $(ARM_CXX) (Debian: g++-aarch64-linux-gnu); ARM_CXX names another."; exit 1; }
	@command -v $(ARM_EMU) > /dev/null || { echo "make neon needs $(ARM_EMU) (Debian: qemu-user-static); ARM_EMU names another."; exit 1; }

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
