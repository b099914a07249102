# `make demo` and `make test` do all of their own set-up; `make help` lists the targets.
PYTHON ?= python3
# The torch to build against: any pip requirement, e.g. make test TORCH='torch==2.12.0'
TORCH ?= torch==2.13.0
DEMO ?= demo
BENCH ?= bench
PYTEST_ARGS ?= -n 2
# The GPU kernels run in Triton's interpreter, in a process of their own.
TRITON_ARGS ?= -n 2
# Without its requirements: it wants ray 2.6.3 or older, which has no build for Python 3.12 and later.
RECBOLE := recbole==1.2.1

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
NATIVE := setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: help setup demo test aot bench lint format clean choice
help:
	@echo "make demo    generate data, train the twin and the compressed model, compare them (folder: $(DEMO))"
	@echo "make test    run the test suite"
	@echo "make aot     compile every GPU kernel ahead of time and hold its code to limits, at least five minutes; needs no GPU"
	@echo "make bench   a quick benchmark of every op, about ten minutes (folder: $(BENCH))"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make setup   .venv with everything, extension built (demo and test do this by themselves)"
	@echo "make format  rewrite sources as lint wants them;  make clean  remove .venv and build/"
	@echo "TORCH='torch==X.Y.Z' chooses another torch, CPREC_BUILD=auto|cpu|cuda|none what is built"

# Remembers which torch and which build were asked for; touched only when the answer changes.
choice:
	@mkdir -p $(VENV)
	@echo '$(TORCH) $(CPREC_BUILD) $(CPREC_WERROR)' | cmp -s - $(VENV)/.choice || \
	  echo '$(TORCH) $(CPREC_BUILD) $(CPREC_WERROR)' > $(VENV)/.choice
$(VENV)/.choice: choice

# torch comes first and from TORCH alone: as a mere dependency, pip would take the newest and several GB of CUDA.
$(VENV)/.tools: pyproject.toml $(VENV)/.choice
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python venv failed: install your system's python3-venv package"; exit 1; }
	$(PIP) install '$(TORCH)'
	$(BIN)/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb')); \
	  print(*p['build-system']['requires'], sep='\n')" > $(VENV)/build-requirements.txt
	$(PIP) install -r $(VENV)/build-requirements.txt
	@touch $@

$(VENV)/.native: $(VENV)/.tools $(NATIVE)
	$(PIP) install --no-build-isolation -e '.[app,test,lint]'
	$(PIP) install --no-deps '$(RECBOLE)'
	@touch $@

setup: $(VENV)/.native

demo: setup
	$(BIN)/cprec demo --out $(DEMO) --overwrite

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TRITON_ARGS) tests/triton

# Every Triton kernel, compiled for GPUs by the newest and by the oldest Triton that is supported; no GPU is needed. Of every
# kernel some tiles (by the oldest, those of one rank), for the newer architecture all of them unless the recorded results are
# of this very code; for sm_86, which has less shared memory, the largest.
OLDEST_TRITON := 3.6.0
build/triton-$(OLDEST_TRITON): $(VENV)/.tools
	$(PIP) install --no-deps --target $@ 'triton==$(OLDEST_TRITON)'

aot: setup build/triton-$(OLDEST_TRITON)
	$(BIN)/python -m benchmarks.aot --arch 90 --changed
	$(BIN)/python -m benchmarks.aot --arch 80 --coarse
	$(BIN)/python -m benchmarks.aot --arch 86 --coarse --kernels '(scan_(lse|rows)|weight|rank_count|topk_append)/(bf16|fp32)/512$$'
	PYTHONPATH=build/triton-$(OLDEST_TRITON) $(BIN)/python -m benchmarks.aot --arch 90 --coarse --kernels '^[^/]*$$|/128$$'

bench: setup
	$(BIN)/python -m benchmarks quick --out $(BENCH)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -type f) examples/*.cpp

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -type f) examples/*.cpp

clean:
	rm -rf $(VENV) build *.egg-info cprec_kernels/*.so cprec_kernels/_build_info.json
