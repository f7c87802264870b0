"""Runs in the arm64 CPython, as sitecustomize: makes it look like one on macOS.

The host module loads extension modules for macOS. sys.platform, os.uname and the like answer as on
a Mac, so that packages take their branches for macOS; the standard library has taken those for
Linux before.
"""

import os
import platform
import sys
import sysconfig
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
    SourcelessFileLoader,
)
from types import ModuleType

import macos_host  # type: ignore[import-not-found]

SUFFIX = f".cpython-{sys.version_info.major}{sys.version_info.minor}-darwin.so"
VERSION = os.environ["MLX_WELFORD_MACOS"]


class MachOLoader(ExtensionFileLoader):
    """Loads an extension module for macOS."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module: ModuleType = macos_host.create(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        macos_host.execute(module)


def install() -> None:
    sysconfig.get_config_vars()  # reads a file that is named after the platform
    macos_host.load_libcxx(os.environ["MLX_WELFORD_LIBCXX"])
    sys.path_hooks.insert(
        0,
        FileFinder.path_hook(
            (MachOLoader, [SUFFIX]),
            (ExtensionFileLoader, EXTENSION_SUFFIXES),
            (SourceFileLoader, SOURCE_SUFFIXES),
            (SourcelessFileLoader, BYTECODE_SUFFIXES),
        ),
    )
    sys.path_importer_cache.clear()
    sys.executable = os.environ["MLX_WELFORD_PYTHON"]  # what subprocesses are started as
    sys.platform = "darwin"
    kernel = f"{int(VERSION) + 9}.0.0"
    name = os.uname_result(("Darwin", os.uname().nodename, kernel, "Darwin", "arm64"))
    os.uname = lambda: name
    platform.mac_ver = lambda *_: (f"{VERSION}.0", ("", "", ""), "arm64")


install()
