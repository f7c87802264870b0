"""The references themselves: against finite differences, a complex step, and one another."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reference
from processes import run
from reference import Array, Kind

LAYOUTS = [
    pytest.param("batch", (5, 3), -1, id="batch-5x3"),
    pytest.param("batch", (3, 4, 2), 1, id="batch-3x4x2-axis1"),
    pytest.param("batch", (2, 3, 2, 3), 0, id="batch-2x3x2x3-axis0"),
    pytest.param("instance", (2, 5, 3), -1, id="instance-2x5x3"),
    pytest.param("instance", (2, 3, 2, 4), 1, id="instance-2x3x2x4-axis1"),
    pytest.param("instance", (2, 3, 2, 2, 2), 2, id="instance-2x3x2x2x2-axis2"),
]
EPS = 1e-2


def draw(kind: Kind, shape: tuple[int, ...], axis: int) -> dict[str, Array]:
    rng = np.random.default_rng(7)
    channels = shape[axis]
    statistics = (channels,) if kind == "batch" else (shape[0], channels)
    return {
        "x": rng.normal(0.5, 2.0, shape),
        "weight": rng.normal(1.0, 0.3, channels),
        "bias": rng.normal(0.0, 0.3, channels),
        "gy": rng.normal(size=shape),
        "gmean": rng.normal(size=statistics),
        "gvar": rng.normal(size=statistics),
    }


def differences(f: Callable[[Array], float], at: Array) -> Array:
    """The gradient of a scalar function by central differences, entry by entry."""
    h = 1e-5
    result = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[i] = h
        result[i] = (f(at + step) - f(at - step)) / (2 * h)
    return result


@pytest.mark.parametrize(("kind", "shape", "axis"), LAYOUTS)
def test_backward_is_the_gradient_of_forward(kind: Kind, shape: tuple[int, ...], axis: int) -> None:
    d = draw(kind, shape, axis)

    def loss(x: Array, weight: Array, bias: Array) -> float:
        out = reference.forward(kind, x, weight, bias, EPS, axis)
        terms = (d["gy"] * out.y).sum() + (d["gmean"] * out.mean).sum()
        return float(terms + (d["gvar"] * out.var).sum())

    got = reference.backward(kind, d["x"], d["weight"], EPS, axis, d["gy"], d["gmean"], d["gvar"])
    x, w, b = d["x"], d["weight"], d["bias"]
    np.testing.assert_allclose(got.x, differences(lambda v: loss(v, w, b), x), atol=1e-8)
    np.testing.assert_allclose(got.weight, differences(lambda v: loss(x, v, b), w), atol=1e-8)
    np.testing.assert_allclose(got.bias, differences(lambda v: loss(x, w, v), b), atol=1e-8)


@pytest.mark.parametrize(("kind", "shape", "axis"), LAYOUTS)
def test_backward_and_the_complex_step_are_adjoint(
    kind: Kind, shape: tuple[int, ...], axis: int
) -> None:
    d = draw(kind, shape, axis)
    dx = np.random.default_rng(1).normal(size=shape)
    tangent = reference.directional(
        lambda x: reference.forward(kind, x, d["weight"], d["bias"], EPS, axis).y, [d["x"]], [dx]
    )
    gx = reference.backward(kind, d["x"], d["weight"], EPS, axis, d["gy"]).x
    np.testing.assert_allclose((tangent * d["gy"]).sum(), (dx * gx).sum(), rtol=1e-12)


@pytest.mark.parametrize(("kind", "shape", "axis"), LAYOUTS)
def test_gradient_penalty(kind: Kind, shape: tuple[int, ...], axis: int) -> None:
    d = draw(kind, shape, axis)

    def penalty(x: Array, weight: Array, gy: Array) -> float:
        gx = reference.backward(kind, x, weight, EPS, axis, gy, d["gmean"], d["gvar"]).x
        return float((gx**2).sum())

    x, w, gy = d["x"], d["weight"], d["gy"]
    got = reference.gradient_penalty(kind, x, w, EPS, axis, gy, d["gmean"], d["gvar"])
    assert got.value == penalty(x, w, gy)
    np.testing.assert_allclose(got.x, differences(lambda v: penalty(v, w, gy), x), atol=1e-6)
    np.testing.assert_allclose(got.weight, differences(lambda v: penalty(x, v, gy), w), atol=1e-6)
    np.testing.assert_allclose(got.gy, differences(lambda v: penalty(x, w, v), gy), atol=1e-6)


@pytest.mark.parametrize("axis", [-1, 1, 0])
def test_evaluate_backward_is_the_gradient_of_evaluate(axis: int) -> None:
    d = draw("batch", (3, 4, 5), axis)
    rng = np.random.default_rng(3)
    point = {
        "x": d["x"],
        "weight": d["weight"],
        "bias": d["bias"],
        "mean": rng.normal(size=d["weight"].shape),
        "var": rng.uniform(0.5, 2.0, size=d["weight"].shape),
    }
    got = reference.evaluate_backward(
        point["x"], point["weight"], point["mean"], point["var"], EPS, axis, d["gy"]
    )
    for name in point:

        def loss(value: Array, name: str = name) -> float:
            at = {**point, name: value}
            return float((d["gy"] * reference.evaluate(**at, eps=EPS, axis=axis)).sum())

        expected = differences(loss, point[name])
        np.testing.assert_allclose(getattr(got, name), expected, atol=1e-8, err_msg=name)


@pytest.mark.parametrize(("kind", "shape", "axis"), LAYOUTS)
def test_evaluating_with_own_statistics_is_the_forward_pass(
    kind: Kind, shape: tuple[int, ...], axis: int
) -> None:
    d = draw(kind, shape, axis)
    out = reference.forward(kind, d["x"], d["weight"], d["bias"], EPS, axis)
    if kind == "batch":
        y = reference.evaluate(d["x"], d["weight"], d["bias"], out.mean, out.var, EPS, axis)
    else:
        within = axis % len(shape) - 1
        y = np.stack(
            [
                reference.evaluate(x, d["weight"], d["bias"], mean, var, EPS, within)
                for x, mean, var in zip(d["x"], out.mean, out.var, strict=True)
            ]
        )
    np.testing.assert_allclose(y, out.y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_moments_backward_is_the_gradient_of_moments(axes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(1.0, 2.0, (3, 4, 5))
    mean, var = reference.moments(x, axes, keepdims=True)
    np.testing.assert_allclose(mean, x.mean(axis=axes, keepdims=True))
    np.testing.assert_allclose(var, x.var(axis=axes, keepdims=True))
    gmean, gvar = rng.normal(size=mean.shape), rng.normal(size=var.shape)

    def loss(x: Array) -> float:
        mean, var = reference.moments(x, axes, keepdims=True)
        return float((gmean * mean).sum() + (gvar * var).sum())

    got = reference.moments_backward(x, axes, gmean, gvar)
    np.testing.assert_allclose(got, differences(loss, x), atol=1e-8)


@pytest.mark.kernels("it runs the tests of the CPU's")
def test_truth_without_a_wider_type_than_float64() -> None:
    """As on macOS on arm64: the results in float64 are as right as truth can tell there."""
    tests = Path(__file__).with_name("test_statistics.py")
    run(
        f"""
        import sys
        import numpy as np
        import pytest

        np.longdouble = np.float64
        options = ["-q", "-p", "no:cacheprovider", "--backend", "cpu", "-k", "any_axes and float64"]
        sys.exit(pytest.main([{str(tests)!r}, *options]))
        """
    )
