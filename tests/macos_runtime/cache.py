"""The build cache: a folder for each product, named after a hash of its inputs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import ziglang

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "macos_runtime"
ZIG = Path(ziglang.__file__).parent

# zig's own cache, which also holds the C++ libraries of other systems. Shared with
# `make wheel-macos`.
_ZIG_CACHE = str(ROOT / "build" / "macos" / "zig")


class BuildError(RuntimeError):
    """A command that failed, with what it printed."""


def run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> str:
    """What the command prints. Raises BuildError, with that, when it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        env={
            **os.environ,
            "ZIG_GLOBAL_CACHE_DIR": _ZIG_CACHE,
            "ZIG_LOCAL_CACHE_DIR": _ZIG_CACHE,
            **(environment or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BuildError(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def zig(*arguments: str | Path) -> None:
    """Runs zig. Raises BuildError with its messages."""
    run([ZIG / "zig", *arguments])


def digest(parts: Iterable[str | bytes | Path]) -> str:
    """A hash of texts and of files' contents."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            data = part.read_bytes()
        else:
            data = part.encode() if isinstance(part, str) else part
        total.update(hashlib.sha256(data).digest())
    return total.hexdigest()[:24]


def cached(
    name: str,
    parts: Iterable[str | bytes | Path],
    make: Callable[[Path], None],
    *,
    announce: bool = True,
) -> Path:
    """The folder that `make` fills: from the cache, if the parts have not changed.

    It is filled under a temporary name and then renamed: an interrupted build leaves nothing
    half-done, and of two concurrent builds the second is dropped.
    """
    folder = CACHE / f"{name}-{digest(parts)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        if announce:
            print(f"==> {name}", flush=True)
        make(made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder
