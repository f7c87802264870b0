"""Facts about the machine and the installed packages, as bug reports need them."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import mlx.core as mx

__all__ = [
    "build",
    "chip",
    "gpu_cores",
    "memory_bytes",
    "metal_language",
    "model",
    "system",
    "system_build",
    "variables",
    "wheels",
]

# mlx, and the packages that contain libmlx, of which a system has one.
_OF_MLX = ("mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
_PREFIXES = ("MLX_", "MTL_", "METAL_")


def chip() -> str:
    """Name of the processor as the system reports it: ``Apple M2 Pro``."""
    if platform.system() == "Darwin":
        return _output("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def model() -> str | None:
    """Model of the machine, ``Mac14,9``; None unless the system is macOS."""
    if platform.system() != "Darwin":
        return None
    return _output("/usr/sbin/sysctl", "-n", "hw.model")


def gpu_cores() -> int | None:
    """Number of cores of Apple's GPU; None if there is none or the system does not tell."""
    if platform.system() != "Darwin":
        return None
    properties = _output("/usr/sbin/ioreg", "-r", "-d", "1", "-c", "AGXAccelerator") or ""
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', properties)
    return int(found[1]) if found else None


def memory_bytes() -> int:
    if platform.system() == "Darwin":
        told = _output("/usr/sbin/sysctl", "-n", "hw.memsize")
        if told is not None and told.isdecimal():
            return int(told)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def system() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}"


def system_build() -> str:
    """The build of macOS, ``24G90``; elsewhere the kernel's version."""
    if platform.system() == "Darwin":
        return _output("/usr/bin/sw_vers", "-buildVersion") or "unknown"
    return platform.version()


def metal_language() -> str | None:
    """Version of the Metal language that MLX compiles shaders as, ``3.2``; None without a GPU.

    It depends on the system and on MLX, so a kernel reports it. If that kernel fails, the result
    is its error.
    """
    if not (mx.metal.is_available() and mx.is_available(mx.gpu)):
        return None
    try:
        version = _metal_version(mx.gpu).item()
    except Exception as error:  # it must not hide the rest of the status
        return f"unknown: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    assert isinstance(version, int)
    return f"{version / 100:.1f}"


def _metal_version(device: mx.DeviceType) -> mx.array:
    kernel = mx.fast.metal_kernel(
        name="mlx_welford_metal_version",
        input_names=["x"],
        output_names=["version"],
        source="version[0] = x[0] + __METAL_VERSION__;",
    )
    version: mx.array
    (version,) = kernel(  # type: ignore[operator]
        inputs=[mx.zeros(1, mx.int32, stream=device)],
        output_shapes=[(1,)],
        output_dtypes=[mx.int32],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        stream=device,
    )
    return version


def wheels() -> str:
    """Releases and tags of the installed packages of MLX."""
    found = []
    for name in _OF_MLX:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(f"{name} {distribution.version} ({_tags(distribution)})")
    return ", ".join(found)


def build() -> str:
    """How this package was installed (wheel, archive, checkout, commit), and its tag.

    Paths and addresses are left out, because reports are public.
    """
    try:
        distribution = importlib.metadata.distribution("mlx-welford")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if "dir_info" in origin:
        source = "editable" if origin["dir_info"].get("editable") else "built from a checkout"
    elif "vcs_info" in origin:
        source = f"built from commit {origin['vcs_info'].get('commit_id', 'unknown')}"
    elif str(origin.get("url", "")).endswith(".whl"):
        source = "a wheel file"
    elif origin:
        source = "built from an archive"
    else:
        source = "a wheel from an index, or built from its sdist"
    return f"{source} ({_tags(distribution)})"


def variables() -> dict[str, str]:
    """Environment variables of MLX, Metal and this package, with ``~`` for the home folder."""
    home = str(Path.home())
    return {
        name: value.replace(home, "~") if len(home) > 1 else value
        for name, value in sorted(os.environ.items())
        if name.startswith(_PREFIXES)
    }


def _tags(distribution: importlib.metadata.Distribution) -> str:
    lines = (distribution.read_text("WHEEL") or "").splitlines()
    tags = [line.partition(":")[2].strip() for line in lines if line.startswith("Tag:")]
    return " ".join(tags) or "no tag"


def _output(*command: str) -> str | None:
    """What a command prints; None if it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
