# `make help` lists the targets. Each does what it needs first, in a virtual environment of this checkout.

PYTHON ?= python3
WERROR ?= OFF

VENV := .venv
PY := $(VENV)/bin/python
PACKAGE := python/mlx_welford
# Written by the build, and copied here for mypy and editors.
GENERATED := $(PACKAGE)/_build.py $(PACKAGE)/_ext.pyi

SOURCES := CMakeLists.txt pyproject.toml README.md LICENSE \
	$(sort $(shell find $(wildcard cmake csrc metal python) -type f \
	-not -name '*.pyc' -not -name _build.py -not -name _ext.pyi -not -name '.*'))
CXX_SOURCES = $(shell find $(wildcard csrc metal tests) -name '*.cpp' -o -name '*.h' -o -name '*.metal')

PIP := $(PY) -m pip --disable-pip-version-check --quiet
export PRE_COMMIT_HOME := $(CURDIR)/build/pre-commit

BUILD_WHEEL := $(PIP) wheel --no-build-isolation --no-deps --no-index
MACOS_MLX := build/macos/mlx
DIST ?= dist
# What wheels are made of: this checkout, or an unpacked source distribution.
SOURCE ?= .

.PHONY: help build demo test bench lint format sdist wheels wheel-macos clean force
.DEFAULT_GOAL := help

help:
	@echo 'make build    create $(VENV) and install the package into it'
	@echo 'make demo     train a small network with both libraries, then compare their speed'
	@echo 'make test     run the tests                        PYTEST_ARGS="-k moments -x"'
	@echo 'make bench    compare speed and memory with mlx.nn BENCH_ARGS="--json results.json"'
	@echo 'make lint     run every check on the sources'
	@echo 'make format   rewrite the sources as the checks want them'
	@echo 'make sdist    pack the sources into dist/'
	@echo 'make wheels   build the wheel for this Linux into dist/'
	@echo 'make wheel-macos  build the wheel for macOS on arm64 into dist/, on Linux'
	@echo 'make clean    remove whatever these targets made'
	@echo 'PYTHON=python3.12 chooses the interpreter of $(VENV); WERROR=ON makes C++ warnings errors.'

build: $(VENV)/package.stamp

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
	@cd $(VENV)/lib/python3*/site-packages/mlx_welford && cp _build.py _ext.pyi $(CURDIR)/$(PACKAGE)
	@mv $@.started $@

demo: build
	$(PY) examples/train_digits.py
	$(PY) bench/compare.py --quick

test: build
	$(PY) -m pytest $(PYTEST_ARGS)

bench: build
	$(PY) bench/compare.py $(BENCH_ARGS)

lint: build
	$(PY) -m pre_commit run --all-files

format: build
	$(PY) -m ruff check --fix-only --quiet
	$(PY) -m ruff format
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

sdist: $(VENV)/requirements.stamp
	$(PY) -m build --sdist --no-isolation --outdir $(DIST)

# In a build folder of its own, since `make build` has other options. auditwheel finds out on which
# releases of Linux the wheel runs; libmlx is there with mlx-cpu or mlx-cuda.
wheels: $(VENV)/requirements.stamp
	@rm -rf build/unaudited
	$(BUILD_WHEEL) --config-settings=build-dir=build/wheel --wheel-dir build/unaudited $(SOURCE)
	PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) -m auditwheel repair --exclude libmlx.so \
		--wheel-dir $(DIST) build/unaudited/*.whl

# The variables tell scikit-build-core what the tag and the extension's name are to say.
wheel-macos: build $(MACOS_MLX)/stamp
	_PYTHON_HOST_PLATFORM=macosx-14.0-arm64 \
	SETUPTOOLS_EXT_SUFFIX=.$$($(PY) -c 'import sys; print(sys.implementation.cache_tag)')-darwin.so \
	ZIG_GLOBAL_CACHE_DIR=$(CURDIR)/build/macos/zig ZIG_LOCAL_CACHE_DIR=$(CURDIR)/build/macos/zig \
	$(BUILD_WHEEL) --wheel-dir $(DIST) \
		--config-settings=cmake.define.CMAKE_TOOLCHAIN_FILE=cmake/macos/toolchain.cmake \
		--config-settings=cmake.define.MLX_DIR=$(CURDIR)/$(MACOS_MLX)/mlx/share/cmake/MLX \
		--config-settings=cmake.define.MLX_WELFORD_STUB=$(CURDIR)/$(PACKAGE)/_ext.pyi \
		$(SOURCE)

# MLX's library and headers for the oldest macOS that its wheels are for.
$(MACOS_MLX)/stamp: pyproject.toml cmake/pins.py | $(VENV)/requirements.stamp
	@rm -rf $(MACOS_MLX)
	@$(PIP) install --target $(MACOS_MLX) --no-deps --only-binary :all: \
		--platform macosx_14_0_arm64 mlx-metal==$$($(PY) cmake/pins.py pin mlx)
	@touch $@

clean:
	rm -rf $(VENV) build dist $(GENERATED) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
