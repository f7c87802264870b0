"""The self-test: every path of the launch plan against float64, then times against mlx.nn.

For computers that nobody of this project can reach, so it is one command, whose output is meant to
be pasted into an issue: ``python -m mlx_welford selftest``. It has the machine and all versions,
survives crashes as far as it got, and is short enough for an issue whatever went wrong.
"""

from mlx_welford.selftest.publish import publish
from mlx_welford.selftest.report import run, to_text, write_json

__all__ = ["publish", "run", "to_text", "write_json"]
