"""The self-test: every path of the launch plan against float64, then times against mlx.nn.

One command, ``python -m mlx_welford selftest``, whose output can be pasted into an issue. It names
the machine and all versions, keeps what was done before a crash, and is always short enough.
"""

from mlx_welford.selftest.publish import publish
from mlx_welford.selftest.report import run, to_text, write_json

__all__ = ["publish", "run", "to_text", "write_json"]
