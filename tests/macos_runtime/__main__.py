"""MACOS=14 python -m macos_runtime ARGUMENTS: CPython with these arguments, on macOS's binaries."""

import os
import sys

from .cache import BuildError
from .run import run

try:
    sys.exit(run(sys.argv[1:], int(os.environ.get("MACOS", "14"))))
except BuildError as error:
    sys.exit(f"\n{error}")
