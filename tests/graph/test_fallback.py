"""The fallback in a process that cannot load the extension, such as one with another MLX."""

import textwrap
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_welford import _fallback
from processes import run
from tolerance import bits

OPERATIONS = """
    import sys
    import mlx.core as mx
    import numpy as np

    def calls(dtype):
        rng = np.random.default_rng(0)
        wide = mx.float64 if dtype == mx.float64 else mx.float32
        x, g, r = (mx.array(rng.normal(3, 2, (4, 5, 6)), dtype) for _ in range(3))
        mean, var, by_mean, by_var = (mx.array(rng.uniform(1, 2, 5), wide) for _ in range(4))
        weight, bias = (mx.array(rng.normal(size=5), dtype) for _ in range(2))
        update = mx.array([0.9, 0.1, 1.5], wide)
        axes = dict(axes=[0, 2])
        affine = dict(**axes, channel_axis=1, eps=1e-5)
        message = mx.array(rng.uniform(1, 2, (2 * 6, 4)), wide)
        yield "moments", [x], axes
        yield "partial_moments", [x], axes
        yield "moments_gradient", [x, mean, by_mean, by_var], axes
        yield "normalize", [x, None, None, weight, bias], affine
        yield "normalize", [x, mean, var, weight, bias], affine
        yield "normalize_gradient", [x, mean, var, g, by_mean, by_var, weight], affine
        yield "normalize_gradient", [x, mean, var, g, None, None, weight], affine
        yield "input_gradient", [x, mean, var, g, by_mean, by_var, weight], affine
        for name in ("relu", "relu6", "leaky_relu", "silu", "gelu", "gelu_approx", "hardswish"):
            fused = dict(**affine, activation=name, negative_slope=0.1)
            own, given = [x, mean, var, g, by_mean, by_var], [x, mean, var, g, None, None]
            yield "normalize", [x, None, None, weight, bias, r], fused
            yield "normalize_gradient", [*own, weight, bias], fused
            yield "normalize_gradient", [*own, weight, bias, r], fused
            yield "normalize_gradient", [*given, weight, None, None, r], fused  # r stands for z
            yield "input_gradient", [*own, weight, bias], fused
        yield "running_statistics", [weight, weight, mean, var, update], {}
        yield "merge_ranks", [message], dict(ranks=2)

    def results(fallback):
        for dtype in (mx.float32, mx.float16, mx.bfloat16, mx.float64):
            for i, (name, arguments, options) in enumerate(calls(dtype)):
                found = getattr(fallback, name)(*arguments, **options, stream=mx.cpu)
                for output, a in found.items():
                    yield f"{dtype} {i} {name} {output}", a
"""

ALONE = """
    import importlib.util

    spec = importlib.util.spec_from_file_location("fallback", sys.argv[1])
    fallback = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fallback)
    assert "mlx_welford" not in sys.modules
    found = {name: np.array(mx.contiguous(a[None]).view(mx.uint8)) for name, a in results(fallback)}
    np.savez(sys.argv[2], **found)
"""


def test_every_operation_without_the_extension(tmp_path: Path) -> None:
    """The same bits as with it, which only tells the fallback more about traced functions."""
    saved = tmp_path / "alone.npz"
    run(textwrap.dedent(OPERATIONS) + textwrap.dedent(ALONE), str(_fallback.__file__), str(saved))
    scope: dict[str, Any] = {}
    exec(textwrap.dedent(OPERATIONS), scope)
    with np.load(saved) as alone:
        expected: dict[str, mx.array] = dict(scope["results"](_fallback))
        assert alone.keys() == expected.keys()
        for name, a in expected.items():
            np.testing.assert_array_equal(alone[name].ravel(), bits(a).ravel(), err_msg=name)
