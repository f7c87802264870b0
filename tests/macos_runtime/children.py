"""Python programs in processes of their own, for settings that are read once at the start."""

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass

# Forward and gradient against float64; prints the largest error of each. In the view of x, `axes`
# are those that a statistic is over.
NORMALIZE = """
    import mlx.core as mx, mlx_welford as mw, numpy as np
    x = np.random.default_rng(0).standard_normal(VIEW) * 3 + 7
    g = np.random.default_rng(1).standard_normal(VIEW)
    axes = AXES
    centred = x - x.mean(axes, keepdims=True)
    rstd = 1 / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    h = centred * rstd
    grad = rstd * (g - g.mean(axes, keepdims=True) - h * (g * h).mean(axes, keepdims=True))
    f = lambda x: CALL
    given = [mx.array(a.astype(np.float32).reshape(SHAPE)) for a in (x, g)]
    y, (gx,) = f(given[0]), mx.vjp(f, given[:1], given[1:])[1]
    errors = [np.abs(np.array(a).reshape(VIEW) - b).max() for a, b in ((y, h), (gx, grad))]
    print("errors", *map(float, errors))
"""


@dataclass(frozen=True)
class Problem:
    """A normalisation, and how its statistics are found in a view of x."""

    call: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    axes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.call} of {'x'.join(map(str, self.shape))}"


def batch(*shape: int) -> Problem:
    return Problem("mw.batch_norm(x)[0]", shape, shape, tuple(range(len(shape) - 1)))


def groups(n: int, s: int, c: int, count: int, *, interleaved: bool) -> Problem:
    """Of channels last, (N, S, C)."""
    call = f"mw.group_norm(x, {count}, interleaved={interleaved})"
    view = (n, s, c // count, count) if interleaved else (n, s, count, c // count)
    return Problem(call, (n, s, c), view, (1, 2 if interleaved else 3))


# What one threadgroup holds, and what several share, so that their partial results are merged.
PROBLEMS = (
    batch(64, 33, 5),
    batch(32, 16, 16, 32),
    groups(3, 37, 24, 4, interleaved=True),
    groups(2, 1100, 24, 4, interleaved=False),
)


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


def normalize(
    problem: Problem,
    *,
    metal: str = "",
    more: str = "",
    environment: dict[str, str] | None = None,
) -> tuple[float, float, subprocess.CompletedProcess[str]]:
    """The largest errors of y and of x's gradient, and the program that found them."""
    text = textwrap.dedent(NORMALIZE)
    for name in ("call", "shape", "view", "axes"):
        value = getattr(problem, name)
        text = text.replace(name.upper(), value if name == "call" else repr(value))
    done = run(text + textwrap.dedent(more), metal=metal, environment=environment)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("errors"))
    y, grad = map(float, line.split()[1:])
    return y, grad, done
