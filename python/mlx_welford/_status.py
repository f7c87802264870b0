"""mw.status(): what is installed, and which backend runs what."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlx_welford import _machine, _versions
from mlx_welford._operations import no_kernels, operations
from mlx_welford._plans import DTYPES, Plan, Plans
from mlx_welford._text import table
from mlx_welford.functional import batch_norm

__all__ = [
    "describe",
    "describe_plans",
    "of_machine",
    "of_shaders",
    "status",
    "strict_shaders",
]


def status() -> dict[str, Any]:
    """Versions, machine, and the backend that runs the operations; ready for JSON.

    Returns:
        A dictionary of

        - ``mlx_welford``, ``mlx``, ``mlx_built_against``, ``python``: releases. That
          which the kernels here were built against is ``None`` if there are none.
        - ``build``, ``wheels``: how this package was installed, and releases and tags of MLX's
          packages.
        - ``system``, ``system_build``, ``machine``: operating system and processor architecture.
        - ``chip``, ``model``, ``cpu_cores``, ``gpu_cores``, ``memory_gib``: the computer; ``None``
          if the system does not tell.
        - ``device``, ``device_name``, ``architecture``: MLX's default device, ``"cpu"`` or
          ``"gpu"``, its model, and the name of its architecture (``applegpu_g14s``).
        - ``backend``: what the default stream runs: ``"metal"`` (the shaders), ``"cpu"`` (kernels
          for the CPU), ``"simulator"`` (the shaders, simulated on the CPU, for tests), or
          ``"composed"`` (the fallback, which uses MLX's own operations).
        - ``kernels``: ``"yes"``, or why this process has none: the installed MLX is another release
          than they were built against. The backend is then ``"composed"``.
        - ``threads``, ``instruction_set``: of the CPU's kernels; ``None`` without kernels.
        - ``shader_hash``, ``shader_kernels``: hash and number of kernels of the embedded source.
        - ``simulator``: whether the simulator replaces the CPU's kernels.
        - ``variables``: the environment variables of MLX, Metal and this package.
        - ``metal_language``: version of the Metal language that MLX compiles shaders as,
          ``"3.2"``; ``None`` without a GPU.
        - ``shaders_compile``: whether a few shaders of each dtype compiled and ran on the GPU;
          ``None`` if there is no Metal.
        - ``shaders``: the same in words, with the compiler's log after an error.

    Examples:
        >>> import mlx_welford as mw
        >>> mw.status()["mlx_welford"] == mw.__version__
        True
    """
    return {**of_machine(), **of_shaders()}


def of_machine() -> dict[str, Any]:
    """The part of the status that runs nothing on the GPU, and therefore cannot crash there."""
    device = mx.default_device()
    about = mx.device_info(device) if hasattr(mx, "device_info") else {}  # since MLX 0.30.1
    return {
        "mlx_welford": _versions.PACKAGE,
        "mlx": importlib.metadata.version("mlx"),
        "mlx_built_against": operations.mlx_version,
        "python": platform.python_version(),
        "build": _machine.build(),
        "wheels": _machine.wheels(),
        "system": _machine.system(),
        "system_build": _machine.system_build(),
        "machine": platform.machine(),
        "chip": _machine.chip(),
        "model": _machine.model(),
        "cpu_cores": os.cpu_count(),
        "gpu_cores": _machine.gpu_cores(),
        "memory_gib": round(_machine.memory_bytes() / 2**30, 1),
        "device": "gpu" if device == mx.gpu else "cpu",
        "device_name": str(about.get("device_name", "unknown")),
        "architecture": str(about.get("architecture", "unknown")),
        "backend": operations.backend(),
        "kernels": no_kernels or "yes",
        "threads": operations.num_threads(),
        "instruction_set": operations.instruction_set(),
        "shader_hash": operations.shader_hash,
        "shader_kernels": len(operations.shader_kernels()),
        "simulator": operations.backend(mx.cpu) == "simulator",
        "variables": _machine.variables(),
    }


def of_shaders() -> dict[str, Any]:
    """The other part of the status, for which kernels are compiled and run."""
    language = _machine.metal_language()
    compile_, words = _shaders()
    return {"metal_language": language, "shaders_compile": compile_, "shaders": words}


@contextmanager
def strict_shaders() -> Iterator[None]:
    """Within the block a shader that does not compile is an error: MLX_WELFORD_STRICT is set."""
    before = os.environ.get("MLX_WELFORD_STRICT")
    os.environ["MLX_WELFORD_STRICT"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLX_WELFORD_STRICT"]
        else:
            os.environ["MLX_WELFORD_STRICT"] = before


def describe(facts: Mapping[str, Any]) -> str:
    """The status as a table of names and values."""

    def words(name: str, value: Any) -> str:
        if value is None:
            return "not tried" if name == "shaders_compile" else "unknown"
        if isinstance(value, Mapping):
            return " ".join(f"{name}={v}" for name, v in value.items()) or "none"
        return ("no", "yes")[value] if isinstance(value, bool) else str(value)

    return table([(name.replace("_", " "), words(name, value)) for name, value in facts.items()])


def describe_plans(plans: Plans) -> str:
    """Plans as a table: kernel, threadgroups, threads, buffers read > buffers written."""
    parts: list[tuple[str, Plan]] = [("forward", plans["forward"])]
    if "backward" in plans:
        parts.append(("backward", plans["backward"]))
    blocks = []
    for name, plan in parts:
        rows = [("kernel", "groups", "threads", "buffers")]
        for d in plan["dispatches"]:
            bound: dict[bool, list[str]] = {False: [], True: []}
            for b in d["buffers"]:
                stand_in = "" if b["name"] == b["array"] else f"={b['array']}"
                bound[b["written"]].append(b["name"] + stand_in)
            buffers = f"{' '.join(bound[False])} > {' '.join(bound[True])}"
            rows.append((d["pipeline"], str(d["threadgroups"]), str(d["threads"]), buffers))
        heading = f"{name}: {len(plan['dispatches'])} dispatches, "
        heading += f"{plan['temporary_bytes']} bytes of temporary arrays"
        blocks.append(heading + "\n" + table(rows, numbers=(1, 2), indent=2))
    return "\n".join(blocks)


def _shaders() -> tuple[bool | None, str]:
    """Whether the shaders compile, as a value and in words."""
    if not mx.is_available(mx.gpu) or operations.backend(mx.gpu) != "metal":
        return None, "not compiled: there is no Metal in this build"
    try:
        with strict_shaders(), mx.stream(mx.gpu):
            for dtype in DTYPES.values():
                mx.eval(batch_norm(mx.ones((2, 3), dtype)))
    except RuntimeError as error:
        return False, str(error)
    return True, f"compiled for {', '.join(DTYPES)}"
