"""Machine, versions and settings of a measurement, without which its figures mean nothing."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from mlx_welford._machine import chip, gpu_cores, memory_bytes
from mlx_welford.selftest.chips import nominal_bandwidth

VARIABLES = (
    "MLX_WELFORD_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
)

Environment = dict[str, str | int | float | None]


def environment() -> Environment:
    """Machine, versions and the settings that change the figures, ready for JSON."""
    kernel = platform.release().split("-")[0]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": chip(),
        "cores": cores(),
        "load_average": round(os.getloadavg()[0], 2),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {kernel} {platform.machine()}",
        "device": str(mx.default_device()),
        "nominal_gigabytes_per_second": nominal_bandwidth(chip(), gpu_cores()),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("mlx", "mlx-welford", "numpy", "torch")},
        "commit": _commit(),
        "cache_limit_bytes": cache_limit_bytes(),
        **{name: os.environ.get(name) for name in VARIABLES},
    }


def cores() -> int:
    """The cores this process may use; macOS has no affinity, so all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_limit_bytes() -> int:
    """The limit of MLX's buffer cache, which MLX returns only when it is changed."""
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return limit


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout of this repository that this runs in; None elsewhere."""
    if not Path("python/mlx_welford").is_dir():
        return None
    command = ("git", "describe", "--always", "--dirty", "--abbrev=12")
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip() or None
