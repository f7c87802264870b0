"""mx.export_function: MLX can write its own primitives alone, so all is composed of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_welford as mw
import pytest
from mlx_welford import batch_norm, composed, instance_norm, moments
from tolerance import assert_within, wide


def outputs(x: mx.array) -> tuple[mx.array, ...]:
    fused = batch_norm(x, activation="silu", residual=x)[0]
    return instance_norm(x, axis=1), *batch_norm(x), fused, *moments(x, (0, 2))


def test_an_exported_function_gives_the_same(tmp_path: Path) -> None:
    x = mx.random.normal((3, 5, 7))
    path = str(tmp_path / "function.mlxfn")
    with composed():
        mx.export_function(path, lambda x: list(outputs(x)), x)
    imported: Any = mx.import_function(path)  # which MLX's stubs call a tuple
    for got, expected in zip(imported(x), outputs(x), strict=True):
        assert_within(got, wide(expected), mx.float32, ulps=4)


def gradient(x: mx.array) -> mx.array:
    result: mx.array = mx.grad(lambda x: (instance_norm(x) ** 3).sum())(x)
    return result


@pytest.mark.kernels("their names in MLX's errors")
@pytest.mark.parametrize(
    ("operation", "function"),
    [
        ("WelfordNormalize", lambda x: instance_norm(x, axis=1)),
        ("WelfordNormalize", lambda x: instance_norm(mx.exp(x), x[0, 0], x[0, 1])),
        ("WelfordNormalize", gradient),
        ("WelfordNormalize", lambda x: instance_norm(x, activation="relu", residual=mx.exp(x))),
        ("WelfordNormalize", lambda x: mw.BatchNorm(7)(x)),
        ("WelfordNormalize", lambda x: mw.BatchNorm(7).eval()(x)),
        ("WelfordMoments", lambda x: moments(x, 0)[1]),
    ],
)
def test_without_the_switch_the_error_names_it(
    operation: str, function: Callable[[mx.array], mx.array], tmp_path: Path
) -> None:
    """The text is MLX's, around the name of an operation; its spaces are U+00A0 there."""
    expected = rf"primitive \[{operation}\]\sexport\swithin\smlx_welford\.composed\(\)$"
    with pytest.raises(ValueError, match=expected):
        mx.export_function(str(tmp_path / "function.mlxfn"), function, mx.random.normal((3, 5, 7)))


def test_a_traced_input_is_made_contiguous() -> None:
    """Also in derivatives of derivatives and under vmap, which pass through what makes it so."""
    x = mx.random.normal((2, 7, 5, 3)).transpose(0, 3, 2, 1)
    g = mx.random.normal((3, 5, 7))

    def gradient(x: mx.array) -> mx.array:
        return mx.vjp(lambda x: [instance_norm(x)], [x], [g])[1][0]

    def penalty(x: mx.array) -> mx.array:
        result: mx.array = mx.grad(lambda x: gradient(x).square().sum())(x)
        return result

    def tangent(x: mx.array) -> mx.array:
        return mx.jvp(lambda x: [instance_norm(x)], [x], [g])[1][0]

    for function in (instance_norm, gradient, penalty, tangent):
        expected = mx.stack([function(mx.contiguous(a)) for a in x])
        for got in (mx.vmap(function)(x), mx.compile(mx.vmap(function))(x)):
            assert_within(got, wide(expected), mx.float32, ulps=8)
