"""mx.export_function: MLX can write its own primitives alone, so all is composed of them."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_welford import batch_norm, composed, instance_norm, moments
from tolerance import assert_within, wide


def outputs(x: mx.array) -> tuple[mx.array, ...]:
    return instance_norm(x, axis=1), *batch_norm(x), *moments(x, (0, 2))


def test_an_exported_function_gives_the_same(tmp_path: Path) -> None:
    x = mx.random.normal((3, 5, 7))
    path = str(tmp_path / "function.mlxfn")
    with composed():
        mx.export_function(path, lambda x: list(outputs(x)), x)
    imported: Any = mx.import_function(path)  # which MLX's stubs call a tuple
    for got, expected in zip(imported(x), outputs(x), strict=True):
        assert_within(got, wide(expected), mx.float32, ulps=4)


def test_without_the_switch_mlx_refuses(tmp_path: Path) -> None:
    x = mx.random.normal((3, 5, 7))
    with pytest.raises(ValueError, match="serialize primitive"):
        mx.export_function(str(tmp_path / "function.mlxfn"), lambda x: list(outputs(x)), x)
