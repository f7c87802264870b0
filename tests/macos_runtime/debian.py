"""CPython and the C library for arm64, and qemu, out of Debian's packages.

Nothing is installed: packages are unpacked into a folder. apt keeps lists and status of its own
there, for arm64 alone, so that the system's need not know that architecture. qemu comes as the
static build, which depends on no other package.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from .cache import BuildError, cached, run

# CPython, and the C++ library that numpy's wheel asks for. apt adds what these depend on.
_GUEST = ("python3-minimal", "libpython3-stdlib", "libstdc++6")


def _apt(folder: Path, architecture: str) -> list[str]:
    """Options that give apt a state of its own for an architecture; no package is installed."""
    for name in ("lists/partial", "archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return [
        f"-oAPT::Architecture={architecture}",
        f"-oAPT::Architectures={architecture}",
        f"-oDir::State={folder}",
        f"-oDir::Cache={folder}",
        "-oDir::State::status=/dev/null",
        "-oDebug::NoLocking=1",
        "-oAPT::Sandbox::User=root",
    ]


def _unpack(folder: Path, result: Path) -> None:
    for package in sorted((folder / "archives").glob("*.deb")):
        run(["dpkg", "-x", package, result])


def _download(apt: list[str], *packages: str) -> None:
    run(["apt-get", *apt, "update"])
    install = ["install", "--download-only", "--yes", "--no-install-recommends"]
    run(["apt-get", *apt, *install, *packages])


def _release() -> str:
    """A name of the system whose packages these are."""
    try:
        return Path("/etc/os-release").read_text()
    except OSError:
        return ""


def _need_apt() -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise BuildError(
            "The macOS runtime is made of Debian's packages: it needs apt-get and dpkg."
        )


def sysroot() -> Path:
    """The root of a file system with CPython for arm64 and what it needs."""

    def make(folder: Path) -> None:
        _need_apt()
        state = folder.with_name("apt")
        _download(_apt(state, "arm64"), *_GUEST)
        _unpack(state, folder)

    return cached("sysroot", [_release(), *_GUEST], make)


def qemu() -> Path:
    """The program that runs arm64 programs here."""
    package = "qemu-user-static"

    def make(folder: Path) -> None:
        _need_apt()
        state = folder.with_name("apt")
        native = subprocess.run(
            ["dpkg", "--print-architecture"], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()
        _download(_apt(state, native), package)
        _unpack(state, folder)

    return (
        cached("qemu", [_release(), package, os.uname().machine], make)
        / "usr/bin/qemu-aarch64-static"
    )


def interpreter(root: Path) -> tuple[Path, str]:
    """The sysroot's CPython and its version, e.g. 3.11."""
    (program,) = (p for p in (root / "usr/bin").glob("python3.*") if p.name[8:].isdigit())
    return program, program.name.removeprefix("python")
