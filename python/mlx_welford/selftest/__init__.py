"""The self-test: every path of the launch plan against float64, then times against mlx.nn.

Nobody else's machine can be asked what it does, so this is one command, whose output is meant to be
pasted into an issue: ``python -m mlx_welford selftest``.
"""

from mlx_welford.selftest.report import run, to_text

__all__ = ["run", "to_text"]
