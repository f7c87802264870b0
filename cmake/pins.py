"""What pyproject.toml and releases.toml say of releases, for everyone who needs to know.

scikit-build-core imports this module as a dynamic-metadata provider for the requirement on mlx and
the extra [cpu]. CMake and make run it:

    python cmake/pins.py version            the version of this package
    python cmake/pins.py nanobind MLX       the nanobind for a release of MLX
    python cmake/pins.py requirements       all that developers install, one requirement a line
"""

import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def _read(file: str) -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parents[1] / file).read_text(encoding="utf-8"))


PYPROJECT = _read("pyproject.toml")
RELEASES: list[dict[str, str]] = _read("cmake/releases.toml")["release"]
OLDEST: str = PYPROJECT["tool"]["mlx-welford"]["oldest-mlx"]
"""The oldest MLX that the package works with, with kernels or without."""


def nanobind(mlx: str) -> str:
    """The nanobind that an extension for this release of MLX is built with.

    Raises LookupError if releases.toml does not have it.
    """
    for row in RELEASES:
        if row["mlx"] == mlx:
            return row["nanobind"]
    known = ", ".join(row["mlx"] for row in RELEASES)
    raise LookupError(f"cmake/releases.toml has no row for MLX {mlx}, only for {known}.")


def dynamic_metadata(_settings: Mapping[str, Any], _project: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of [project] about mlx: any release from the oldest on, with kernels or without.

    mlx-cpu is an extra, not a requirement, since it would overwrite the files of mlx-cuda.
    """
    return {
        "dependencies": [f"mlx>={OLDEST}"],
        "optional-dependencies": {"cpu": [f"mlx[cpu]>={OLDEST}; sys_platform == 'linux'"]},
    }


def requirements() -> list[str]:
    """Everything that building, testing, benchmarking and linting need.

    torch is no part of it: the benchmarks do without, and on Linux pip would fetch several GB.
    """
    extras: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"].copy()
    del extras["torch"]
    groups: dict[str, list[str]] = PYPROJECT["dependency-groups"]
    return [
        *PYPROJECT["build-system"]["requires"],
        *(requirement for extra in extras.values() for requirement in extra),
        *(requirement for group in groups.values() for requirement in group),
    ]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["version"]:
            print(PYPROJECT["project"]["version"])
        case ["nanobind", mlx]:
            print(nanobind(mlx))
        case ["requirements"]:
            print("\n".join(requirements()))
        case _:
            sys.exit(__doc__)
