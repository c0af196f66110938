# make demo    sets everything up in .venv, trains the tiny model and generates from it
# make test    sets everything up in .venv and runs the tests
# make bench   sets everything up in .venv and measures this machine
# make clean   removes .venv and what was built

PYTHON ?= python3
TORCH ?= torch>=2.11
TESTS ?= tests

VENV := .venv
BIN := $(VENV)/bin
BUILD_TOOLS := "setuptools<82" wheel cmake ninja pybind11 numpy
SOURCES := CMakeLists.txt $(shell find csrc -type f)
# uv where it is present and reaches the packages, pip where not; both look where pip is told to look
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
INSTALL := PATH="$(CURDIR)/$(BIN):$$PATH" sh -c 'uv pip install -q --python $(BIN)/python "$$@" 2> $(VENV)/uv.log || \
	$(BIN)/python -m pip install -q "$$@"' install

.PHONY: setup demo test bench clean

setup: $(VENV)/installed

demo: setup
	rm -rf build/demo
	$(BIN)/moe-kernels demo --out build/demo

test: setup
	$(BIN)/python -m pytest $(TESTS)

bench: setup
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) build moe_kernels/_C*.so *.egg-info

$(VENV)/created:
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || uv venv --seed --python $(PYTHON) $(VENV)
	@touch $@

# the tools that a build without isolation wants; a torch that is there already stays
$(VENV)/tools: $(VENV)/created
	@echo "installing build tools, and $(TORCH) unless a torch is there"
	@$(INSTALL) $(BUILD_TOOLS)
	@$(BIN)/python -c "import torch" 2> /dev/null || $(INSTALL) "$(TORCH)"
	@touch $@

# a rebuild after a change of csrc takes seconds: ninja keeps what it made in build/
$(VENV)/installed: $(VENV)/tools pyproject.toml setup.py $(SOURCES)
	@echo "installing moe_kernels; where there is nvcc, the first build of the CUDA module takes minutes"
	@$(INSTALL) --no-build-isolation -e ".[test,bench,hf]"
	@touch $@
