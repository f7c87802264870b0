# `make help` lists the targets. Each first makes what it needs, in a virtual environment of this
# checkout.

PYTHON ?= python3
WERROR ?= OFF

VENV := .venv
PY := $(VENV)/bin/python
# Where `python -m mutants`, macos_runtime and cuda_twin are, and the modules that they share.
TESTS_PATH := tests:tests/support
PACKAGE := python/mlx_welford
# Written by the build, and copied here for mypy and editors.
GENERATED := $(PACKAGE)/_build.py $(PACKAGE)/_core.pyi $(PACKAGE)/_ext.pyi

SOURCES := CMakeLists.txt pyproject.toml README.md LICENSE \
	$(sort $(shell find $(wildcard cmake csrc metal python) -type f \
	-not -name '*.pyc' -not -name _build.py -not -name '*.pyi' -not -name '.*'))
CXX_SOURCES = $(shell find $(wildcard csrc metal tests) -name '*.cpp' -o -name '*.h' -o -name '*.metal')

PIP := $(PY) -m pip --disable-pip-version-check --quiet
export PRE_COMMIT_HOME := $(CURDIR)/build/pre-commit

# Called with each command of the compiler: python;tests/support/compiler_cache.py;folder
LAUNCHER ?=
# Any interpreter builds with the tools in $(VENV), of which none is compiled for one CPython.
PYTHONS ?= $(shell $(PY) cmake/interpreters.py)
SITE_PACKAGES = $(abspath $(wildcard $(VENV)/lib/python3*/site-packages))
# The releases of MLX that wheels are for. `make wheels RELEASES=0.32.4` leaves the others out.
RELEASES ?= $(shell sed -n 's/^mlx = "\(.*\)"/\1/p' cmake/releases.toml)
# The library, the headers and the nanobind of each, for a platform as pip names it.
release_folders = $(RELEASES:%=build/releases/$(1)/%)
release_stamps = $(addsuffix /stamp,$(call release_folders,$(1)))
empty :=
FOR_RELEASES = MLX_WELFORD_RELEASES='$(subst $(empty) ,;,$(abspath $(call release_folders,$(1))))'
BUILD_WHEEL = PYTHONPATH=$(SITE_PACKAGES) $$python -m pip --disable-pip-version-check --quiet wheel \
	--no-build-isolation --no-deps --no-index \
	--config-settings=cmake.define.MLX_WELFORD_WERROR=$(WERROR) \
	--config-settings=cmake.define.MLX_WELFORD_STUBS=$(CURDIR)/$(PACKAGE) \
	$(if $(LAUNCHER),--config-settings=cmake.define.CMAKE_CXX_COMPILER_LAUNCHER='$(LAUNCHER)')
# Finds out on which releases of Linux wheels run; libmlx is there with mlx-cpu or mlx-cuda.
AUDITWHEEL = PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) -m auditwheel repair --exclude libmlx.so --wheel-dir $(DIST)
# The oldest systems that MLX's wheels are for.
MACOS_PLATFORM := macosx_14_0_arm64
LINUX_PLATFORM := manylinux_2_35_
PLATFORM := $(if $(filter Darwin,$(shell uname)),$(MACOS_PLATFORM),$(LINUX_PLATFORM)$(shell uname -m))
DIST ?= dist
# What wheels are made of: this checkout, or an unpacked source distribution.
SOURCE ?= .

.PHONY: help build demo gallery test test-quick test-nightly test-macos sanitize mutants bench lint format docs \
	sdist wheels wheel-macos wheel-aarch64 try-mlx cuda cuda-pack clean force
.DEFAULT_GOAL := help

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'PYTHON=python3.12 chooses the interpreter of $(VENV); WERROR=ON makes C++ warnings errors.'

build: $(VENV)/package.stamp ## create .venv and install the package into it

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "This needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo '==> creating $(VENV)'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/requirements.stamp: pyproject.toml cmake/pins.py | $(PY)
	@echo '==> installing the requirements into $(VENV)'
	@$(PY) cmake/pins.py requirements > $(VENV)/requirements.txt
	@$(PIP) install --requirement $(VENV)/requirements.txt
	@touch $@

# Changes when a source is added or removed, which no time of a remaining source shows.
$(VENV)/sources.txt: force | $(PY)
	@echo $(SOURCES) | cmp -s - $@ || echo $(SOURCES) > $@

# Not isolated, so that CMake finds the same MLX each time, and build/ can be used again. The stamp
# has the time of the start: what is edited while this runs is built the next time.
$(VENV)/package.stamp: $(SOURCES) $(VENV)/sources.txt $(VENV)/requirements.stamp
	@echo '==> building the package and installing it into $(VENV)'
	@touch $@.started
	@$(PIP) install --no-build-isolation --no-deps --no-index --force-reinstall \
		--config-settings=cmake.define.MLX_WELFORD_WERROR=$(WERROR) \
		--config-settings=cmake.define.MLX_WELFORD_SIMULATOR=ON .
	@cd $(VENV)/lib/python3*/site-packages/mlx_welford && cp _build.py _core.pyi _ext.pyi $(CURDIR)/$(PACKAGE)
	@ln -sf $$(ls -t build/cp*/compile_commands.json | head -1) compile_commands.json
	@mv $@.started $@

demo: build ## train a small network with both libraries, then compare their speed
	$(PY) examples/train_digits.py
	$(PY) -m mlx_welford bench --quick

gallery: build ## run the examples, make docs/gallery.md of what they print and draw: EXAMPLES="train_digits"
	$(PY) docs/gallery_page.py $(EXAMPLES)

# A file's tests stay in one process, so that its fixtures are made once. Slow files come first
# (tests/conftest.py). JOBS=0 runs all in one process, as a debugger needs. A test that hangs fails,
# and its process is replaced.
JOBS ?= auto
SECONDS_PER_TEST ?= 1200
PYTEST = $(PY) -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder \
	--timeout $(SECONDS_PER_TEST) --timeout-method thread
# Unless tests are selected or the profile is quick, also without the extension (docs/testing.md).
FALLBACK_PROFILE := quick
test: build ## run the tests: PYTEST_ARGS="-k moments -x" JOBS=auto
	$(PYTEST) $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS)$(filter quick,$(MLX_WELFORD_TEST_PROFILE)),,MLX_WELFORD_BACKEND=fallback \
		MLX_WELFORD_TEST_PROFILE=$(FALLBACK_PROFILE) $(PYTEST))

test-quick: export MLX_WELFORD_TEST_PROFILE = quick
test-quick: test ## a few rows of every test, in a minute
test-nightly: export MLX_WELFORD_TEST_PROFILE = nightly
test-nightly: FALLBACK_PROFILE := nightly
test-nightly: test ## whole tables and many random problems, for hours

# The CPU's kernels and the layers under GCC's sanitizers, each in a build of its own (Linux).
# - address, with undefined behaviour: all tests of the CPU backend. Leaks are not looked for, since
#   CPython and MLX keep memory until the process ends.
# - thread: the tests that share work among threads. libmlx and CPython are not instrumented, so
#   only accesses from this project's code count. ThreadSanitizer cannot start threads in a forked
#   process, so those tests are left out.
# A Debug build, since the check of the instruction sets needs full optimisation. With pytest's
# default capture the report would be lost, since a finding ends the process.
SANITIZERS := address thread
SANITIZE_address = -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZE_thread = -fsanitize=thread
RUNTIME_address := libasan.so
RUNTIME_thread := libtsan.so
SANITIZED_address := tests/numerics tests/graph tests/layers tests/cpu
SANITIZED_thread := tests/cpu tests/graph/test_scheduling.py -m 'not slow' -k 'not forked'
sanitize-address: export ASAN_OPTIONS = detect_leaks=0
sanitize-address: export UBSAN_OPTIONS = print_stacktrace=1
sanitize-thread: export TSAN_OPTIONS = halt_on_error=1:ignore_noninstrumented_modules=1
sanitize-thread: export MLX_WELFORD_NUM_THREADS = 4

sanitize: $(SANITIZERS:%=sanitize-%) ## run the CPU's tests with AddressSanitizer, UBSan and ThreadSanitizer

.PHONY: $(SANITIZERS:%=sanitize-%)
$(SANITIZERS:%=sanitize-%): sanitize-%: build/sanitize/%/stamp
	LD_PRELOAD="$$($(CXX) -print-file-name=$(RUNTIME_$*)) $$($(CXX) -print-file-name=libstdc++.so)" \
		PYTHONPATH=build/sanitize/$*/layout:tests/support \
		$(PYTEST) --capture=sys -p uncached --backend cpu $(SANITIZED_$*) $(PYTEST_ARGS)

build/sanitize/%/stamp: $(VENV)/package.stamp
	@echo '==> building the extension with -fsanitize=$*'
	@export PATH="$(abspath $(VENV)/bin):$$PATH" && \
		cmake --log-level=WARNING -S . -B $(@D) -G Ninja -DCMAKE_BUILD_TYPE=Debug \
			-DPython_EXECUTABLE=$(abspath $(PY)) -DCMAKE_CXX_COMPILER=$(CXX) \
			-DCMAKE_CXX_FLAGS='-O1 -fno-omit-frame-pointer $(SANITIZE_$*)' && \
		cmake --build $(@D) --target _core _ext -- --quiet
	@cp -r $(PACKAGE) $(@D)/layout
	@touch $@

# In build/mutants, a copy of the checkout. What has a verdict of this commit is not run again.
mutants: build ## plant faults, see which tests notice: MUTANTS_ARGS="--only NAME"
	PYTHONPATH=$(TESTS_PATH) $(PY) -m mutants run $(MUTANTS_ARGS)

# On an emulated processor, with stand-ins for macOS and Metal: docs/macos_runtime.md.
MACOS ?= 14
MACOS_BACKEND ?= gpu
MACOS_WHEELS := build/macos_runtime/wheels
MACOS_PYTEST = PYTHONPATH=$(TESTS_PATH) MACOS=$(MACOS) $(PY) -m macos_runtime -m pytest --numprocesses $(JOBS)
# Of the suite what holds the CPU's kernels to float64, here with NEON.
MACOS_CPU_TESTS := tests/numerics/test_evaluation.py tests/numerics/test_layouts.py
test-macos: $(MACOS_WHEELS)/stamp ## test the wheel for macOS, on Linux: MACOS=26 PYTEST_ARGS=tests/numerics/test_forward.py
ifdef PYTEST_ARGS
	$(MACOS_PYTEST) --backend $(MACOS_BACKEND) $(PYTEST_ARGS)
else
	$(MACOS_PYTEST) --backend gpu tests/macos_runtime
	$(MACOS_PYTEST) --backend cpu -m 'not slow' $(MACOS_CPU_TESTS)
endif

# For the interpreter of .venv, which must be of the version that Debian has.
$(MACOS_WHEELS)/stamp: $(VENV)/package.stamp
	@rm -rf $(@D)
	@$(MAKE) --no-print-directory wheel-macos DIST=$(@D) PYTHONS='$(abspath $(PY))' \
		RELEASES=$(lastword $(RELEASES))
	@touch $@

bench: build ## measure all of docs/performance.md: BENCH_ARGS="--only cases-tuned"
	$(PY) -m bench.suite $(BENCH_ARGS)
	$(PY) -m bench.report

lint: build ## run every check on the sources
	$(PY) -m pre_commit run --all-files

format: build ## rewrite the sources as the checks want them
	$(PY) -m ruff check --fix-only --quiet
	$(PY) -m ruff format
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

docs: build ## build the documentation into build/docs
	$(PY) -m sphinx --conf-dir docs --doctree-dir build/doctrees --fail-on-warning --keep-going --quiet . build/docs

sdist: $(VENV)/requirements.stamp ## pack the sources into dist/
	$(PY) -m build --sdist --no-isolation --outdir $(DIST)

# In build folders of their own, since `make build` has other options.
wheels: build $(call release_stamps,$(PLATFORM)) ## wheels for this system into dist/: PYTHONS="python3.12 python3.13"
	@rm -rf build/unaudited
	for python in $(PYTHONS); do \
		$(call FOR_RELEASES,$(PLATFORM)) $(BUILD_WHEEL) \
			--config-settings=build-dir=build/wheel-{wheel_tag} \
			--wheel-dir build/unaudited $(SOURCE) || exit; \
	done
	$(if $(filter macosx%,$(PLATFORM)),mkdir -p $(DIST) && cp build/unaudited/*.whl $(DIST),$(AUDITWHEEL) build/unaudited/*.whl)

# Wheels for another system: (platform, end of the extension's name, CMake's toolchain, pip's name
# of the platform, folder of the wheels). The variables tell scikit-build-core what the tag and that
# name are.
define build_wheels_for
	for python in $(PYTHONS); do \
		tag=$$($$python -c 'import sys; print(sys.implementation.cache_tag)'); \
		_PYTHON_HOST_PLATFORM=$(1) SETUPTOOLS_EXT_SUFFIX=.$$tag-$(2) \
		ZIG_GLOBAL_CACHE_DIR=$(CURDIR)/build/macos/zig ZIG_LOCAL_CACHE_DIR=$(CURDIR)/build/macos/zig \
		$(call FOR_RELEASES,$(4)) $(BUILD_WHEEL) --wheel-dir $(5) \
			--config-settings=cmake.define.CMAKE_TOOLCHAIN_FILE=$(3) \
			$(SOURCE) || exit; \
	done
endef

wheel-macos: build $(call release_stamps,$(MACOS_PLATFORM)) ## wheels for macOS on arm64, on Linux
	$(call build_wheels_for,macosx-14.0-arm64,darwin.so,cmake/macos/toolchain.cmake,$(MACOS_PLATFORM),$(DIST))

# With Debian's cross compiler: g++-aarch64-linux-gnu.
wheel-aarch64: build $(call release_stamps,$(LINUX_PLATFORM)aarch64) ## wheels for Linux on arm64, on x86-64
	@rm -rf build/unaudited-aarch64
	$(call build_wheels_for,linux-aarch64,aarch64-linux-gnu.so,cmake/aarch64.cmake,$(LINUX_PLATFORM)aarch64,build/unaudited-aarch64)
	$(AUDITWHEEL) build/unaudited-aarch64/*.whl

# build/releases/PLATFORM/RELEASE
build/releases/%/stamp: cmake/releases.toml cmake/pins.py | $(VENV)/requirements.stamp
	@rm -rf $(@D)
	@$(PIP) install --target $(@D) --no-deps --only-binary :all: --platform $(*D) \
		$(if $(filter macosx%,$*),mlx-metal,mlx-cpu)==$(*F) nanobind==$$($(PY) cmake/pins.py nanobind $(*F))
	@touch $@

# One wheel, with each release in an environment of its own; the results go into docs/building.md.
TRIED := build/try-mlx
try-mlx: build ## test one wheel with every release of MLX that it is for
	@rm -rf $(TRIED)/wheel
	@$(MAKE) --no-print-directory wheels DIST=$(TRIED)/wheel PYTHONS='$(abspath $(PY))'
	$(PY) cmake/try_releases.py $(TRIED)/wheel/*.whl $(RELEASES)

# CUDA_PY is an interpreter that has all that tests/cuda_twin/README.md asks for; nothing is
# installed into it. By default it is that of .venv, into which torch is installed if possible.
CUDA_PYTHON = PYTHONPATH=$(TESTS_PATH)$(if $(PYTHONPATH),:$(PYTHONPATH)) $(or $(CUDA_PY),$(PY))
cuda: $(if $(CUDA_PY),,build) ## check and time the shaders on an NVIDIA GPU: CUDA_PY=python3
	@$(if $(CUDA_PY),,$(PY) -c 'import torch' 2> /dev/null || $(PIP) install torch || \
		echo 'torch is not there and cannot be installed: the shaders are timed beside a copy alone.')
	$(CUDA_PYTHON) -m cuda_twin all $(BENCH_ARGS)

# What that needs, and the programs for CUDA_ARCHITECTURE, in one archive for a machine that has the
# Python of PACK_PYTHON and a driver, but no internet.
CUDA_PACK := build/cuda-pack
CUDA_ARCHITECTURE ?= sm_90
PACK_PYTHON ?= $(PY)
cuda-pack: build ## the same for a machine without internet: PACK_PYTHON=python3.12
	@rm -rf $(CUDA_PACK)
	python=$(PACK_PYTHON); $(BUILD_WHEEL) --wheel-dir $(CUDA_PACK)/wheel \
		--config-settings=build-dir=build/wheel-installed-{wheel_tag} .
	$(PIP) --python $(PACK_PYTHON) install --target $(CUDA_PACK)/site --no-compile --only-binary :all: \
		mlx-cpu==$(lastword $(RELEASES)) 'cuda-bindings>=13,<14' hypothesis numpy \
		$(CUDA_PACK)/wheel/*.whl
	PYTHONPATH=$(TESTS_PATH) $(PY) -m cuda_twin resources --architecture $(CUDA_ARCHITECTURE) > /dev/null
	tar -czf $(CUDA_PACK).tar.gz --exclude=__pycache__ tests build/cuda/programs -C $(CUDA_PACK) site

clean: ## remove whatever these targets made
	rm -rf $(VENV) build dist $(GENERATED) compile_commands.json .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
