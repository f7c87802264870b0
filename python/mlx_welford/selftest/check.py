"""Runs a case on the default device and compares every result with the truth."""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn

import mlx_welford as mw
from mlx_welford._operations import operations
from mlx_welford._plans import DTYPES
from mlx_welford._status import strict_shaders
from mlx_welford.selftest import truth
from mlx_welford.selftest.cases import SLOPE, Case
from mlx_welford.selftest.truth import Activation, Arguments, Truth

__all__ = ["Checked", "Outcome", "Result", "Used", "check", "recording"]

EPS = 1e-5
MOMENTUM = 0.3  # of running statistics
VALUES = 7  # per statistic of theirs
NARROW = {"y", "grad x", "grad weight", "grad bias", "grad residual", "running_mean", "running_var"}
TEMPORARY = "the same from temporaries"
COMPOSED = 8  # times what kernels are allowed: MLX adds up many float32 values one by one
REPEATS = 20
REPEATED = "the same bits again"
KINKED = ("relu", "leaky_relu")  # of the cases' activations those that have a kink, at 0
_BITS = {2: mx.uint16, 4: mx.uint32}  # an unsigned type of so many bytes


class Result(NamedTuple):
    """One array of a case."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        """The error as a share of what is allowed."""
        if self.error == 0:
            return 0.0
        return self.error / self.allowed if self.allowed > 0 else math.inf


class Used(NamedTuple):
    """A dispatch that ran."""

    kernel: str
    threadgroups: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What came of a case or a program."""

    results: list[Result] = field(default_factory=list)
    raised: str | None = None  # the message, if there was an error

    @property
    def passed(self) -> bool:
        return self.raised is None and all(result.passed for result in self.results)

    @property
    def worst(self) -> Result:
        """The result that comes closest to what is allowed, or exceeds it most."""
        return max(self.results, key=lambda result: result.share)


@dataclass(frozen=True, kw_only=True)
class Outcome(Checked):
    case: Case
    used: tuple[Used, ...] = ()  # dispatches of the first run; none where no shaders run


def check(case: Case, repeats: int = REPEATS) -> Outcome:
    """Runs the case on the default device. A shader that does not compile fails it.

    It runs so many times, and gives the same bits each time: threads that race for memory, or that
    read it before it is written, need not be wrong every time.
    """
    arguments, cotangents = _data(case)
    used: list[Used] = []
    try:
        with strict_shaders():
            with recording(used):
                got = _run(case, arguments, cotangents)
                mx.eval(got)
                mx.synchronize()
            different = sum(
                not _same_bits(got, _run(case, arguments, cotangents)) for _ in range(1, repeats)
            )
            again = _run_on_temporaries(case, arguments, cotangents) if case.temporary else {}
    except Exception as raised:  # whatever it is belongs in the report
        words = f"{type(raised).__name__}: {raised}"
        return Outcome(case=case, raised=words, used=tuple(used))
    true = _truth(case, arguments, cotangents)
    composed = operations.backend() == "composed"
    results = []
    for name, a in got.items():
        # A batch's statistics, and gradients of given ones, are float32 whatever the type of x.
        narrow = name in NARROW
        dtype = DTYPES[case.dtype] if narrow else mx.float32
        allowed = true.allowed(name, dtype) * (COMPOSED if composed else 1)
        allowed = min(allowed, case.at_most) if name == "y" else allowed
        error = truth.error(a, true.values[name]) if a.dtype == dtype else math.inf
        results.append(Result(name, error, allowed))
    if again:
        worst = max(truth.error(a, truth.wide(got[name])) for name, a in again.items())
        results.append(Result(TEMPORARY, worst, 0.0))
    if repeats > 1:
        results.append(Result(REPEATED, different, 0.0))
    return Outcome(case=case, results=results, used=tuple(used))


@contextmanager
def recording(used: list[Used]) -> Iterator[None]:
    """Adds the dispatches that run in here."""
    operations.record_dispatches(True)
    try:
        yield
    finally:
        used += [Used(*dispatch) for dispatch in operations.take_recorded_dispatches()]
        operations.record_dispatches(False)


def _same_bits(first: Arguments, second: Arguments) -> bool:
    """Also of nan, which are never equal as numbers."""
    mx.eval(second)
    with mx.stream(mx.cpu):
        return all(
            bool(mx.array_equal(_bits(a), _bits(second[name])).item()) for name, a in first.items()
        )


def _bits(a: mx.array) -> mx.array:
    return a.view(_BITS[a.itemsize])


def _data(case: Case) -> tuple[Arguments, Arguments]:
    """Arguments and cotangents by name, the same on every device."""
    if case.operation == "running":
        return _running_data(case), {}
    dtype = DTYPES[case.dtype]
    view, _, statistics = case.view
    kept = tuple(view[a] for a in statistics)
    channels = 1 if case.operation == "moments" else case.shape[case.axis]
    with mx.stream(mx.cpu):
        keys = _keys(case)

        def normal(*shape: int) -> mx.array:
            return mx.random.normal(shape, key=next(keys))

        def uniform(low: float, high: float, shape: tuple[int, ...] = (channels,)) -> mx.array:
            return mx.random.uniform(low, high, shape, key=next(keys))

        along = [1] * len(case.shape)
        along[case.axis] = channels
        x = normal(*case.shape) * uniform(0.7, 1.5).reshape(along)
        x = x + uniform(-2, 2).reshape(along) + case.mean
        if case.nan:
            flat = mx.arange(x.size).reshape(x.shape)
            x = mx.where(flat == x.size // 2, mx.array(math.nan), x)
        arguments = {"x": x}
        cotangents = {}
        if case.operation != "moments":
            arguments |= {"weight": uniform(0.5, 1.5)} if case.weight else {}
            arguments |= {"bias": normal(channels)} if case.bias else {}
            cotangents["y"] = normal(*case.shape)
            arguments |= {"residual": 2 * normal(*case.shape)} if case.residual else {}
        arguments = {name: a.astype(dtype) for name, a in arguments.items()}
        cotangents = {name: a.astype(dtype) for name, a in cotangents.items()}
        if case.operation in ("evaluation", "tile"):
            arguments |= {"mean": normal(*kept), "var": uniform(0.5, 2, kept)}
        elif case.operation in ("batch", "shard", "moments"):
            # Of the order of the number of values, so that they weigh as much as that of y.
            n = x.size // math.prod(kept)
            cotangents |= {"mean": n * normal(*kept), "var": n * normal(*kept)}
        if not case.aligned:
            arguments["x"] = _view(arguments["x"])
        if case.activation in KINKED:
            # Rounding may take what is near the kink to its other side
            p = _truth(replace(case, activation=None), arguments, cotangents).values["y"]
            cotangents["y"] = mx.where(mx.abs(p) < 1e-3, 0, cotangents["y"])
        mx.eval(arguments, cotangents)
    return arguments, cotangents


def _keys(case: Case) -> Iterator[mx.array]:
    return iter(mx.random.split(mx.random.key(zlib.crc32(f"{case} {case.dtype}".encode())), 10))


def _running_data(case: Case) -> Arguments:
    with mx.stream(mx.cpu):
        keys = _keys(case)
        *_, channels = case.shape
        arguments = {
            "running_mean": mx.random.normal((channels,), key=next(keys)),
            "running_var": mx.random.uniform(0.5, 2, (channels,), key=next(keys)),
        }
        arguments = {name: a.astype(DTYPES[case.dtype]) for name, a in arguments.items()}
        arguments["mean"] = mx.random.normal(case.shape, key=next(keys))
        arguments["var"] = mx.random.uniform(0.5, 2, case.shape, key=next(keys))
        mx.eval(arguments)
    return arguments


def _view(a: mx.array) -> mx.array:
    """The same values, beginning one element into their memory."""
    longer = mx.concatenate([mx.zeros(1, a.dtype), a.flatten()])
    mx.eval(longer)
    return longer[1:].reshape(a.shape)


def _truth(case: Case, arguments: Arguments, cotangents: Arguments) -> Truth:
    if case.operation == "running":
        return truth.running(arguments, MOMENTUM, VALUES)
    view, channels, statistics = case.view
    shapes = {"x": view, "y": view, "residual": view}
    shapes |= {name: [view[a] for a in channels] for name in ("weight", "bias")}
    shapes |= {name: [view[a] for a in statistics] for name in ("mean", "var")}
    viewed, seen = (
        {name: a.reshape(shapes[name], stream=mx.cpu) for name, a in given.items()}
        for given in (arguments, cotangents)
    )
    if case.operation == "moments":
        true = truth.moments(viewed, seen, statistics)
    elif case.operation == "shard":
        true = truth.shard(viewed, seen, statistics, EPS)
    else:
        of_p = _activation(case)
        true = truth.normalization(viewed, seen, channels, statistics, EPS, of_p)
    for name, a in true.values.items():
        of = name.removeprefix("grad ")
        like = arguments["x"] if of == "y" else arguments.get(of)
        true.values[name] = a if like is None else a.reshape(like.shape, stream=mx.cpu)
    return true


def _activation(case: Case) -> Activation | None:
    """mlx.nn's function."""
    if case.activation is None:
        return None
    function: Activation = getattr(nn, case.activation)
    options = {"negative_slope": SLOPE} if case.activation == "leaky_relu" else {}
    return partial(function, **options)


def _run(case: Case, arguments: Arguments, cotangents: Arguments) -> Arguments:
    """Outputs and gradients by name, not yet evaluated."""
    if case.operation == "shard":
        return _run_shard(case, arguments, cotangents)
    if case.operation == "running":
        running = operations.next_running_statistics(
            **arguments, momentum=MOMENTUM, count=VALUES, caller="selftest"
        )
        return dict(zip(("running_mean", "running_var"), running, strict=True))
    of_operation = {"batch": ["y", "mean", "var"], "moments": ["mean", "var"]}
    outputs = of_operation.get(case.operation, ["y"])
    statistics = ("mean", "var") if "statistics" in case.wanted else ()
    names = [name for name in arguments if name in (*case.wanted, *statistics, "residual")]
    groups: dict[str, Any] = {"interleaved": case.interleaved, "axis": case.axis}
    options: dict[str, Any] = {"activation": case.activation, "negative_slope": SLOPE, "eps": EPS}

    def f(*values: mx.array) -> list[mx.array]:
        given: dict[str, Any] = {**arguments, **dict(zip(names, values, strict=True))}
        if case.operation == "moments":
            if case.groups:
                return list(mw.group_moments(given["x"], case.groups, **groups))
            return list(mw.moments(given["x"], case.axes))
        if case.groups:
            return [mw.group_norm(num_groups=case.groups, **given, **groups, **options)]
        if case.operation == "instance":
            return [mw.instance_norm(**given, axis=case.axis, **options)]
        return list(mw.batch_norm(**given, axis=case.axis, **options))[: len(outputs)]

    values, grads = mx.vjp(f, [arguments[name] for name in names], list(cotangents.values()))
    named = dict(zip(outputs, values, strict=True))
    return named | {f"grad {name}": g for name, g in zip(names, grads, strict=True)}


def _run_shard(case: Case, arguments: Arguments, cotangents: Arguments) -> Arguments:
    x, weight = arguments["x"], arguments.get("weight")
    caller = "SyncBatchNorm"
    message = operations.rank_moments(x, caller, case.axis)
    mean, var, count = operations.merge_ranks(message, 1, 0, caller)
    g_mean, g_var = (cotangents[name] / count for name in ("mean", "var"))
    gradient = operations.input_gradient(
        x, cotangents["y"], mean, var, weight, EPS, g_mean, g_var, caller, case.axis
    )
    return {"mean": mean, "var": var, "grad x": gradient}


def _run_on_temporaries(case: Case, arguments: Arguments, cotangents: Arguments) -> Arguments:
    """The same on copies that nobody else holds: first the outputs alone, then the gradients."""
    zero = mx.zeros(1)

    def copies(arrays: Arguments) -> Arguments:
        return {name: a + zero.astype(a.dtype) for name, a in arrays.items()}

    results = {
        name: a
        for name, a in _run(case, copies(arguments), cotangents).items()
        if not name.startswith("grad")
    }
    mx.eval(results)
    gradients = {
        name: a
        for name, a in _run(case, copies(arguments), copies(cotangents)).items()
        if name.startswith("grad")
    }
    mx.eval(gradients)
    return results | gradients
