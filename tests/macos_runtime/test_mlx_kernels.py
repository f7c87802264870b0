"""MLX's own kernels, as Apple compiled them, give on the GPU what MLX's CPU gives.

One or two of each family that tests of this package use; which shows that the translation from AIR,
the sources that MLX writes at run time and their bindings are understood.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

Operation = Callable[[mx.array], mx.array]


def layer_norm_gradient(a: mx.array) -> mx.array:
    def loss(a: mx.array) -> mx.array:
        return (mx.fast.layer_norm(a, a[0], a[1], 1e-5) * a[3]).sum()

    gradient: mx.array = mx.grad(loss)(a)
    return gradient


def scattered(a: mx.array) -> mx.array:
    gradient: mx.array = mx.grad(lambda a: mx.square(a[mx.array([3, 1, 3])]).sum())(a)
    return gradient


def convolved(a: mx.array) -> mx.array:
    kernel = mx.random.normal((4, 3, 3, 1), key=mx.random.key(1))
    return mx.conv2d(a.reshape(1, 37, 45, 1), kernel)


OPERATIONS: dict[str, Operation] = {
    "sum of columns": lambda a: a.sum(0),
    "sum of rows": lambda a: a.sum(1),
    "sum of all": lambda a: mx.concatenate([a] * 40).sum(),
    "largest of columns": lambda a: a.max(0),
    "all": lambda a: mx.all(a > -1),
    "cumulative sum": lambda a: mx.cumsum(a, 0) + mx.cumsum(a, 1),
    "argmax": lambda a: mx.argmax(a, 1),
    "sort": lambda a: mx.sort(a, 1),
    "softmax": lambda a: mx.softmax(a, -1),
    "logsumexp": lambda a: mx.logsumexp(a, -1),
    "negative strides": lambda a: mx.contiguous(a[::-1, ::-2]),
    "concatenation": lambda a: mx.concatenate([a, a * 2], 1),
    "selection": lambda a: mx.where(a > 0, a, -a),
    "integers": lambda a: (a * 10).astype(mx.int32) // 3,
    "bytes": lambda a: mx.abs(a * 10).astype(mx.uint8),
    "bfloat16": lambda a: (a.astype(mx.bfloat16) * 3).astype(mx.float32),
    "float16": lambda a: (a.astype(mx.float16) * 3).astype(mx.float32),
    "error function": mx.erf,
    "hyperbolic tangent": mx.tanh,
    "uniform numbers": lambda _: mx.random.uniform(shape=(50, 7), key=mx.random.key(3)),
    "normal numbers": lambda _: mx.random.normal(shape=(50, 7), key=mx.random.key(3)),
    "layer norm": lambda a: mx.fast.layer_norm(a, a[0], a[1], 1e-5),
    "gradient of layer norm": layer_norm_gradient,
    "gather": lambda a: a[mx.array([3, 1, 2])],
    "take along an axis": lambda a: mx.take_along_axis(a, mx.argsort(a, 1), 1),
    "scatter": scattered,
    "an update of a slice": lambda a: mx.slice_update(
        a, mx.zeros((3, 3)), mx.array([1, 2]), axes=(0, 1)
    ),
    "matrix product": lambda a: a @ a.T,
    "product with a transposed matrix": lambda a: a.T @ (a + 1),
    "matrix and vector": lambda a: a @ a[0],
    "vector and matrix": lambda a: a[:, 0] @ a,
    "convolution": convolved,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_gpu_agrees_with_the_cpu(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((37, 45)).astype(np.float32)
    results = []
    for device in (mx.gpu, mx.cpu):
        mx.set_default_device(device)
        results.append(np.array(OPERATIONS[name](mx.array(x))))
    on_gpu, on_cpu = results
    scale = max(1.0, float(np.abs(on_cpu.astype(np.float64)).max()))
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=0, atol=3e-6 * scale)


def test_fused_kernels_in_every_type() -> None:
    """What mx.compile writes for contiguous, strided and broadcast arguments."""

    def f(a: mx.array, b: mx.array) -> mx.array:
        return mx.tanh(a) * mx.sigmoid(b) + mx.maximum(a, 0) * mx.rsqrt(b * b + 1)

    for dtype, tolerance in ((mx.float32, 1e-5), (mx.float16, 1e-2), (mx.bfloat16, 1e-1)):
        a = mx.random.normal((37, 45)).astype(dtype)
        for b in (a + 1, a[:, :1], (a + 2).T.reshape(45, 37).T, a[0]):
            fused = mx.compile(f)(a, b).astype(mx.float32)
            plain = f(a.astype(mx.float32), b.astype(mx.float32))
            np.testing.assert_allclose(np.array(fused), np.array(plain), atol=tolerance)
