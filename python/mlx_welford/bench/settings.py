"""Two settings of memory: "as found", and "tuned", where freed memory stays with the process.

The C library reads its settings when a process starts, so each setting needs a new process.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

import mlx.core as mx

from mlx_welford._machine import memory_bytes

AS_FOUND, TUNED = "as found", "tuned"
SETTINGS = (AS_FOUND, TUNED)

# malloc keeps freed memory for new arrays. MLX on the CPU, torch and NumPy all allocate through it.
# Only GNU's C library knows these variables.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}

# Read when the first parallel work is done, by us and by torch.
THREADS = ("MLX_WELFORD_NUM_THREADS", "OMP_NUM_THREADS")

CACHE_SHARE = 0.25
"""Share of the machine's memory that MLX's cache may keep when tuned; MLX's default is 32 MiB."""


def description(setting: str) -> str:
    if setting == AS_FOUND:
        return "nothing tuned"
    malloc = " ".join(f"{name}={value}" for name, value in MALLOC.items())
    return f"mx.set_cache_limit({CACHE_SHARE:g} of the memory), {malloc}"


def needed(setting: str, threads: int | None) -> dict[str, str | None]:
    """Environment variables of a process with this setting; None means unset."""
    result: dict[str, str | None] = {
        name: value if setting == TUNED else None for name, value in MALLOC.items()
    }
    if threads is not None:
        result |= dict.fromkeys(THREADS, str(threads))
    return result


def is_entered(setting: str, threads: int | None) -> bool:
    """True if this process has the environment of the setting."""
    return all(os.environ.get(name) == value for name, value in needed(setting, threads).items())


def run_in_child(
    arguments: Sequence[str],
    setting: str,
    threads: int | None,
    *,
    variables: Mapping[str, str] | None = None,
) -> int:
    """Runs `python -m mlx_welford` in a process with the setting, and other variables.

    Returns its exit status.
    """
    environment = _changed(os.environ, needed(setting, threads) | dict(variables or {}))
    command = [sys.executable, "-m", "mlx_welford", *arguments]
    return subprocess.run(command, env=environment).returncode


def _changed(before: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    kept = {name: value for name, value in before.items() if name not in changes}
    return kept | {name: value for name, value in changes.items() if value is not None}


def raise_cache_limit(setting: str) -> None:
    if setting == TUNED:
        mx.set_cache_limit(int(CACHE_SHARE * memory_bytes()))
