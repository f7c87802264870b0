"""The one rule for what counts as right.

Truth is float64 (longdouble for float64 arrays). The largest error of an array is at most twice
that of the baseline on the same data, plus one unit in the last place of the array's type at the
magnitude of the largest true value.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_welford.selftest.truth import ulp as ulp_of_type
from reference import Array

# Where longdouble is float64 (macOS on arm64), truth for float64 arrays is rounded as often as they
# are: results are held to two bits less than they have.
_FLOAT64_UNITS = 1 if np.finfo(np.longdouble).nmant > 52 else 4


def wide(a: mx.array) -> Array:
    """The exact values of an MLX array, in the precision that truth is computed in."""
    if a.dtype == mx.float64:
        return np.array(a).astype(np.longdouble)
    return np.array(a.astype(mx.float32)).astype(np.float64)


def bits(a: mx.array) -> Array:
    """The bytes of an MLX array, for comparisons in which NaN equals NaN and -0 is not 0."""
    return np.array(mx.contiguous(a if a.ndim > 0 else a[None]).view(mx.uint8))


def ulp(magnitude: float, dtype: mx.Dtype) -> float:
    """The distance between neighbours of the type around a magnitude, as far as truth knows it."""
    return ulp_of_type(magnitude, dtype) * (_FLOAT64_UNITS if dtype == mx.float64 else 1)


def units(a: Array, dtype: mx.Dtype) -> Array:
    """The distance between neighbours of the type around each value, or around 1 if that is more.

    Terms of p of the order of 1 cancel where z is small.
    """
    result: Array = mx.finfo(dtype).eps * 2.0 ** np.floor(np.log2(np.maximum(np.abs(a), 1)))
    return result


def largest(a: Array) -> float:
    return float(np.abs(a).max(initial=0))


def largest_error(got: mx.array, truth: Array) -> float:
    """Largest absolute error; infinite if anything is not finite where the truth is."""
    values = wide(got)
    if not np.isfinite(values).all():
        return math.inf
    return largest(values - truth)


@dataclass
class _Errors:
    """Of one array over all draws."""

    ours: float = 0.0
    baseline: float = 0.0
    unit: float = 0.0


class Comparison:
    """The rule, over several draws of the data if there are: add them all, then check.

    The largest of a few errors is luck, so that small problems need more draws than one.
    """

    def __init__(self) -> None:
        self.errors: dict[str, _Errors] = {}

    def add(
        self,
        name: str,
        ours: mx.array,
        baseline: mx.array,
        truth: Array,
        dtype: mx.Dtype,
        *,
        magnitude: float = 0.0,
    ) -> None:
        """A baseline that is not finite grants nothing.

        magnitude counts like a true value. It is for results in which terms of that size cancel,
        so that no algorithm could know them to a unit in their own last place.
        """
        assert ours.dtype == dtype, f"{name} is {ours.dtype}, expected {dtype}"
        assert ours.shape == truth.shape, f"{name} has shape {ours.shape}, expected {truth.shape}"
        assert np.isfinite(truth).all(), f"the true {name} is not finite: a mistake in the test"
        errors = self.errors.setdefault(name, _Errors())
        theirs = largest_error(baseline, truth)
        errors.ours = max(errors.ours, largest_error(ours, truth))
        errors.baseline = max(errors.baseline, theirs if math.isfinite(theirs) else 0.0)
        errors.unit = max(errors.unit, ulp(max(largest(truth), magnitude), dtype))

    def check(self) -> None:
        for name, errors in self.errors.items():
            allowed = 2 * errors.baseline + errors.unit
            assert errors.ours <= allowed, (
                f"{name}: largest error {errors.ours:.3g}, allowed {allowed:.3g} "
                f"(baseline {errors.baseline:.3g}, one unit in the last place {errors.unit:.3g})"
            )


def assert_as_good_as(
    ours: mx.array,
    baseline: mx.array,
    truth: Array,
    dtype: mx.Dtype,
    *,
    name: str = "result",
    magnitude: float = 0.0,
) -> None:
    """The rule for a single array."""
    comparison = Comparison()
    comparison.add(name, ours, baseline, truth, dtype, magnitude=magnitude)
    comparison.check()


def assert_within(
    ours: mx.array, truth: Array, dtype: mx.Dtype, *, ulps: float, name: str = "result"
) -> None:
    """Right by itself, whatever a baseline may do: within units in the last place at the largest
    true value."""
    assert ours.dtype == dtype, f"{name} is {ours.dtype}, expected {dtype}"
    assert ours.shape == truth.shape, f"{name} has shape {ours.shape}, expected {truth.shape}"
    assert_error(ours, truth, ulps * ulp(largest(truth), dtype), name)


def assert_error(ours: mx.array, truth: Array, allowed: float, name: str = "result") -> None:
    """For results whose accuracy the problem itself limits."""
    error = largest_error(ours, truth)
    assert error <= allowed, f"{name}: largest error {error:.3g}, allowed {allowed:.3g}"


def assert_same_bits(ours: mx.array, other: mx.array, name: str = "result") -> None:
    assert ours.dtype == other.dtype, f"{name} is {ours.dtype}, expected {other.dtype}"
    assert ours.shape == other.shape, f"{name} has shape {ours.shape}, expected {other.shape}"
    np.testing.assert_array_equal(bits(ours), bits(other), err_msg=name)
