"""Results recorded from PyTorch and MXNet, in golden/.

PyTorch's are float64 computations on float32 data, three training steps and one evaluation, with
the running statistics after each step. MXNet's are float32. What only the compat layers can do
(unbatched input, momentum=None) is in golden/compat.
"""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
import reference
import systems
from records import Record, describe, step_of
from reference import Array, Kind, Running
from systems import System
from tolerance import Comparison, wide

pytestmark = pytest.mark.every_backend

GOLDEN = Path(__file__).parents[1] / "golden"
TORCH = sorted(GOLDEN.glob("torch_*.npz"))
MXNET = sorted(GOLDEN.glob("mxnet_*.npz"))
STEPS = ["0", "1", "2", "_eval"]


class Golden(Record):
    """What the layers at hand make of a record."""

    def get(self, name: str) -> Array | None:
        return self.arrays.get(name)

    @property
    def kind(self) -> Kind:
        return "batch" if self.meta["cls"].startswith("Batch") else "instance"

    def tracks(self) -> bool:
        default = self.kind == "batch"
        return bool(self.kwargs.get("track_running_stats", default))


def assert_close(
    got: Array, expected: Array, rtol: float = 1e-10, atol: float | None = None
) -> None:
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol / 100 if atol is None else atol)


def double(a: Array | None) -> Array | None:
    return None if a is None else a.astype(np.float64)


def test_files_are_there() -> None:
    assert len(TORCH) == 31
    assert len(MXNET) == 36


def check_reference(
    record: Golden, step: str, running: Running | None
) -> tuple[Running | None, Array, reference.Gradients]:
    """The reference's running statistics, y and gradients of a step."""
    kind, eps = record.kind, record.kwargs.get("eps", 1e-5)
    x, gy = record["x" + step].astype(np.float64), record["g" + step].astype(np.float64)
    weight, bias = double(record.get("weight")), double(record.get("bias"))
    if step == "_eval" and running is not None:
        y = reference.evaluate(x, weight, bias, *running, eps, 1)
        grads = reference.evaluate_backward(x, weight, *running, eps, 1, gy)
        return running, y, reference.Gradients(grads.x, grads.weight, grads.bias)
    if running is not None:
        running = reference.running(kind, running, x, record.kwargs.get("momentum", 0.1), 1)
    y = reference.forward(kind, x, weight, bias, eps, 1).y
    return running, y, reference.backward(kind, x, weight, eps, 1, gy)


@pytest.mark.parametrize("path", TORCH, ids=describe)
def test_reference_agrees_with_torch(path: Path) -> None:
    record = Golden(path)
    c = record["x0"].shape[1]
    running = Running(np.zeros(c), np.ones(c)) if record.tracks() else None
    for step in STEPS:
        running, y, grads = check_reference(record, step, running)
        assert_close(y, record["y" + step])
        assert_close(grads.x, record["gx" + step])
        if "weight" in record.arrays:
            assert_close(grads.weight, record["gw" + step])
            assert_close(grads.bias, record["gb" + step])
        if running is not None and step != "_eval":
            assert_close(running.mean, record["running_mean" + step])
            assert_close(running.var, record["running_var" + step])


def layer_of(record: Golden) -> mw.BatchNorm | mw.InstanceNorm:
    cls = mw.BatchNorm if record.kind == "batch" else mw.InstanceNorm
    return cls(record["x0"].shape[1], axis=1, **record.kwargs)


GOLDEN_NAMES = {"x": "gx", "weight": "gw", "bias": "gb"}


@pytest.mark.float64
@pytest.mark.parametrize("path", TORCH, ids=describe)
def test_layers_agree_with_torch_in_float64(path: Path) -> None:
    record = Golden(path)
    layer = layer_of(record)
    for name in ("weight", "bias"):
        assert (name in layer) == (name in record.arrays)
        if name in record.arrays:
            layer[name] = mx.array(record[name])
    layer.set_dtype(mx.float64)
    for step in STEPS:
        layer.train(step != "_eval")
        y, grads = step_of(
            layer,
            mx.array(record["x" + step], mx.float64),
            mx.array(record["g" + step], mx.float64),
        )
        assert y.dtype == mx.float64
        assert_close(np.array(y), record["y" + step], rtol=1e-9)
        for name, gradient in grads.items():
            expected = record[GOLDEN_NAMES[name] + step]
            assert_close(np.array(gradient), expected, rtol=1e-9)
        if step != "_eval" and record.tracks():
            for name in ("running_mean", "running_var"):
                assert_close(np.array(layer[name]), record[name + step], rtol=1e-9)


@pytest.mark.parametrize("path", TORCH, ids=describe)
def test_layers_agree_with_torch_in_float32(path: Path) -> None:
    """Held to the error that mlx.nn would make on the same data, over all steps."""
    record = Golden(path)
    eps = record.kwargs.get("eps", 1e-5)
    layer = layer_of(record)
    for name in ("weight", "bias"):
        if name in record.arrays:
            layer[name] = mx.array(record[name])
    comparison = Comparison()
    for step in STEPS:
        layer.train(step != "_eval")
        x, gy = mx.array(record["x" + step]), mx.array(record["g" + step])
        y, grads = step_of(layer, x, gy)
        theirs = systems.baseline(record.kind, eps, 1)
        if step == "_eval" and record.tracks():
            theirs = systems.evaluation(layer.running_mean, layer.running_var, eps, 1)
        primals = [x, *(layer[name] for name in ("weight", "bias") if name in layer)]
        (base,), base_grads = mx.vjp(first_output(theirs), primals, [gy])
        comparison.add("y", y, base, record["y" + step], mx.float32)
        for (name, got), other in zip(grads.items(), base_grads, strict=True):
            truth = record[GOLDEN_NAMES[name] + step]
            comparison.add(f"grad {name}", got, other, truth, mx.float32)
        if step != "_eval" and record.tracks():
            for name in ("running_mean", "running_var"):
                # values of the order of 1, to float32's rounding of them
                assert_close(wide(layer[name]), record[name + step], rtol=1e-6, atol=1e-7)
    comparison.check()


def first_output(system: System) -> Callable[..., list[mx.array]]:
    return lambda *inputs: system(*inputs)[:1]


def mxnet_shapes() -> list[tuple[int, ...]]:
    return sorted({tuple(Golden(path).meta["shape"]) for path in MXNET})


@pytest.mark.parametrize("shape", mxnet_shapes(), ids=str)
def test_instance_norm_agrees_with_mxnet(shape: tuple[int, ...]) -> None:
    """MXNet's own float32 error takes the place of mlx.nn's, over all layers of a shape."""
    comparison = Comparison()
    records = [r for r in map(Golden, MXNET) if tuple(r.meta["shape"]) == shape]
    assert len(records) == 12
    for record in records:
        eps, axis = record.kwargs["epsilon"], record.kwargs["axis"]
        names = {"x": "x", "weight": "gamma", "bias": "beta"}
        inputs = {name: record.get(theirs) for name, theirs in names.items()}
        assert (inputs["weight"] is not None) == record.kwargs["scale"]
        assert (inputs["bias"] is not None) == record.kwargs["center"]
        given = {name: mx.array(a) for name, a in inputs.items() if a is not None}
        system = systems.ours("instance", eps, axis)

        def f(
            *values: mx.array, system: System = system, given: dict[str, mx.array] = given
        ) -> list[mx.array]:
            return system(**dict(zip(given, values, strict=True)))

        (y,), grads = mx.vjp(f, list(given.values()), [mx.array(record["g"])])
        x, weight, bias = (double(a) for a in inputs.values())
        assert x is not None
        truth = reference.forward("instance", x, weight, bias, eps, axis)
        comparison.add("y", y, mx.array(record["y"]), truth.y, mx.float32)
        g = record["g"].astype(np.float64)
        true_grads = reference.backward("instance", x, weight, eps, axis, g)
        for name, got in zip(given, grads, strict=True):
            theirs = mx.array(record["g" + names[name]])
            comparison.add(f"grad {name}", got, theirs, getattr(true_grads, name), mx.float32)
    comparison.check()
