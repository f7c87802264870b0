"""What stands in for the extension beside another MLX: the same functions and results.

test_rules.py compares the errors.
"""

import inspect
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from evaluation import error_of
from mlx_welford import _composed, _core, _ext
from tolerance import wide

BATCH, INSTANCE = (
    {"ours": getattr(_core.Statistics, name), "theirs": getattr(_ext.Statistics, name)}
    for name in ("of_batch", "of_instance")
)


def vector(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).uniform(0.5, 2, shape), dtype)


X, WEIGHT, BIAS, MEAN, VAR = vector(0, 6, 5, 4), *(vector(i, 5) for i in range(1, 5))
HALF = X.astype(mx.float16)
UPDATE = {"running_mean": MEAN, "running_var": VAR, "mean": BIAS, "var": WEIGHT, "caller": "L"}
VARIANTS: dict[str, dict[str, Any]] = {
    "batch": {"statistics": BATCH},
    "instance": {"statistics": INSTANCE},
    "given": {"statistics": INSTANCE, "mean": MEAN, "var": VAR},
    "half": {"x": HALF, "statistics": BATCH, "weight": None, "bias": None},
    "mixed": {"x": HALF, "statistics": BATCH},
    "groups": {
        "x": X[:, :4],
        "statistics": INSTANCE,
        "groups": 2,
        "weight": X[:, :4, 0],
        "bias": None,
    },
    "interleaved": {"x": X[:, :4], "statistics": INSTANCE, "groups": 2, "interleaved": True}
    | {"weight": X[:, :4, 0], "bias": BIAS[:4]},
    "given of groups": {"x": X[:, :4], "statistics": INSTANCE, "groups": 2, "mean": X[:, :2, 0]}
    | {"var": X[:, :2, 1], "weight": None, "bias": None},
    "followed": {"statistics": BATCH, "activation": "silu", "residual": 1 - X},
    "half, followed": {"x": HALF, "statistics": BATCH, "activation": "leaky_relu"}
    | {"weight": None, "bias": None, "negative_slope": 0.3},
}
GIVEN: dict[str, Any] = {
    **{"x": X, "z": X - 1.2, "h": X + 1, "mean": MEAN, "var": VAR, "weight": WEIGHT},
    **{"bias": BIAS, "residual": None, "eps": 1e-5, "caller": "L", "axis": 1},
}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "channels": ("count_channels", {"x": X, "axis": 1, "statistics": BATCH, "caller": "L"}),
    **{
        f"normalize {name}": (
            "normalize",
            {"x": X, "weight": WEIGHT, "bias": BIAS, "eps": 1e-5, "caller": "L", "axis": 1}
            | options,
        )
        for name, options in VARIANTS.items()
    },
    "moments": ("moments", {"x": X, "axes": [0, -1], "keepdims": True}),
    "moments of groups": (
        "group_moments",
        {"x": X[:, :4], "groups": 2, "interleaved": True, "axis": 1},
    ),
    "size": ("size_of", {"x": X}),
    "running": ("next_running_statistics", UPDATE | {"momentum": 0.3, "count": 7}),
    "running by arrays": (
        "next_running_statistics",
        UPDATE | {"momentum": mx.array(0.3), "count": mx.array(7)},
    ),
    "running of instances": (
        "next_running_statistics",
        UPDATE | {"mean": X[:, :, 0], "var": X[:, :, 1], "momentum": 0.999999, "count": 4},
    ),
    "message": ("rank_moments", {"x": X, "caller": "L", "axis": 1, "channels": 5}),
    "message of none": ("rank_moments", {"x": X[:0], "caller": "L", "axis": 1}),
    "merge": (
        "merge_ranks",
        {
            "messages": mx.concatenate(
                [_ext.rank_moments(x, "L", 1) for x in (X[:4], X[:0], X[4:])]
            ),
            "ranks": 3,
            "rank": 1,
            "caller": "L",
        },
    ),
    **{
        f"input gradient{name}": (
            "input_gradient",
            {"x": X, "g": X + 1, "mean": MEAN, "var": VAR, "weight": WEIGHT, "eps": 1e-5}
            | {"grad_mean": BIAS, "grad_var": WEIGHT, "caller": "L", "axis": 1}
            | options,
        )
        for name, options in {"": {}, ", followed": {"bias": BIAS, "activation": "gelu"}}.items()
    },
    "given gradients": ("given_gradients", GIVEN),
    "given gradients, relu": ("given_gradients", GIVEN | {"bias": None, "activation": "relu"}),
    "given gradients, residual": ("given_gradients", GIVEN | {"residual": 1 - X}),
    **{
        f"given gradients, {name} and residual": (
            "given_gradients",
            GIVEN | {"residual": 1 - X, "activation": name},
        )
        for name in ("relu", "silu")
    },
}


def call(module: Any, function: str, arguments: dict[str, Any]) -> list[Any]:
    whose = "theirs" if module is _ext else "ours"
    if "statistics" in arguments:
        arguments = arguments | {"statistics": arguments["statistics"][whose]}
    found = getattr(module, function)(**arguments)
    return list(found) if isinstance(found, tuple | list) else [found]


def test_it_has_all_functions_that_the_package_calls() -> None:
    """Those that only tests, benchmarks and the import call are left out."""
    only_tests = {"simulate_with", "operations", "buffer_names", "limits", "counted_plans"}
    missing = {name for name in vars(_ext) if not name.startswith("_")} - vars(_composed).keys()
    assert missing == only_tests | {"shader_source", "use_kernels"}


@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_of_the_extension(name: str) -> None:
    function, arguments = CALLS[name]
    for got, expected in zip(
        call(_composed, function, arguments), call(_ext, function, arguments), strict=True
    ):
        if isinstance(expected, mx.array):
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
            rtol = 2e-3 if expected.dtype == mx.float16 else 3e-6
            np.testing.assert_allclose(wide(got), wide(expected), rtol=rtol, atol=rtol)
        else:
            assert got == expected


@pytest.mark.parametrize(
    "function", ["normalize", "moments", "group_moments", "next_running_statistics"]
)
def test_parameters_have_the_names_of_the_extension(function: str) -> None:
    own = list(inspect.signature(getattr(_composed, function)).parameters)
    text = getattr(_ext, function).__doc__ or ""
    assert own == [name for name in own if f"{name}: " in text]


@pytest.mark.parametrize(
    "others", [(mx.zeros((2, 5)),), (mx.zeros((3, 4), mx.float16),), (), (mx.full((5, 4), 7.0),)]
)
def test_ranks_that_disagree_are_named_as_by_the_extension(others: tuple[mx.array, ...]) -> None:
    """Also a single value on all ranks, and what is no message."""
    own = mx.zeros((3, 4)) if others else mx.zeros((1, 4))
    messages = [
        a if a.shape == (5, 4) else _composed.rank_moments(a, "L", -1) for a in (own, *others)
    ]
    rows = min(len(message) for message in messages)
    whole = mx.concatenate([message[:rows] for message in messages])
    mx.eval(whole)
    found = [
        error_of(partial(module.merge_ranks, whole, len(messages), 0, "L"))
        for module in (_composed, _ext)
    ]
    assert found[0] == found[1]


def test_launch_plans_are_refused_with_the_reason() -> None:
    for function in (_composed.launch_plan, _composed.axis_order):
        with pytest.raises(ValueError, match="no launch plans, since there are no kernels: "):
            function([2, 3], [0], [0])
