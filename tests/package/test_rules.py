"""The rules for arguments in a process without MLX: the errors are those of the extension."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx_welford import _composed, _ext

Case = tuple[str, dict[str, Any]]  # a rule, and what to call it with: arrays as [shape, dtype]


def f32(*shape: int) -> list[Any]:
    return [list(shape), "float32"]


def normalize(x: list[Any], statistics: str = "of_batch", **options: Any) -> Case:
    arguments = {"x": x, "weight": None, "bias": None, "statistics": statistics, **options}
    return "check_normalize", {"caller": "Layer", **arguments}


def running(mean: list[Any], var: list[Any]) -> Case:
    arguments = {"running_mean": mean, "running_var": var, "channels": 4, "caller": "Layer"}
    return "check_running_statistics", arguments


def moments(x: list[Any], *axes: int) -> Case:
    return "check_axes", {"x": x, "axes": list(axes), "caller": "moments"}


BAD: list[Case] = [
    *[normalize([[2, 3], dtype]) for dtype in ("bool", "int8", "uint64", "complex64")],
    normalize(f32()),
    normalize(f32(3)),
    normalize(f32(3, 4), "of_instance"),
    normalize(f32(3), mean=f32(3), var=f32(3)),
    normalize(f32(2, 3), axis=2),
    normalize(f32(2, 3), axis=-3),
    normalize(f32(2, 3, 4), "of_instance", axis=0),
    normalize(f32(2, 3, 4), "of_instance", axis=-3),
    normalize(f32(2, 3), channels=4),
    normalize(f32(2, 3, 5), axis=1, channels=5),
    normalize(f32(1, 4), several_values=True),
    normalize(f32(1, 4, 1), axis=1, several_values=True),
    normalize(f32(2, 1, 4), "of_instance", several_values=True),
    normalize(f32(2, 4), mean=f32(4)),
    normalize(f32(2, 4), var=f32(4)),
    normalize(f32(2, 4), weight=f32(5)),
    normalize(f32(2, 4), bias=f32(5)),
    normalize(f32(2, 4), weight=[[4], "int32"]),
    normalize(f32(2, 4), bias=[[4], "int32"]),
    normalize(f32(2, 4), weight=f32()),
    normalize(f32(2, 4), bias=f32(4, 1)),
    normalize(f32(2, 4), mean=f32(1), var=f32(4)),
    normalize(f32(2, 4), mean=f32(4), var=[[4], "uint8"]),
    normalize(f32(2, 4), mean=f32(5), var=f32(4), running=True),
    normalize(f32(2, 4), mean=f32(4), var=f32(5), running=True),
    normalize(f32(2, 4), weight=f32(2, 4)),
    normalize(f32(2, 3, 4), "of_instance", weight=f32(3, 4)),
    normalize(f32(2, 4), "of_instance", groups=3),
    normalize(f32(2, 4), "of_instance", groups=2, bias=f32(4, 2)),
    normalize(f32(2, 4), "of_instance", groups=2, mean=f32(4), var=f32(4)),
    normalize(f32(2, 4), "of_instance", groups=2, axis=0),
    normalize(f32(1, 4, 1), "of_instance", groups=4, axis=1, several_values=True),
    running(f32(5), f32(4)),
    running(f32(4), f32(4, 4)),
    running([[4], "int64"], f32(4)),
    moments([[2, 3], "int32"], 0),
    moments(f32(2, 3)),
    moments(f32(2, 3), 0, 2),
    moments(f32(2, 3), -3),
    moments(f32(2, 3), 1, -1),
    # Several mistakes: the first check that fails gives the error.
    normalize([[3], "int32"], mean=f32(3)),
    normalize([[3], "int32"]),
    normalize(f32(3), axis=7, channels=9),
    normalize(f32(1, 4), channels=5, several_values=True, weight=f32(3)),
    normalize(f32(2, 4), weight=[[5], "int32"], bias=f32(3)),
    running(f32(3), f32(2)),
    moments([[2, 3], "int32"]),
    moments(f32(2, 3), 2, 0, 0),
]
GOOD: list[tuple[Case, Any]] = [
    (normalize(f32(2, 3, 4), "of_instance", axis=-2, weight=f32(3), channels=3), 1),
    (normalize(f32(2, 3, 4), "of_instance", weight=f32(2, 4), bias=f32(4)), 2),
    (normalize(f32(2, 4), "of_instance", groups=2, mean=f32(2, 2), var=f32(2, 2)), 1),
    (normalize(f32(2, 4, 1), "of_instance", groups=4, axis=1, several_values=True), 1),
    (normalize([[0, 4], "bfloat16"], mean=[[4], "float64"], var=[[4], "float16"]), 1),
    (moments([[2, 3, 4], "float16"], -1, 0), [0, 2]),
    (running([[4], "float16"], f32(4)), None),
]

ALONE = """
import importlib.util
import json
import sys

spec = importlib.util.spec_from_file_location("_core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)

def call(rule, arguments):
    if "statistics" in arguments:
        arguments["statistics"] = getattr(core.Statistics, arguments["statistics"])
    try:
        return getattr(core, rule)(**arguments)
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)

results = [call(rule, arguments) for rule, arguments in json.load(sys.stdin)]
assert not [name for name in sys.modules if name.startswith("mlx")]
if sys.platform == "linux":
    with open("/proc/self/maps") as maps:
        assert "libmlx" not in maps.read()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    """What each case gives in a process that has nothing but the module with the rules."""
    spec = importlib.util.find_spec("mlx_welford._core")
    assert spec is not None
    assert spec.origin is not None
    cases = [*BAD, *(case for case, _ in GOOD)]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, spec.origin],
        input=json.dumps(cases),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    results: list[Any] = json.loads(done.stdout)
    return results


def next_running_statistics(module: Any, channels: int, **arguments: Any) -> None:
    batch = mx.zeros(channels)
    module.next_running_statistics(mean=batch, var=batch, momentum=0.1, count=5, **arguments)


OPERATIONS: dict[str, Callable[..., object]] = {
    "check_normalize": lambda module, **arguments: module.normalize(eps=1e-5, **arguments),
    "check_running_statistics": next_running_statistics,
    "check_axes": lambda module, x, axes, caller: module.moments(x, axes),
}


def raised_by(module: Any, rule: str, arguments: dict[str, Any]) -> list[str]:
    """The type and the text of the error."""
    options: dict[str, Any] = {
        name: mx.zeros(value[0], getattr(mx, "bool_" if value[1] == "bool" else value[1]))
        if isinstance(value, list) and name != "axes"
        else value
        for name, value in arguments.items()
    }
    if "statistics" in options:
        options["statistics"] = getattr(module.Statistics, options["statistics"])
    with pytest.raises((TypeError, ValueError)) as error:
        OPERATIONS[rule](module, **options)
    return [error.type.__name__, str(error.value)]


@pytest.mark.parametrize(
    "i", range(len(BAD)), ids=[f"{rule}-{i}" for i, (rule, _) in enumerate(BAD)]
)
def test_an_error_is_that_of_the_extension(i: int, alone: list[Any]) -> None:
    assert alone[i] == raised_by(_ext, *BAD[i]) == raised_by(_composed, *BAD[i])
    assert alone[i][1].startswith(f"[{BAD[i][1]['caller']}] ")


def test_what_fits_is_accepted(alone: list[Any]) -> None:
    assert alone[len(BAD) :] == [result for _, result in GOOD]
