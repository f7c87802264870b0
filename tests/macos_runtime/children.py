"""Programs of their own on the macOS binaries: for what a process settles at its start."""

import os
import subprocess
import sys
import textwrap

# Forward and gradient against float64; prints the largest error of each.
NORMALISE = """
    import mlx.core as mx, mlx_welford as mw, numpy as np
    x = np.random.default_rng(0).standard_normal(SHAPE) * 3 + 7
    g = np.random.default_rng(1).standard_normal(SHAPE)
    axes = tuple(range(x.ndim - 1))
    centred = x - x.mean(axes, keepdims=True)
    rstd = 1 / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    h = centred * rstd
    grad = rstd * (g - g.mean(axes, keepdims=True) - h * (g * h).mean(axes, keepdims=True))
    f = lambda x, g: (mw.batch_norm(x)[0] * g).sum()
    given = mx.array(x.astype(np.float32)), mx.array(g.astype(np.float32))
    y, gx = mw.batch_norm(given[0])[0], mx.grad(f)(*given)
    print("errors", float(np.abs(np.array(y) - h).max()), float(np.abs(np.array(gx) - grad).max()))
"""


def run(
    program: str, *, metal: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a program with settings of the stand-in for Metal."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "MLX_WELFORD_METAL": metal, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def normalise(
    shape: tuple[int, ...],
    *,
    metal: str = "",
    more: str = "",
    environment: dict[str, str] | None = None,
) -> tuple[float, float, subprocess.CompletedProcess[str]]:
    """The largest errors of y and of x's gradient, and the program that found them."""
    text = textwrap.dedent(NORMALISE).replace("SHAPE", repr(shape)) + textwrap.dedent(more)
    done = run(text, metal=metal, environment=environment)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("errors"))
    y, grad = map(float, line.split()[1:])
    return y, grad, done
