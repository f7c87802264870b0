"""Every error: its type, its exact message, and that it comes at the call."""

import re
from collections.abc import Callable

import mlx.core as mx
import mlx_welford as mw
import pytest
from mlx_welford.compat import torch as compat

Call = Callable[[], object]


def x(*shape: int) -> mx.array:
    return mx.zeros(shape)


VALUE_ERRORS: list[tuple[str, Call]] = [
    # eps
    (
        "[InstanceNorm] 'eps' must be positive but got -1.0.",
        lambda: mw.InstanceNorm(4, eps=-1.0),
    ),
    ("[InstanceNorm] 'eps' must be positive but got 0.0.", lambda: mw.InstanceNorm(4, eps=0.0)),
    ("[BatchNorm] 'eps' must be positive but got -1.0.", lambda: mw.BatchNorm(4, eps=-1.0)),
    ("[BatchNorm] 'eps' must be positive but got 0.0.", lambda: mw.BatchNorm(4, 0.0)),
    ("[BatchNorm] 'eps' must be positive but got nan.", lambda: mw.BatchNorm(4, float("nan"))),
    (
        "[instance_norm] 'eps' must be positive but got -1.0.",
        lambda: mw.instance_norm(x(2, 3, 4), eps=-1.0),
    ),
    (
        "[batch_norm] 'eps' must be positive but got 0.0.",
        lambda: mw.batch_norm(x(2, 3, 4), eps=0.0),
    ),
    # momentum
    (
        "[BatchNorm] 'momentum' must be in [0, 1] but got 1.5.",
        lambda: mw.BatchNorm(4, momentum=1.5),
    ),
    (
        "[BatchNorm] 'momentum' must be in [0, 1] but got -0.1.",
        lambda: mw.BatchNorm(4, momentum=-0.1),
    ),
    (
        "[InstanceNorm] 'momentum' must be in [0, 1] but got 1.5.",
        lambda: mw.InstanceNorm(4, momentum=1.5, track_running_stats=True),
    ),
    # number of channels
    ("[BatchNorm] 'num_features' must be positive but got 0.", lambda: mw.BatchNorm(0)),
    ("[BatchNorm] 'num_features' must be positive but got -3.", lambda: mw.BatchNorm(-3)),
    ("[InstanceNorm] 'dims' must be positive but got 0.", lambda: mw.InstanceNorm(0)),
    (
        "[BatchNorm] expected 4 channels on axis -1 but got input of shape (2, 3, 5).",
        lambda: mw.BatchNorm(4)(x(2, 3, 5)),
    ),
    (
        "[BatchNorm] expected 4 channels on axis 1 but got input of shape (2, 3, 4).",
        lambda: mw.BatchNorm(4, axis=1)(x(2, 3, 4)),
    ),
    (
        "[BatchNorm] expected 4 channels on axis -1 but got input of shape (2, 3, 5).",
        lambda: mw.BatchNorm(4).eval()(x(2, 3, 5)),
    ),
    (
        "[BatchNorm] expected 4 channels on axis -1 but got input of shape (2, 3, 5).",
        lambda: mw.BatchNorm(4, affine=False, track_running_stats=False)(x(2, 3, 5)),
    ),
    (
        "[InstanceNorm] expected 4 channels on axis -1 but got input of shape (2, 3, 5).",
        lambda: mw.InstanceNorm(4)(x(2, 3, 5)),
    ),
    # groups
    ("[GroupNorm] 'num_groups' must be positive but got 0.", lambda: mw.GroupNorm(0, 4)),
    ("[GroupNorm] 'num_groups' must be positive but got -2.", lambda: mw.GroupNorm(-2)),
    ("[GroupNorm] 'dims' must be positive but got 0.", lambda: mw.GroupNorm(2, 0)),
    ("[GroupNorm] 'eps' must be positive but got 0.0.", lambda: mw.GroupNorm(2, 4, 0.0)),
    (
        "[GroupNorm] 'num_groups' must divide the number of channels but got 3 for 4 channels.",
        lambda: mw.GroupNorm(3, 4),
    ),
    (
        "[GroupNorm] 'num_groups' must divide the number of channels but got 3 for 4 channels.",
        lambda: mw.GroupNorm(3)(x(2, 5, 4)),
    ),
    (
        "[GroupNorm] expected 4 channels on axis 1 but got input of shape (2, 6, 5).",
        lambda: compat.GroupNorm(2, 4)(x(2, 6, 5)),
    ),
    (
        "[GroupNorm] 'num_channels' must be positive but got 0.",
        lambda: compat.GroupNorm(2, 0),
    ),
    (
        "[GroupNorm] expected more than one value per group in training "
        "but got input of shape (1, 4).",
        lambda: compat.GroupNorm(4, 4)(x(1, 4)),
    ),
    (
        "[group_norm] 'num_groups' must be positive but got 0.",
        lambda: mw.group_norm(x(2, 3, 4), 0),
    ),
    (
        "[group_norm] 'num_groups' must divide the number of channels but got 2 for 3 channels.",
        lambda: mw.group_norm(x(2, 3, 4), 2, axis=1),
    ),
    (
        "[group_norm] 'eps' must be positive but got -1.0.",
        lambda: mw.group_norm(x(2, 3, 4), 2, eps=-1.0),
    ),
    (
        "[group_norm] 'axis' must not be the batch axis 0.",
        lambda: mw.group_norm(x(2, 3, 4), 2, axis=-3),
    ),
    (
        "[group_norm] expected an input of at least 2 dimensions but got shape (4,).",
        lambda: mw.group_norm(x(4), 2),
    ),
    (
        "[group_norm] 'weight' must have shape (4,) or (2, 4) but got (2,).",
        lambda: mw.group_norm(x(2, 3, 4), 2, x(2)),
    ),
    (
        "[group_norm] 'bias' must have shape (4,) or (2, 4) but got (1, 4).",
        lambda: mw.group_norm(x(2, 3, 4), 2, x(2, 4), x(1, 4)),
    ),
    (
        "[group_norm] 'mean' must have shape (3, 2) but got (4,).",
        lambda: mw.group_norm(x(3, 5, 4), 2, mean=x(4), var=x(4)),
    ),
    (
        "[group_norm] 'var' must have shape (3, 2) but got (3, 4).",
        lambda: mw.group_norm(x(3, 5, 4), 2, mean=x(3, 2), var=x(3, 4)),
    ),
    (
        "[group_norm] 'mean' and 'var' must be given together.",
        lambda: mw.group_norm(x(3, 5, 4), 2, var=x(3, 2)),
    ),
    (
        "[batch_norm] 'weight' must have shape (5,) but got (2, 5).",
        lambda: mw.batch_norm(x(2, 3, 5), x(2, 5)),
    ),
    # shapes of the other arguments
    (
        "[batch_norm] 'weight' must have shape (5,) but got (4,).",
        lambda: mw.batch_norm(x(2, 3, 5), x(4)),
    ),
    (
        "[batch_norm] 'bias' must have shape (5,) but got (5, 1).",
        lambda: mw.batch_norm(x(2, 3, 5), None, x(5, 1)),
    ),
    (
        "[batch_norm] 'mean' must have shape (5,) but got (4,).",
        lambda: mw.batch_norm(x(2, 3, 5), mean=x(4), var=x(5)),
    ),
    (
        "[batch_norm] 'var' must have shape (5,) but got (1,).",
        lambda: mw.batch_norm(x(2, 3, 5), mean=x(5), var=x(1)),
    ),
    (
        "[batch_norm] 'weight' must have shape (3,) but got (5,).",
        lambda: mw.batch_norm(x(2, 3, 5), x(5), axis=1),
    ),
    (
        "[instance_norm] 'weight' must have shape (5,) or (2, 5) but got ().",
        lambda: mw.instance_norm(x(2, 3, 5), x()),
    ),
    (
        "[instance_norm] 'bias' must have shape (3,) or (2, 3) but got (5,).",
        lambda: mw.instance_norm(x(2, 3, 5), None, x(5), axis=1),
    ),
    # dimensions
    (
        "[batch_norm] expected an input of at least 2 dimensions but got shape (3,).",
        lambda: mw.batch_norm(x(3)),
    ),
    (
        "[batch_norm] expected an input of at least 2 dimensions but got shape ().",
        lambda: mw.batch_norm(x()),
    ),
    (
        "[instance_norm] expected an input of at least 3 dimensions but got shape (3, 4).",
        lambda: mw.instance_norm(x(3, 4)),
    ),
    (
        "[BatchNorm] expected an input of at least 2 dimensions but got shape (3,).",
        lambda: mw.BatchNorm(3)(x(3)),
    ),
    (
        "[InstanceNorm] expected an input of at least 3 dimensions but got shape (3, 4).",
        lambda: mw.InstanceNorm(4)(x(3, 4)),
    ),
    # axis
    (
        "[batch_norm] 'axis' must be in [-3, 2] but got 3.",
        lambda: mw.batch_norm(x(2, 3, 5), axis=3),
    ),
    (
        "[batch_norm] 'axis' must be in [-2, 1] but got -3.",
        lambda: mw.batch_norm(x(2, 3), axis=-3),
    ),
    (
        "[instance_norm] 'axis' must be in [-3, 2] but got -4.",
        lambda: mw.instance_norm(x(2, 3, 5), axis=-4),
    ),
    (
        "[instance_norm] 'axis' must not be the batch axis 0.",
        lambda: mw.instance_norm(x(2, 3, 5), axis=0),
    ),
    (
        "[instance_norm] 'axis' must not be the batch axis 0.",
        lambda: mw.instance_norm(x(2, 3, 5), axis=-3),
    ),
    (
        "[BatchNorm] 'axis' must be in [-3, 2] but got 3.",
        lambda: mw.BatchNorm(5, axis=3)(x(2, 3, 5)),
    ),
    (
        "[InstanceNorm] 'axis' must not be the batch axis 0.",
        lambda: mw.InstanceNorm(2, axis=0)(x(2, 3, 5)),
    ),
    # statistics
    (
        "[batch_norm] 'mean' and 'var' must be given together.",
        lambda: mw.batch_norm(x(2, 5), mean=x(5)),
    ),
    (
        "[batch_norm] 'mean' and 'var' must be given together.",
        lambda: mw.batch_norm(x(2, 5), var=x(5)),
    ),
    (
        "[BatchNorm] expected more than one value per channel in training "
        "but got input of shape (1, 4).",
        lambda: mw.BatchNorm(4)(x(1, 4)),
    ),
    (
        "[BatchNorm] expected more than one value per channel in training "
        "but got input of shape (1, 4, 1, 1).",
        lambda: mw.BatchNorm(4, axis=1)(x(1, 4, 1, 1)),
    ),
    (
        "[BatchNorm] expected more than one value per channel in training "
        "but got input of shape (1, 4).",
        lambda: mw.BatchNorm(4, track_running_stats=False)(x(1, 4)),
    ),
    (
        "[InstanceNorm] expected more than one value per channel in training "
        "but got input of shape (2, 1, 4).",
        lambda: mw.InstanceNorm(4, track_running_stats=True)(x(2, 1, 4)),
    ),
    # moments
    ("[moments] 'axes' must not be empty.", lambda: mw.moments(x(2, 3, 5), ())),
    (
        "[moments] 'axes' must be in [-3, 2] but got 3.",
        lambda: mw.moments(x(2, 3, 5), (0, 3)),
    ),
    (
        "[moments] 'axes' must be in [-3, 2] but got -4.",
        lambda: mw.moments(x(2, 3, 5), (-4,)),
    ),
    ("[moments] 'axes' must not repeat but got (0, 0).", lambda: mw.moments(x(2, 3, 5), (0, 0))),
    ("[moments] 'axes' must not repeat but got (2, -1).", lambda: mw.moments(x(2, 3, 5), (2, -1))),
    (
        "[group_moments] 'num_groups' must be positive but got 0.",
        lambda: mw.group_moments(x(2, 4), 0),
    ),
    (
        "[group_moments] 'num_groups' must divide the number of channels but got 2 for 5 channels.",
        lambda: mw.group_moments(x(2, 3, 5), 2),
    ),
    (
        "[group_moments] 'axis' must not be the batch axis 0.",
        lambda: mw.group_moments(x(2, 4), 2, axis=0),
    ),
    (
        "[group_moments] 'axis' must be in [-2, 1] but got 2.",
        lambda: mw.group_moments(x(2, 4), 2, axis=2),
    ),
    (
        "[group_moments] expected an input of at least 2 dimensions but got shape (4,).",
        lambda: mw.group_moments(x(4), 2),
    ),
]


def integers(*shape: int, dtype: mx.Dtype = mx.int32) -> mx.array:
    return mx.zeros(shape, dtype)


TYPE_ERRORS: list[tuple[str, Call]] = [
    (
        "[batch_norm] expected a floating-point input but got int32.",
        lambda: mw.batch_norm(integers(2, 3)),
    ),
    (
        "[batch_norm] expected a floating-point input but got complex64.",
        lambda: mw.batch_norm(integers(2, 3, dtype=mx.complex64)),
    ),
    (
        "[instance_norm] expected a floating-point input but got bool.",
        lambda: mw.instance_norm(integers(2, 3, 4, dtype=mx.bool_)),
    ),
    (
        "[moments] expected a floating-point input but got uint8.",
        lambda: mw.moments(integers(2, 3, dtype=mx.uint8), (0,)),
    ),
    (
        "[group_moments] expected a floating-point input but got int32.",
        lambda: mw.group_moments(integers(2, 4), 2),
    ),
    (
        "[BatchNorm] expected a floating-point input but got int32.",
        lambda: mw.BatchNorm(3)(integers(2, 3)),
    ),
    (
        "[group_norm] expected a floating-point input but got int32.",
        lambda: mw.group_norm(integers(2, 4), 2),
    ),
    (
        "[group_norm] expected a floating-point 'mean' but got int32.",
        lambda: mw.group_norm(x(2, 4), 2, mean=integers(2, 2), var=x(2, 2)),
    ),
    (
        "[InstanceNorm] expected a floating-point input but got int32.",
        lambda: mw.InstanceNorm(4)(integers(2, 3, 4)),
    ),
    (
        "[batch_norm] expected a floating-point 'weight' but got int32.",
        lambda: mw.batch_norm(x(2, 3), integers(3)),
    ),
    (
        "[batch_norm] expected a floating-point 'bias' but got int32.",
        lambda: mw.batch_norm(x(2, 3), None, integers(3)),
    ),
    (
        "[batch_norm] expected a floating-point 'mean' but got int32.",
        lambda: mw.batch_norm(x(2, 3), mean=integers(3), var=x(3)),
    ),
    (
        "[batch_norm] expected a floating-point 'var' but got int32.",
        lambda: mw.batch_norm(x(2, 3), mean=x(3), var=integers(3)),
    ),
    (
        "[instance_norm] expected a floating-point 'weight' but got int32.",
        lambda: mw.instance_norm(x(2, 3, 4), integers(4)),
    ),
]


@pytest.mark.parametrize(("message", "call"), VALUE_ERRORS, ids=[m for m, _ in VALUE_ERRORS])
def test_value_error(message: str, call: Call) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize(("message", "call"), TYPE_ERRORS, ids=[m for m, _ in TYPE_ERRORS])
def test_type_error(message: str, call: Call) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        call()


def test_an_error_leaves_the_layer_as_it_was() -> None:
    layer = mw.BatchNorm(4)
    layer(mx.random.normal((6, 4)))
    mean, var = layer.running_mean.tolist(), layer.running_var.tolist()
    with pytest.raises(ValueError, match="expected 4 channels"):
        layer(mx.random.normal((6, 5)))
    with pytest.raises(ValueError, match="more than one value"):
        layer(mx.random.normal((1, 4)))
    assert layer.running_mean.tolist() == mean
    assert layer.running_var.tolist() == var


@pytest.mark.parametrize(
    ("layer", "bad"),
    [
        (mw.BatchNorm(), (4,)),
        (mw.BatchNorm(), (1, 4)),
        (mw.InstanceNorm(affine=True), (3, 4)),
        (mw.InstanceNorm(affine=True, track_running_stats=True), (3, 1, 4)),
    ],
    ids=["batch-dimensions", "batch-one-value", "instance-dimensions", "instance-one-value"],
)
def test_an_error_leaves_the_number_of_channels_open(
    layer: mw.BatchNorm | mw.InstanceNorm, bad: tuple[int, ...]
) -> None:
    """A layer without a number of channels is not bound to that of an input it refused."""
    with pytest.raises(ValueError, match=r"^\[(Batch|Instance)Norm\] expected"):
        layer(mx.zeros(bad))
    assert layer(mx.random.normal((3, 2, 6))).shape == (3, 2, 6)
    assert layer.weight.shape == (6,)


def test_evaluation_takes_one_value_per_channel() -> None:
    layer = mw.BatchNorm(2, eps=1e-3).eval()
    assert layer(mx.array([[3.0, -1.0]])).tolist() == [
        [pytest.approx(3 / 1.001**0.5), pytest.approx(-1 / 1.001**0.5)]
    ]


def test_instances_of_one_value_are_not_an_error_without_running_statistics() -> None:
    layer = mw.InstanceNorm(4, affine=True)
    layer.bias = mx.array([1.0, 2.0, 3.0, 4.0])
    assert layer(mx.random.normal((2, 1, 4))).tolist() == [[[1.0, 2.0, 3.0, 4.0]]] * 2
