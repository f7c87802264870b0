"""Which interpreters wheels can be built for here, one path a line: python cmake/interpreters.py

The running one first, then of every other CPython that pyproject.toml's classifiers name the newest
that is installed with its headers, wherever findpython looks: PATH, pyenv, asdf, uv and others.
"""

import re
import subprocess
import sys

import findpython
from pins import PYPROJECT

# An extension for the free-threaded build would have another tag, and MLX has none.
IS_USABLE = """
import pathlib, sys, sysconfig
headers = pathlib.Path(sysconfig.get_path("include"), "Python.h")
sys.exit(not headers.exists() or bool(sysconfig.get_config_var("Py_GIL_DISABLED")))
"""


def is_usable(interpreter: str) -> bool:
    """Whether it runs, has its headers, and is not free-threaded."""
    return subprocess.run([interpreter, "-c", IS_USABLE], check=False).returncode == 0


def supported() -> list[int]:
    """The minor releases of Python 3 that the classifiers name."""
    classifiers = "\n".join(PYPROJECT["project"]["classifiers"])
    return [int(minor) for minor in re.findall(r":: 3\.(\d+)$", classifiers, re.MULTILINE)]


def interpreters() -> list[str]:
    """The running interpreter, and one for each other release that is supported and here."""
    found = [sys.executable]
    for minor in supported():
        if minor != sys.version_info.minor:
            candidates = findpython.find_all(3, minor, implementation="cpython")
            paths = (str(candidate.executable) for candidate in candidates)
            found += next(([path] for path in paths if is_usable(path)), [])
    return found


if __name__ == "__main__":
    print("\n".join(interpreters()))
