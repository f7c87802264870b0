"""The operations in small programs: compiled training, several streams, asynchronous evaluation.

A case runs one operation and waits for it. In a scenario MLX decides about order and memory. Every
scenario runs on the kernels, and again on the fallback, within ``composed()``: if both fail, the
kernels are hardly the cause. Truth is the fallback in float64 on the CPU.
"""

import math
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

import mlx_welford as mw
from mlx_welford._status import strict_shaders
from mlx_welford.selftest import truth
from mlx_welford.selftest.check import Checked, Result
from mlx_welford.selftest.truth import Arguments

__all__ = ["SCENARIOS", "ScenarioOutcome", "check_scenario"]

STEPS = 6
ROUNDS = 8
# Relative to the largest true value. Rounding adds up over the steps; if memory is read or
# overwritten too early, the error is as large as the values.
ALLOWED = 1e-4

Cast = Callable[[mx.array], mx.array]  # to the dtype in which a scenario computes


@dataclass(frozen=True, kw_only=True)
class ScenarioOutcome(Checked):
    name: str
    left_out: str | None = None  # the reason, if it was not run


def check_scenario(name: str, *, composed: bool = False) -> ScenarioOutcome:
    """Runs a scenario on the default device and compares it with float64."""
    if name == COMPILED and not _can_compile():
        return ScenarioOutcome(name=name, left_out="on a CPU mx.compile needs g++")
    try:
        with strict_shaders(), mw.composed() if composed else nullcontext():
            got = SCENARIOS[name](lambda a: a)
            mx.eval(got)
    except Exception as raised:  # any error belongs in the report
        return ScenarioOutcome(name=name, raised=f"{type(raised).__name__}: {raised}")
    with mw.composed(), mx.stream(mx.cpu):
        true = _TRUE[name](truth.wide)
        mx.eval(true)
    results = []
    for key, a in got.items():
        allowed = ALLOWED * max(truth.largest(true[key]), 1e-3)
        finite = truth.error(a, true[key]) if a.dtype == mx.float32 else math.inf
        results.append(Result(key, finite, allowed))
    return ScenarioOutcome(name=name, results=results)


def _can_compile() -> bool:
    return sys.platform != "linux" or mx.default_device() == mx.gpu or bool(shutil.which("g++"))


class _Net(nn.Module):
    """All layers behind a weight, so that the gradient of the weight passes through all.

    The weight multiplies elementwise, because MLX may compute matrix products in less than float32.
    """

    def __init__(self, key: mx.array) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weight = mx.random.normal((7, 24), key=key, stream=mx.cpu)
        self.batch = mw.BatchNorm(24)
        self.instance = mw.InstanceNorm(24, affine=True)
        self.group = mw.GroupNorm(4, 24)

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.instance(nn.relu(self.group(nn.relu(self.batch(x * self.weight)))))
        return y


def _train(cast: Cast, *, compiled: bool) -> Arguments:
    keys = mx.random.split(mx.random.key(1), 1 + 2 * STEPS)
    net = _Net(keys[0])
    net.apply(cast)
    optimizer = optim.SGD(learning_rate=0.05)
    optimizer.init(net.trainable_parameters())  # type: ignore[no-untyped-call]

    def loss(x: mx.array, target: mx.array) -> mx.array:
        return ((net(x) - target) ** 2).mean()

    def step(x: mx.array, target: mx.array) -> mx.array:
        value: mx.array
        value, gradients = nn.value_and_grad(net, loss)(x, target)
        optimizer.update(net, gradients)
        return value

    state = [net.state, optimizer.state]
    run = partial(mx.compile, inputs=state, outputs=state)(step) if compiled else step
    losses = []
    for i in range(STEPS):
        x = cast(mx.random.normal((5, 7, 24), key=keys[1 + 2 * i], stream=mx.cpu))
        target = cast(mx.random.normal((5, 7, 24), key=keys[2 + 2 * i], stream=mx.cpu))
        losses.append(run(x, target))
        mx.eval(state, losses[-1])
    return {
        "losses": mx.stack(losses),
        "weight": net.weight,
        "batch.weight": net.batch.weight,
        "batch.running_mean": net.batch.running_mean,
        "batch.running_var": net.batch.running_var,
        "instance.bias": net.instance.bias,
        "group.weight": net.group.weight,
    }


def _chain(x: mx.array, weight: mx.array, stream: mx.Stream | None = None) -> mx.array:
    """A batch and an instance normalisation, with other work between them."""
    y, _, _ = mw.batch_norm(x, weight, stream=stream)
    return mw.instance_norm(y.square(stream=stream), weight, stream=stream)


def _inputs(cast: Cast) -> tuple[list[mx.array], mx.array]:
    keys = mx.random.split(mx.random.key(2), ROUNDS + 1)
    shape = (4, 211, 24)  # takes several threadgroups and a merge of partial results
    xs = [cast(mx.random.normal(shape, key=keys[i], stream=mx.cpu)) for i in range(ROUNDS)]
    weight = cast(mx.random.uniform(0.5, 1.5, (24,), key=keys[ROUNDS], stream=mx.cpu))
    mx.eval(xs, weight)
    return xs, weight


def _second_stream(cast: Cast) -> Arguments:
    """x is made on one stream, normalised on another, and used on the first; and the reverse."""
    xs, weight = _inputs(cast)
    here = mx.default_stream(mx.default_device())
    other = mx.new_stream(here.device)
    results = {}
    for i, x in enumerate(xs):
        made, normalised = (here, other) if i % 2 == 0 else (other, here)
        doubled = mx.add(x, x, stream=made)
        y = _chain(doubled, weight, normalised)
        results[f"y {i}"] = mx.add(y, x, stream=made)
    mx.eval(results)
    return results


def _async_eval(cast: Cast) -> Arguments:
    """Work is queued while earlier work still runs, and the inputs of that are released."""
    xs, weight = _inputs(cast)
    results: Arguments = {}
    for i, x in enumerate(xs):
        (y,), (gx, gw) = mx.vjp(lambda a, w: [_chain(a, w)], [x + x, weight], [xs[i - 1] + 1])
        results |= {f"y {i}": y, f"grad x {i}": gx, f"grad weight {i}": gw}
        mx.async_eval(y, gx, gw)
        del y, gx, gw
    mx.eval(results)
    return results


COMPILED = "training under mx.compile"
SCENARIOS: dict[str, Callable[[Cast], Arguments]] = {
    "training": partial(_train, compiled=False),
    COMPILED: partial(_train, compiled=True),
    "a second stream": _second_stream,
    "mx.async_eval": _async_eval,
}
"""By name: functions from a cast of the inputs to results by name."""

_TRUE = {**SCENARIOS, COMPILED: SCENARIOS["training"]}
