"""What is tuned, and for whom: as found nothing is, tuned the memory of freed arrays is kept.

The C library reads its settings when a process starts, so they need a process of their own.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

import mlx.core as mx
from mlx_welford._machine import memory_bytes

AS_FOUND, TUNED = "as found", "tuned"
SETTINGS = (AS_FOUND, TUNED)

# Freed memory stays with the process, and new arrays come from it. MLX on the CPU, torch and NumPy
# all allocate through malloc. Other C libraries than GNU's do not know these.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}

# Read when the first parallel work is done, by us and by torch.
THREADS = ("MLX_WELFORD_NUM_THREADS", "OMP_NUM_THREADS")

CACHE_SHARE = 0.25
"""Of the machine's memory, what MLX may keep of freed arrays when tuned; by default 32 MiB."""


def description(setting: str) -> str:
    if setting == AS_FOUND:
        return "nothing tuned"
    malloc = " ".join(f"{name}={value}" for name, value in MALLOC.items())
    return f"mx.set_cache_limit({CACHE_SHARE:g} of the memory), {malloc}"


def needed(setting: str, threads: int | None) -> dict[str, str | None]:
    """Environment variables of a process that measures with this setting; None: to be absent."""
    result: dict[str, str | None] = {
        name: value if setting == TUNED else None for name, value in MALLOC.items()
    }
    if threads is not None:
        result |= dict.fromkeys(THREADS, str(threads))
    return result


def is_entered(setting: str, threads: int | None) -> bool:
    """Whether this process has the environment that it needs."""
    return all(os.environ.get(name) == value for name, value in needed(setting, threads).items())


def run_in_child(
    module: str,
    arguments: Sequence[str],
    setting: str,
    threads: int | None,
    *,
    variables: Mapping[str, str] | None = None,
) -> int:
    """Runs a module in a process with the setting, and other variables; its exit status."""
    environment = _changed(os.environ, needed(setting, threads) | dict(variables or {}))
    return subprocess.run([sys.executable, "-m", module, *arguments], env=environment).returncode


def _changed(before: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    kept = {name: value for name, value in before.items() if name not in changes}
    return kept | {name: value for name, value in changes.items() if value is not None}


def raise_cache_limit(setting: str) -> None:
    if setting == TUNED:
        mx.set_cache_limit(int(CACHE_SHARE * memory_bytes()))
