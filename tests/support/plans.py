"""Launch plans from Python: problems, their plans, and a loop that runs a plan on numpy arrays.

Buffers go by the names that they have in metal/bindings.h, without the k and in lower case: "x",
"mean", "grad_weight". bfloat16 arrays are uint16 in numpy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from epilogue import ACTIVATIONS
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from mlx_welford import _ext
from numpy.typing import NDArray
from simulator import Library, Traffic, compile_library

Array = NDArray[Any]
Arrays = dict[str, Array]

METAL_TYPES = {name: metal for name, metal, _ in _ext.element_types()}
ITEM_BYTES = {name: size for name, _, size in _ext.element_types()}
DTYPES = tuple(ITEM_BYTES)
LIMITS = _ext.limits()
BUFFER_NAMES = _ext.buffer_names()
BUFFER_INDICES = {name: index for index, name in enumerate(BUFFER_NAMES)}
UNITS = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}  # in the last place, at 1
FLOAT16_OVERFLOW = 65520.0  # the first that rounds to infinity
MOMENTS_BYTES = 16  # count, mean, tail, m2
SUMS_BYTES = 8


# ---- What the shaders declare --------------------------------------------------------------------


def without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*", "", source)


def buffer_name(enumerator: str) -> str:
    """grad_mean of kGradMean."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enumerator.removeprefix("k")).lower()


@dataclass(frozen=True)
class Parameter:
    """A buffer that a kernel declares."""

    buffer: str
    type: str  # of an element: "T", "float", "Sums"
    writable: bool


@cache
def declared_kernels() -> dict[str, tuple[Parameter, ...]]:
    """The buffers of every kernel of the source, parameters included, by its name there."""
    kernels: dict[str, tuple[Parameter, ...]] = {}
    source = without_comments(_ext.shader_source)
    for match in re.finditer(r"\[\[kernel\]\]\s+void\s+(\w+)\s*\((.*?)\)\s*\{", source, re.S):
        buffers = re.findall(
            r"(constant|const device|device)\s+(\w+)\s*[*&]\s*\w+\s*\[\[buffer\((\w+)\)\]\]",
            match[2],
        )
        assert len(buffers) == match[2].count("buffer(")
        kernels[match[1]] = tuple(
            Parameter(buffer_name(index), element, space == "device")
            for space, element, index in buffers
        )
    assert kernels
    return kernels


@cache
def shaders(*, instrumented: bool = False, contract: bool = True) -> Library:
    """Every kernel that a plan can contain, compiled for the simulator."""
    return compile_library(
        _ext.shader_source,
        [instantiation for _, instantiation in _ext.shader_kernels()],
        instrumented=instrumented,
        contract=contract,
    )


# ---- Plans ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Binding:
    """The buffer of a kernel, and the array in its place."""

    buffer: str
    array: str
    written: bool


@dataclass(frozen=True)
class Dispatch:
    kernel: str
    element: str | None
    vector: int  # elements of a vector, of a kernel that walks over an array
    pattern: str | None
    grouped: bool  # its walk is over groups of channels
    host_name: str
    pipeline: str  # its name, with the values of the function constants
    instantiation: str
    constants: dict[int, int | bool]  # function constants by their index
    buffers: tuple[Binding, ...]
    parameters: dict[str, float]
    parameter_bytes: bytes
    groups: int
    threads: int

    @property
    def columns(self) -> bool:
        return self.pattern == "columns"

    @property
    def sweeps(self) -> bool:
        return "piece" in self.parameters

    def __getitem__(self, parameter: str) -> int:
        """An integer among the parameters."""
        value = self.parameters[parameter]
        assert isinstance(value, int)
        return value


@dataclass(frozen=True)
class Plan:
    dispatches: tuple[Dispatch, ...]
    temporaries: dict[str, int]  # bytes

    @property
    def kernels(self) -> list[str]:
        return [d.kernel for d in self.dispatches]


@dataclass(frozen=True)
class Problem:
    """An array (merge, outer, reduce, inner) with statistics over merge and reduce."""

    operation: str
    geometry: tuple[int, int, int, int]
    dtype: str = "float32"
    channels: int = 1
    given: bool = False
    weight: bool = False
    bias: bool = False
    wanted: str = ""  # of the gradients "x statistics weight bias"
    aligned: bool = True
    max_threads: int = 1024
    eps: float = 1e-5
    architecture: str = ""
    groups: int = 0  # of channels that share statistics; then merge is 1
    interleaved: bool = False
    per_instance: bool = False  # weight and bias are (N, C)
    activation: str = ""
    negative_slope: float = 0.0
    auxiliary: str = ""  # what the epilogue reads: "residual", or "output" in a gradient

    def __str__(self) -> str:
        """What it differs in from the simplest problem."""
        shape = "x".join(str(length) for length in self.geometry)
        parts = [self.operation, self.dtype, shape]
        parts += [f"{self.groups} groups of {self.channels}"] if self.groups else []
        flags = ("interleaved", "given", "weight", "bias", "per_instance")
        parts += [name for name in flags if getattr(self, name)]
        parts += [f"grad {name}" for name in self.wanted.split()]
        parts += [name for name in (self.activation, self.auxiliary) if name]
        parts += [f"slope {self.negative_slope}"] if self.negative_slope else []
        parts += [] if self.aligned else ["unaligned"]
        parts += [] if self.max_threads == 1024 else [f"{self.max_threads} threads"]
        return " ".join(parts)

    @property
    def size(self) -> int:
        merge, outer, reduce, inner = self.geometry
        return merge * outer * reduce * inner

    @property
    def nbytes(self) -> int:
        return self.size * ITEM_BYTES[self.dtype]

    @property
    def slots(self) -> int:
        return self.geometry[1] * self.geometry[3]

    @property
    def members(self) -> int:
        """The channels that share a statistic."""
        return self.channels // self.groups if self.groups else 1

    @property
    def statistics(self) -> int:
        return self.slots // self.members

    @property
    def weights(self) -> int:
        """The values of weight."""
        return self.slots if self.per_instance else self.channels

    def statistic_of(self, slot: NDArray[np.int64]) -> NDArray[np.int64]:
        if not self.groups:
            return slot
        instance, channel = np.divmod(slot, self.channels)
        group = channel % self.groups if self.interleaved else channel // self.members
        statistic: NDArray[np.int64] = instance * self.groups + group
        return statistic

    @property
    def needs_y(self) -> bool:
        """Whether a gradient takes the derivative at y + residual, and finds y from x."""
        return bool(self.activation) and self.auxiliary != "output"

    @property
    def stores_g(self) -> bool:
        """Whether a gradient returns the cotangent of y, which is that of the residual."""
        return bool(self.activation) and bool(self.auxiliary)

    @property
    def wants(self) -> dict[str, bool]:
        return {name: name in self.wanted.split() for name in ("x", "statistics", "weight", "bias")}

    def plan(self, tuning: Mapping[str, int] | None = None) -> Plan:
        """With constants of csrc/gpu/tuning.h by name, where they are not to be Apple's."""
        shape: list[int] = []
        axes: list[int] = []
        levels: list[tuple[int, bool]] = [(n, i in (0, 2)) for i, n in enumerate(self.geometry)]
        if self.groups:  # of which the instances are an axis, also if there is but one
            _, outer, reduce, inner = self.geometry
            last = inner > 1 or self.channels == 1
            instances = outer if last else outer // self.channels
            positions = (reduce, True)
            channels = (self.channels, False)
            levels = [
                (instances, False),
                *((positions, channels) if last else (channels, positions)),
            ]
        for level, reduced in levels:
            for factor in _axes_of(level):
                if reduced:
                    axes.append(len(shape))
                shape.append(factor)
        return make_plan(
            self.operation,
            shape,
            axes,
            self.dtype,
            channels=self.channels,
            eps=self.eps,
            given=self.given,
            weight=self.weight,
            bias=self.bias,
            wanted=list(self.wants.values()),
            aligned=self.aligned,
            max_threads=self.max_threads,
            architecture=self.architecture,
            tuning=dict(tuning or {}),
            groups=self.groups,
            interleaved=self.interleaved,
            affine_per_instance=self.per_instance,
            activation=self.activation or None,
            negative_slope=self.negative_slope,
            auxiliary=self.auxiliary or None,
        )


def _axes_of(length: int) -> list[int]:
    """The lengths of axes that are this long together: MLX's own are below 2^31."""
    factors = []
    while length >= 1 << 31:
        assert length % (1 << 16) == 0
        factors.append(1 << 16)
        length >>= 16
    return [*factors, length]


def make_plan(*arguments: Any, **options: Any) -> Plan:
    """What `_ext.launch_plan` returns."""
    rows, temporaries = _ext.launch_plan(*arguments, **options)
    dispatches = []
    for row in rows:
        buffers = tuple(Binding(*buffer) for buffer in row["buffers"])
        dispatches.append(Dispatch(**{**row, "buffers": buffers}))
    return Plan(tuple(dispatches), temporaries)


class Runner(Protocol):
    """What can run a dispatch: the simulator's Library, or a device's."""

    def dispatch(
        self,
        kernel: str,
        buffers: Mapping[int, Array],
        *,
        grid: tuple[int, int, int],
        group: tuple[int, int, int],
        writable: set[int],
        constants: Mapping[int, Any],
        function_constants: Mapping[int, Any] | None = None,
        seed: int | None = None,
        flush_denormals: bool | None = None,
    ) -> dict[int, Traffic]: ...


def scalar(constant: int | bool) -> np.generic:
    """With the bytes that it has in Metal."""
    return np.bool_(constant) if isinstance(constant, bool) else np.int32(constant)


def run_plan(
    runner: Runner,
    plan: Plan,
    arrays: Mapping[str, Array],
    *,
    seed: int | None = None,
    flush_denormals: bool | None = None,
) -> list[dict[str, Traffic]]:
    """Runs the dispatches one after another on arrays by name, in place.

    Temporary arrays begin as NaN. Returns the traffic of each dispatch by the buffers' names.
    """
    temporary = {name: np.full(size, 0xFF, np.uint8) for name, size in plan.temporaries.items()}
    everything = {**arrays, **temporary}
    traffic = []
    for d in plan.dispatches:
        counted = runner.dispatch(
            d.host_name,
            {BUFFER_INDICES[b.buffer]: everything[b.array] for b in d.buffers},
            grid=(d.groups, 1, 1),
            group=(d.threads, 1, 1),
            writable={BUFFER_INDICES[b.buffer] for b in d.buffers if b.written},
            constants={BUFFER_INDICES["parameters"]: d.parameter_bytes},
            function_constants={i: scalar(v) for i, v in d.constants.items()},
            seed=seed,
            flush_denormals=flush_denormals,
        )
        traffic.append({BUFFER_NAMES[index]: t for index, t in counted.items()})
    return traffic


# ---- Arrays and the truth ------------------------------------------------------------------------


def rounded(values: Array, dtype: str) -> Array:
    """The values in an element type; bfloat16 as its bits."""
    if dtype == "bfloat16":
        wide = mx.array(values.astype(np.float32))
        return np.array(wide.astype(mx.bfloat16).view(mx.uint16))
    return values.astype(dtype)


def exact(a: Array, dtype: str) -> Array:
    """The values of an array of an element type in float64."""
    if dtype == "bfloat16":
        return (a.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return a.astype(np.float64)


OF_CHANNELS = {"weight", "bias", "grad_weight", "grad_bias"}
OF_CHANNELS |= {"running_mean", "running_var", "next_mean", "next_var"}
LIKE_X = {"x", "g", "out", "residual", "z", "grad_residual"}  # the arrays of x's size
# The arrays that have the elements' type; the others are float32.
OF_ELEMENTS = LIKE_X | OF_CHANNELS


def dtype_of(name: str, dtype: str) -> str:
    return dtype if name in OF_ELEMENTS else "float32"


class Example:
    """A problem with arrays for it, and what its outputs should be."""

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        self.problem = problem
        self.inputs: Arrays = {}
        self.truth: Arrays = {}
        self.terms: dict[str, float] = {}  # the largest that an output adds up, if larger than it
        self.stored: dict[str, float] = {}  # the same of gradients, where g is stored
        self._rng = np.random.default_rng(seed)
        slots = np.arange(problem.slots)
        self._statistics = problem.statistic_of(slots)
        self._weights = slots % problem.weights
        if problem.operation != "running_statistics":
            self._read()
        getattr(self, f"_{problem.operation}")()

    def _put(self, name: str, values: Array) -> Array:
        """Makes an input. Returns the values that its type holds."""
        dtype = dtype_of(name, self.problem.dtype)
        self.inputs[name] = rounded(np.asarray(values), dtype)
        return exact(self.inputs[name], dtype)

    def _put_normal(self, name: str, scale: float = 1.0) -> Array:
        """An input with a value per statistic, as a factor of x."""
        return self._factor(self._put(name, scale * self._rng.normal(size=self.problem.statistics)))

    def _of_slots(self, v: Array) -> Array:
        """A vector over slots as a factor of x."""
        _, outer, _, inner = self.problem.geometry
        factor: Array = v.reshape(1, outer, 1, inner)
        return factor

    def _factor(self, v: Array) -> Array:
        """A vector over statistics as a factor of x."""
        return self._of_slots(v[self._statistics])

    def _per_statistic(self, v: Array) -> Array:
        """The sums over each statistic of an array like x."""
        return np.bincount(self._statistics, v.sum((0, 2)).ravel(), self.problem.statistics)

    def _per_weight(self, v: Array) -> Array:
        """The sums over each value of weight of an array like x."""
        return np.bincount(self._weights, v.sum((0, 2)).ravel(), self.problem.weights)

    def _running_statistics(self) -> None:
        p, rng = self.problem, self._rng
        momentum = rng.uniform(0.1, 0.9)
        update = self._put("update", np.array([1 - momentum, momentum, rng.uniform(1, 2)]))
        for name, unbiased in (("mean", 1.0), ("var", update[2])):
            batch = self._put(name, rng.uniform(0.5, 2, size=p.statistics))
            running = self._put(f"running_{name}", rng.uniform(0.5, 2, size=p.channels))
            batch = batch.reshape(-1, p.channels).mean(0) * unbiased
            self.truth[f"next_{name}"] = update[0] * running + update[1] * batch

    def _read(self) -> None:
        """What operations on x read: x, and its statistics and parameters where they are inputs."""
        p, rng = self.problem, self._rng
        merge, _, reduce, _ = p.geometry
        self._count = merge * reduce * p.members
        x = self._put("x", 3 + 2 * rng.normal(size=p.geometry))
        only_x = {"x"}.issuperset(p.wanted.split())
        if p.operation == "normalize_gradient" and only_x and p.given and not p.needs_y:
            del self.inputs["x"]  # grad x of g alone
        self._mean = self._per_statistic(x) / self._count
        self._var = self._per_statistic((x - self._factor(self._mean)) ** 2) / self._count
        given = p.given or p.operation == "input_gradient"
        if given:
            self._mean = self._mean + rng.normal(size=p.statistics)
            self._var = rng.uniform(0.5, 2, size=p.statistics)
        if given or p.operation.endswith("_gradient"):
            self._mean = self._put("mean", self._mean)
            self._var = self._put("var", self._var)
        weight, bias = np.ones(p.weights), np.zeros(p.weights)
        if p.weight:
            weight = self._put("weight", rng.uniform(0.5, 2, size=p.weights))
        if p.bias:
            bias = self._put("bias", rng.normal(size=p.weights))
        self._weight, self._bias = (self._of_slots(v[self._weights]) for v in (weight, bias))
        self._d = x - self._factor(self._mean)
        self._r = 1 / np.sqrt(self._factor(self._var) + p.eps)

    def _moments(self) -> None:
        self.truth |= {"mean": self._mean, "var": self._var}

    def _partial_moments(self) -> None:
        count = np.full(self.problem.statistics, self._count)
        self.truth["moments"] = np.stack([count, self._mean, self._var], 1)

    def _before_activation(self) -> Array:
        """p = y + residual. Of the backward pass that reads z, the residual is no input."""
        p: Array = self._d * self._r * self._weight + self._bias
        self.terms["p"] = float(np.abs(p).max())
        if self.problem.auxiliary:
            p = p + self._put("residual", 3 * self._rng.normal(size=p.shape))
        if self.problem.auxiliary == "output":
            del self.inputs["residual"]
        return p

    def _normalize(self) -> None:
        activation, slope = self.problem.activation, self.problem.negative_slope
        p = self._before_activation()
        self.terms["out"] = self.terms["p"]
        self.truth["out"] = ACTIVATIONS[activation].value(p, slope) if activation else p
        if not self.problem.given:
            self._moments()

    def _cotangent(self) -> Array:
        """g of h, the input "g": rounded if it is stored, as in the gradient of the stored array.

        h is zero where rounding may take p to the other side of a kink.
        """
        problem = self.problem
        h = 0.5 + self._rng.normal(size=problem.geometry)
        if not problem.activation:
            return self._put("g", h)
        activation, slope = ACTIVATIONS[problem.activation], problem.negative_slope
        p = self._before_activation()
        for kink in activation.kinks:
            h[np.abs(p - kink) < 1e-5 * (1 + np.abs(p) + self.terms["p"])] = 0
        if problem.auxiliary == "output":
            p = self._put("z", activation.value(p, slope))
        g = self._put("g", h) * activation.derivative(p, slope)
        if not problem.stores_g:
            return g
        self.truth["grad_residual"] = exact(rounded(g, problem.dtype), problem.dtype)
        return self.truth["grad_residual"]

    def _input_gradient(self) -> None:
        gmean, gvar = self._put_normal("grad_mean"), self._put_normal("grad_var")
        g = self._cotangent()
        direct = self._r * self._weight * g
        through = gmean + 2 * gvar * self._d
        self.truth["out"] = direct + through
        self.terms["out"] = float(max(np.abs(direct).max(), np.abs(through).max()))

    def _moments_gradient(self) -> None:
        # Cotangents as large as what a sum over x would bring about
        gmean, gvar = (self._put_normal(f"grad_{name}", self._count) for name in ("mean", "var"))
        self.truth["out"] = (gmean + 2 * gvar * self._d) / self._count

    def _normalize_gradient(self) -> None:
        p = self.problem
        from_statistics: Array | float = 0.0
        if not p.given:
            self._moments_gradient()
            from_statistics = self.truth.pop("out")
        g = self._cotangent()
        d, r, weight = self._d, self._r, self._weight
        added = {
            "out": r * weight * g,
            "grad_mean": -g * r * weight,
            "grad_var": -g * weight * d * r**3 / 2,
            "grad_weight": g * d * r,
            "grad_bias": g,
        }
        if p.stores_g:
            self.stored = {name: float(np.abs(values).max()) for name, values in added.items()}
        if p.wants["x"]:
            gx = added["out"]
            self.terms["out"] = float(np.abs(gx).max())
            if not p.given:
                mean_g, mean_gn = (
                    self._factor(self._per_statistic(v)) / self._count
                    for v in (weight * g, weight * g * d * r)
                )
                gx = gx - r * (mean_g + d * r * mean_gn) + from_statistics
            self.truth["out"] = gx
        if p.wants["statistics"]:
            for name in ("grad_mean", "grad_var"):
                self.truth[name] = self._per_statistic(added[name])
        for name in ("weight", "bias"):
            if p.wants[name]:
                self.truth[f"grad_{name}"] = self._per_weight(added[f"grad_{name}"])

    def arrays(self) -> Arrays:
        """Copies of the inputs, and outputs that are NaN so far."""
        outputs = {
            name: rounded(np.full(values.size, np.nan), dtype_of(name, self.problem.dtype))
            for name, values in self.truth.items()
        }
        if "moments" in outputs:
            outputs["moments"] = np.full((self.problem.statistics, 4), np.nan, np.float32)
        return {name: a.copy() for name, a in self.inputs.items()} | outputs

    def check(self, arrays: Arrays) -> None:
        """The outputs are right, to rounding, and the inputs as they were.

        An output may be off by one unit in the last place of its type at its largest value, and by
        what float32 loses of its terms on the way; a gradient also by one unit of a stored g, which
        may be rounded to the other side. What float16 cannot hold is infinite.
        """
        for name, before in self.inputs.items():
            np.testing.assert_array_equal(arrays[name], before, err_msg=name)
        for name, truth in self.truth.items():
            found = arrays[name]
            if name == "moments":
                found = as_variances(found)
            dtype = dtype_of(name, self.problem.dtype)
            unit, unit_of_g = (UNITS[t] for t in (dtype, self.problem.dtype))
            largest = max(1.0, float(np.abs(truth).max()))
            terms = max(largest, self.terms.get(name, 0.0))
            if dtype == "float16":
                truth = np.where(
                    np.abs(truth) < FLOAT16_OVERFLOW, truth, np.copysign(np.inf, truth)
                )
            np.testing.assert_allclose(
                exact(found, dtype).ravel(),
                truth.ravel(),
                rtol=0,
                atol=unit * largest + unit_of_g * self.stored.get(name, 0.0) + 5e-6 * terms,
                err_msg=name,
            )


def as_variances(moments: Array) -> Array:
    """Count, mean and variance of rows of count, mean, tail and m2, in float64."""
    count, mean, tail, m2 = moments.astype(np.float64).T
    return np.stack([count, mean + tail, m2 / count], 1)


def run_example(
    runner: Runner, problem: Problem, tuning: Mapping[str, int] | None = None, **options: Any
) -> list[dict[str, Traffic]]:
    """Runs a problem's plan on an example, checks the results, and returns the traffic."""
    example = Example(problem)
    arrays = example.arrays()
    traffic = run_plan(runner, problem.plan(tuning), arrays, **options)
    example.check(arrays)
    return traffic


# ---- Random problems -----------------------------------------------------------------------------

GROUP_MOMENTS = ("moments", "moments_gradient")
THREAD_LIMITS = [32, 64, 192, 256, 448, 512, 832, 1024]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if not n % d]


@st.composite
def with_epilogues(draw: st.DrawFn, problem: Problem) -> Problem:
    """A problem that may get an epilogue, if its operation takes one."""
    if problem.operation not in ("normalize", "normalize_gradient", "input_gradient"):
        return problem
    backward = problem.operation != "normalize"
    activation = draw(st.sampled_from(["", *ACTIVATIONS]))
    slope = draw(st.sampled_from([0.01, 0.5, -0.5, 2.0])) if activation == "leaky_relu" else 0.0
    decides = bool(activation) and _ext.output_decides(activation, slope)
    auxiliary = ""
    takes = activation and problem.operation == "normalize_gradient"
    if (takes or not backward) and draw(st.booleans()):
        auxiliary = "output" if backward and decides else "residual"
    found = replace(problem, activation=activation, negative_slope=slope, auxiliary=auxiliary)
    return replace(found, bias=(not backward or found.needs_y) and draw(st.booleans()))


@st.composite
def problems(draw: st.DrawFn, most_elements: int = 300_000) -> Problem:
    """Problems such as the primitives pose, of every operation, layout and path."""
    operation = draw(st.sampled_from(_ext.operations()))
    inner = draw(st.one_of(st.just(1), st.integers(2, 70), st.integers(1, 20).map(lambda n: 8 * n)))
    room = most_elements // inner
    of_values = operation != "running_statistics"  # not of what there is one of for all of them
    merge = draw(st.one_of(st.just(1), st.integers(2, min(6, room)))) if of_values else 1
    room //= merge
    outer = draw(st.integers(1, min(40, room)))
    room = min(room // outer, (1 << 31) - 1)
    reduce = (
        draw(st.one_of(st.integers(1, min(100, room)), st.integers(1, room))) if of_values else 1
    )
    statistics = outer * inner
    given = operation.startswith("normalize") and draw(st.booleans())
    if merge > 1 or given or operation == "input_gradient":
        channels = statistics
    else:
        channels = draw(st.sampled_from(_divisors(statistics)))
    weight = "moments" not in operation and of_values and draw(st.booleans())
    of_instances = merge == 1 and operation.startswith("normalize")
    groups = 0
    if (of_instances or (merge == 1 and operation in GROUP_MOMENTS)) and draw(st.booleans()):
        last = inner > 1 or reduce == 1
        channels = inner if last else draw(st.sampled_from(_divisors(outer)))
        groups = draw(st.sampled_from(_divisors(channels)))
    wanted = []
    if operation == "normalize_gradient":
        possible = [
            "x",
            *(["statistics"] if given else []),
            *(["weight"] if weight else []),
            "bias",
        ]
        wanted = draw(st.lists(st.sampled_from(possible), min_size=1, unique=True))
    problem = Problem(
        operation,
        (merge, outer, reduce, inner),
        draw(st.sampled_from(DTYPES)),
        channels=channels,
        given=given,
        weight=weight,
        wanted=" ".join(wanted),
        aligned=draw(st.booleans()),
        max_threads=draw(st.sampled_from(THREAD_LIMITS)),
        groups=groups,
        interleaved=groups > 0 and draw(st.booleans()),
        per_instance=of_instances and not (given and not groups) and draw(st.booleans()),
    )
    return draw(with_epilogues(problem))


# So that few elements are split over several threadgroups
SPLITTING = {"sweep_threads": 32, "least_vectors": 1, "apply_vectors": 1}


def splits(problem: Problem) -> list[Dispatch]:
    """The dispatches in which several threadgroups share a reduction."""
    return [d for d in problem.plan(SPLITTING).dispatches if d.sweeps and d["pieces"] > 1]


@st.composite
def remainders(draw: st.DrawFn) -> Problem:
    """Problems, to be planned with SPLITTING, whose last piece has one position or very few.

    Or lacks so many: what a plan leaves out or takes twice at its end is in them.
    """
    problem = draw(
        problems(most_elements=20_000).filter(lambda p: p.operation != "running_statistics")
    )
    problem = replace(problem, max_threads=32)
    merge, outer, _, inner = problem.geometry
    rest = draw(st.sampled_from([1, 1, 1, 2, 3, 5, -1, -2]))
    for reduce in range(draw(st.integers(60, 4000)), 8000):
        candidate = replace(problem, geometry=(merge, outer, reduce, inner))
        if candidate.size > 200_000:
            break
        if any((reduce - rest) % d["piece"] == 0 for d in splits(candidate)):
            return candidate
    raise UnsatisfiedAssumption
