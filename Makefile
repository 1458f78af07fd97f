# `make bench` and `make test` do all the set-up: a virtual environment in .venv, the dependencies, the build.
# With a GPU, torch comes from PyPI as usual. Without one, a CPU build of torch is a tenth of the download:
#     make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=
# Two processes: the tests are small, and most of them use one core. A file stays in one, which makes its fixtures once.
PYTEST := $(BIN)/python -P -m pytest -q -n 2 --dist loadfile

# What guardengine plugs into, in environments of their own: their pins are not ours. A file of tests/hosts for each.
HOSTS := langchain litellm nemo trl
HOST_ENVIRONMENTS := tests/hosts/environments

.PHONY: help install bench check test test-hosts $(HOSTS:%=test-host-%) test-emulated test-gpu-interpreted test-gpu-compiled test-ray gpu-kernels gpu-check test-asan wheel lint types \
  docs format clean

help:
	@echo "make bench    install, build, and run the throughput benchmark (random weights, under 3 minutes)"
	@echo "make check    lint, type checks and the quick tests: under a minute, once it is installed"
	@echo "make test     install, build, then lint, type checks and all tests"
	@echo "make test-emulated  the kernels for AVX-512 on a CPU without it, as AVX2 code (a part of make test)"
	@echo "make test-gpu-interpreted  the Triton kernels in Triton's interpreter, without a GPU (a part of make test)"
	@echo "make test-gpu-compiled     the Triton kernels compiled for GPUs that are not here (a part of make test)"
	@echo "make test-ray  what runs on a Ray cluster, on one of this machine (a part of make test)"
	@echo "make test-hosts    guards in LiteLLM, NeMo Guardrails, LangChain and TRL, each in its environment (a part of make test)"
	@echo "make gpu-kernels           record what they compile to: docs/reference/gpu-kernels.md"
	@echo "make gpu-check  on a machine with a GPU: the Triton backend against the reference, and its speed (under 10 minutes)"
	@echo "make test-asan      the native code under AddressSanitizer and UndefinedBehaviorSanitizer, its threads under TSan"
	@echo "make wheel    dist/: a wheel for this platform, tried in an environment without a compiler"
	@echo "make docs     build/site: the documentation, built strictly"
	@echo "make format   rewrite the sources in the project's format"
	@echo "make clean    remove everything that make made"

install: $(VENV)/installed

# The benchmark needs a third of what the tests need. Both are the package as it lies here, with its library built.
$(VENV)/installed: EXTRA := dev
$(VENV)/installed-bench: EXTRA := bench
$(VENV)/installed $(VENV)/installed-bench: pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[$(EXTRA)]'
	@test -e guardengine/_C.so || { echo 'a C++17 compiler is needed: install g++ or clang, or set CXX'; exit 1; }
	touch $@

bench: $(VENV)/installed-bench
	$(BIN)/python -m guardengine.bench

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# While working: most properties, in under a minute on two cores.
check: lint types
	$(PYTEST) -m "not slow and not servers and not soak" $(MARKED_FILES:%=--ignore=%)

# Files that are marked as a whole: not even imported, which takes as long as many tests.
MARKED_FILES = $(shell grep -lrE '^pytestmark = pytest.mark.(slow|servers|soak)' tests --include='test_*.py')

test: lint types
	$(PYTEST)
	$(if $(HAS_AVX512),@echo "this CPU has AVX-512 with dot products: its kernels were tested as they are",$(MAKE) test-emulated)
	$(MAKE) -j2 test-gpu-interpreted test-gpu-compiled test-ray test-hosts

# Not empty on CPUs that have all instructions there are kernels for.
HAS_AVX512 := $(shell for flag in avx512_bf16 avx512_vnni avx512vbmi; do grep -qw $$flag /proc/cpuinfo || exit; done; echo yes)

# The kernels that this CPU may lack the instructions for, compiled to others: same tests.
NATIVE := $(MAKE) --no-print-directory -j2 -f tests/native/Makefile PYTHON=$(BIN)/python
NATIVE_TESTS := tests/kernels/test_cpu_ops.py tests/kernels/test_quantized_ops.py tests/kernels/test_int8_cache.py \
  tests/runners/test_cpu_engine.py tests/runners/test_invariance.py

# avx512 shares with avx512bf16 all that is not an operator.
OPERATOR_TESTS := tests/kernels/test_cpu_ops.py tests/kernels/test_quantized_ops.py

test-emulated: install
	$(NATIVE) emulated check-intrinsics
	$(PYTEST) --native-library build/native/emulated.so --isa avx512bf16 $(NATIVE_TESTS)
	$(PYTEST) --native-library build/native/emulated.so --isa avx512 $(OPERATOR_TESTS)

# Triton decides as it is imported whether it interprets or compiles: a process for each, and neither with the rest.
test-gpu-interpreted: install
	TRITON_INTERPRET=1 $(PYTEST) tests/gpu

test-gpu-compiled: install
	$(BIN)/python -P -m pytest -q tests/aot

# One process: its tests share a cluster.
test-ray: install
	$(BIN)/python -P -m pytest -q tests/on_ray

# One at a time: each installs this folder.
test-hosts: install
	$(MAKE) -j1 $(HOSTS:%=test-host-%)

$(HOSTS:%=test-host-%): test-host-%: .venv-hosts/%/installed
	.venv-hosts/$*/bin/python -P -m pytest -q tests/hosts/test_$*.py

$(HOSTS:%=.venv-hosts/%/installed): .venv-hosts/%/installed: $(HOST_ENVIRONMENTS)/%.txt $(HOST_ENVIRONMENTS)/common.txt pyproject.toml | install
	rm -rf .venv-hosts/$*
	$(PYTHON) -m venv .venv-hosts/$*
	.venv-hosts/$*/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	  -e '.[client,server]' -r $(HOST_ENVIRONMENTS)/common.txt -r $<
	touch $@

gpu-kernels: install
	$(BIN)/python -P -m pytest -q tests/aot/test_kernels.py --record

gpu-check: install
	$(BIN)/python -P -m guardengine.bench.gpu.check --json gpu-check.json --markdown gpu-check.md

# Both runtimes come first into python, and reports go past pytest. Python itself does not free all it takes.
ASAN = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  $(BIN)/python -P -m pytest -q --capture=sys --native-library build/native/sanitized.so

test-asan: install
	$(NATIVE) sanitized check-threads
	$(ASAN) --isa avx2 $(NATIVE_TESTS) -k "not transformers_numbers"
	$(ASAN) tests/kernels/test_cpu_ops.py -k "not avx2 and not 16384 and not neighbours"

# The wheel has its C++ run-time library inside (hidden: torch loads another), so it asks for a C library only.
wheel: install
	rm -rf build/lib* build/bdist* build/wheel dist
	LDFLAGS="-static-libstdc++ -Wl,--exclude-libs,ALL -Wl,--gc-sections" \
	  $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
	$(PYTHON) tests/native/check_wheel.py dist/*.whl $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

docs: install
	$(BIN)/mkdocs build --strict

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-hosts build dist *.egg-info guardengine/*.so
