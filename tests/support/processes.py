"""What has to run in a process of its own, since environment variables are read once."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from reference import Array

TIMEOUT = 120  # seconds
VARIABLES = {"threads": "MLX_WELFORD_NUM_THREADS", "isa": "MLX_WELFORD_ISA"}

SMALL = "import mlx.core as mx, mlx_welford as mw; mx.eval(mw.moments(mx.ones((4,)), 0))"

# Results by name; sizes are large enough to be split among threads, or odd.
COMPUTE = """
    import sys
    import mlx.core as mx
    import mlx_welford as mw
    import numpy as np

    results = {}

    def compute(shape, axis, dtype):
        rng = np.random.default_rng(0)
        x = mx.array(rng.normal(1.0, 2.0, shape), dtype)
        gy = mx.array(rng.normal(size=shape), dtype)
        w = mx.array(rng.uniform(0.5, 1.5, shape[axis]), dtype)

        def batch(x, w, b):
            return list(mw.batch_norm(x, w, b, axis=axis))

        def instance(x, w, b):
            return [mw.instance_norm(x, w, b, axis=axis)]

        def activated(x, w, b):
            return [mw.batch_norm(x, w, b, axis=axis, activation="silu")[0]]

        def residual(x, w, b):
            return [mw.instance_norm(x, w, b, axis=axis, activation="gelu", residual=gy)]

        for f in (batch, instance, activated, residual):
            outputs, grads = mx.vjp(lambda *a: f(*a)[:1], [x, w, w], [gy])
            for name, a in zip(("y", "gx", "gw", "gb"), outputs + grads):
                yield f"{f.__name__} {name}", a
        mean, var = mw.moments(x, (0, 2) if axis == 1 else (0, 1))
        yield "mean", mean
        yield "var", var
        given = mean.astype(dtype), var.astype(dtype)
        yield "evaluation", mw.batch_norm(x, mean=given[0], var=given[1], axis=axis)[0]

    for n, s, c in [(2, 65537, 5), (64, 33, 127), (3, 50021, 2), (1, 1025, 129), (4, 9, 3)]:
        for axis, shape in ((-1, (n, s, c)), (1, (n, c, s))):
            for dtype in (mx.float32, mx.float16, mx.bfloat16):
                for name, a in compute(shape, axis, dtype):
                    kind = "float32" if a.dtype == mx.float32 else str(dtype).split(".")[-1]
                    key = f"{kind}: {name} of {shape}, axis {axis}, {dtype}"
                    results[key] = np.array(a.astype(mx.float32))
    np.savez(sys.argv[1], **results)
"""


def run(script: str, *arguments: str, **variables: str) -> str:
    """Runs a script in a fresh interpreter with the variables named above; its output.

    MLX's default device is the CPU.
    """
    on_cpu = "import mlx.core\nmlx.core.set_default_device(mlx.core.cpu)\n"
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES.values()}
    environment |= {VARIABLES[name]: value for name, value in variables.items()}
    done = subprocess.run(
        [sys.executable, "-c", on_cpu + textwrap.dedent(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def skip_unless_present(isa: str) -> None:
    try:
        run(SMALL, isa=isa)
    except AssertionError as error:
        if f"MLX_WELFORD_ISA={isa} is not an instruction set" in str(error):
            pytest.skip(f"this build or this processor lacks {isa}")
        raise


def compute(directory: Path, **variables: str) -> dict[str, Array]:
    """The results of COMPUTE by name."""
    path = directory / "results.npz"
    run(COMPUTE, str(path), **variables)
    with np.load(path) as arrays:
        return dict(arrays)


def assert_equal_within_rounding(got: dict[str, Array], expected: dict[str, Array]) -> None:
    """Only the order of sums may differ: some ten roundings in float32, one in half precision."""
    assert got.keys() == expected.keys()
    relative = {"float32": 4e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}
    for name, want in expected.items():
        allowed = relative[name.split(":")[0]] * float(np.abs(want).max())
        np.testing.assert_allclose(got[name], want, rtol=0, atol=allowed, err_msg=name)
