"""What pyproject.toml says of releases, for everyone who needs to know.

scikit-build-core imports this module as a dynamic-metadata provider for the requirement on mlx and
the extra [cpu]. CMake and make run it:

    python cmake/pins.py version            the version of this package
    python cmake/pins.py pin NAME           the exact release of the build requirement NAME
    python cmake/pins.py requirements       all that developers install, one requirement a line
"""

import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PYPROJECT: dict[str, Any] = tomllib.loads(
    (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
)
BUILD_REQUIREMENTS: list[str] = PYPROJECT["build-system"]["requires"]


def pin(name: str) -> str:
    """The release in the build requirement ``name==release``.

    Raises LookupError unless there is exactly one such requirement.
    """
    found = [
        match[1]
        for requirement in BUILD_REQUIREMENTS
        if (match := re.fullmatch(rf"{re.escape(name)}\s*==\s*([^\s;*]+)\s*(;.*)?", requirement))
    ]
    if len(found) != 1:
        raise LookupError(
            f"[build-system].requires in pyproject.toml must pin '{name}==<release>' exactly once."
        )
    return found[0]


def dynamic_metadata(_settings: Mapping[str, Any], _project: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of [project] about mlx: any release from the oldest on, with kernels or without.

    mlx-cpu is an extra, not a requirement, since it would overwrite the files of mlx-cuda.
    """
    oldest = PYPROJECT["tool"]["mlx-welford"]["oldest-mlx"]
    return {
        "dependencies": [f"mlx>={oldest}"],
        "optional-dependencies": {"cpu": [f"mlx[cpu]>={oldest}; sys_platform == 'linux'"]},
    }


def requirements() -> list[str]:
    """Everything that building, testing, benchmarking and linting need.

    torch is no part of it: the benchmarks do without, and on Linux pip would fetch several GB.
    """
    extras: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"].copy()
    del extras["torch"]
    groups: dict[str, list[str]] = PYPROJECT["dependency-groups"]
    return [
        *BUILD_REQUIREMENTS,
        *(requirement for extra in extras.values() for requirement in extra),
        *(requirement for group in groups.values() for requirement in group),
    ]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["version"]:
            print(PYPROJECT["project"]["version"])
        case ["pin", name]:
            print(pin(name))
        case ["requirements"]:
            print("\n".join(requirements()))
        case _:
            sys.exit(__doc__)
