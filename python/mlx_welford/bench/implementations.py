"""What is compared: mlx.nn and mlx_welford, each also under mx.compile; torch; and a copy.

A GroupNorm is also compared with our InstanceNorm of the same input; a layer with an activation or
a residual with our layer and MLX's own operations after it.
"""

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import mlx_welford as mw
from mlx_welford._plans import DTYPES

from . import torch_implementations
from .harness import Step, mlx_step, peak_above_inputs
from .memcpy_baseline import ThreadedCopy
from .torch_implementations import TorchImplementation
from .workloads import Case, Values

FORWARD, BACKWARD, BOTH, EVALUATION = "forward", "backward", "forward+backward", "evaluation"
MODES = (FORWARD, BACKWARD, BOTH, EVALUATION)

BASELINE = "mlx.nn"
COMPILED = "mlx.nn compiled"
OURS = "mlx_welford"
OURS_COMPILED = "mlx_welford compiled"
TORCH = "torch"
TORCH_MPS = "torch mps"
UNFUSED = "mlx_welford unfused"
INSTANCE = "InstanceNorm"
COPY = "copy"
PEERS = (BASELINE, COMPILED, OURS, OURS_COMPILED, UNFUSED, INSTANCE, TORCH, TORCH_MPS)
OF_MLX_NN = (BASELINE, COMPILED)
OF_TORCH = (TORCH, TORCH_MPS)
OF_MLX = (*OF_MLX_NN, OURS, OURS_COMPILED)
FUSED = (OURS, OURS_COMPILED)
"""These take the activation and the residual into the layer."""

RESHAPED = "mlx.nn.BatchNorm refuses 5-D input: it gets x as (N, D*H*W, C), which costs nothing"
MOVED = "mlx.nn wants channels last: it gets a transposed view of x, and its y is viewed back"

BLOCK = 2**22

View = Callable[[mx.array], mx.array]
Key = tuple[str, str]
"""Implementation and mode; the copy has no mode but its own name."""


def note(case: Case, implementation: str) -> str:
    """How the input differs for this implementation in this case; empty for most."""
    if implementation not in OF_MLX_NN:
        return ""
    if not case.channels_last:
        return MOVED
    return RESHAPED if _must_reshape(case) else ""


def modes_of(case: Case) -> tuple[str, ...]:
    """The modes to measure. Only BatchNorm does less work in evaluation than in forward."""
    return (FORWARD, BOTH, EVALUATION) if case.norm == "BatchNorm" else (FORWARD, BOTH)


def takes_part(case: Case, implementation: str) -> bool:
    """False where an implementation has no such layer, or says nothing about the case."""
    if implementation == INSTANCE:
        return case.norm == "GroupNorm"
    if implementation == UNFUSED:
        return case.has_epilogue
    return not (case.interleaved and implementation in OF_TORCH)


def absent(wanted: Sequence[str]) -> dict[str, str]:
    """The implementations that cannot run here, and why."""
    checks: dict[str, Callable[[], str | None]] = {
        COMPILED: compiler_error,
        OURS_COMPILED: compiler_error,
        TORCH: torch_implementations.missing,
        TORCH_MPS: partial(torch_implementations.missing, "mps"),
    }
    reasons = {name: check() for name, check in checks.items() if name in wanted}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def compiler_error() -> str | None:
    """Why mx.compile cannot be used here (on the CPU it calls a C++ compiler), None if it can."""
    try:
        mx.eval(mx.compile(lambda x: mx.exp(x) + x)(mx.ones((8,))))
    except RuntimeError as error:
        return str(error)
    return None


def steps(
    case: Case,
    dtype: str,
    *,
    implementations: Sequence[str] = (BASELINE, COMPILED, OURS),
    modes: Sequence[str] | None = None,
    threads: int = 1,
) -> dict[Key, Step]:
    """The steps of every implementation in every mode, all on the same input, and the copy.

    A step returns every result that a training loop needs: y, in forward+backward the gradients of
    x, residual, weight and bias (for a given cotangent, so that no loss is timed), and in training
    the new running statistics.
    """
    inputs = [_values(case, seed) for seed in range(3 if case.residual else 2)]
    mlx = MlxImplementations(case, dtype, *inputs)
    makers: dict[str, Callable[[str], Step]] = {}
    for name in implementations:
        if name in OF_TORCH:
            device = "mps" if name == TORCH_MPS else "cpu"
            torch = TorchImplementation(case, dtype, *inputs, device=device)
            makers[name] = torch.step
        else:
            makers[name] = partial(mlx.step, name)
    del inputs

    result = {
        (name, mode): make(mode)
        for mode in modes_of(case)
        if modes is None or mode in modes
        for name, make in makers.items()
    }
    result[COPY, COPY] = mlx.copy(threads)
    return result


class MlxImplementations:
    """Layers of mlx.nn and ours, all on the same arrays."""

    def __init__(
        self, case: Case, dtype: str, x: Values, cotangent: Values, *residual: Values
    ) -> None:
        self._case = case
        self._dtype = DTYPES[dtype]
        self._x, self._cotangent, *self._residual = (
            mx.array(a).astype(self._dtype) for a in (x, cotangent, *residual)
        )
        mx.eval(self._x, self._cotangent, self._residual)

    def step(self, name: str, mode: str) -> Step:
        layer = self._layer(name)
        layer.train(mode != EVALUATION)
        view, view_back = _views(self._case) if name in OF_MLX_NN else (_same, _same)
        activation = self._case.activation
        activate: View = _same if activation is None else getattr(nn, activation)

        def forward(x: mx.array, *residual: mx.array) -> mx.array:
            if name in FUSED:
                z: mx.array = layer(x, *residual)
                return z
            return activate(sum(residual, view_back(layer(view(x)))))

        def evaluate(x: mx.array, _: mx.array, *residual: mx.array) -> list[mx.array]:
            return [forward(x, *residual)]

        def train(x: mx.array, _: mx.array, *residual: mx.array) -> list[mx.array]:
            return [forward(x, *residual), *_running_statistics(layer)]

        def train_and_differentiate(
            x: mx.array, cotangent: mx.array, *residual: mx.array
        ) -> list[mx.array]:
            # In this order: that of a layer's attributes differs between classes.
            parameters = {name: layer[name] for name in ("weight", "bias") if name in layer}

            arrays = [x, *residual]

            def of_parameters(*values: mx.array) -> mx.array:
                layer.update(dict(zip(parameters, values[len(arrays) :], strict=True)))
                return forward(*values[: len(arrays)])

            outputs, gradients = mx.vjp(of_parameters, [*arrays, *parameters.values()], [cotangent])
            layer.update(parameters)
            return [*outputs, *gradients, *_running_statistics(layer)]

        run = {FORWARD: train, BOTH: train_and_differentiate, EVALUATION: evaluate}[mode]
        if name in (COMPILED, OURS_COMPILED):
            run = mx.compile(run, inputs=layer.state, outputs=layer.state)
        return mlx_step(lambda: run(self._x, self._cotangent, *self._residual))

    def copy(self, threads: int) -> Step:
        """The memcpy baseline on the CPU; on a GPU, MLX's own copy."""
        if mx.default_device() == mx.gpu:
            # mx.array of an array copies, into a new buffer since x stays alive. (mx.contiguous,
            # astype and copy.copy return x itself; x + 0 computes.)
            return mlx_step(lambda: [mx.array(self._x)])
        return Step(ThreadedCopy(self._x.nbytes, threads).run, peak_above_inputs)

    def _layer(self, name: str) -> nn.Module:
        case = self._case
        order = {"pytorch_compatible": not case.interleaved} if case.groups else {}
        if name == INSTANCE:
            layer: nn.Module = mw.InstanceNorm(case.channels, affine=case.affine, axis=case.axis)
        elif name in OF_MLX_NN:
            layer = getattr(nn, case.norm)(*case.sizes, affine=case.affine, **order)
        else:
            ours = getattr(mw, case.norm)
            options = order | ({"activation": case.activation} if name in FUSED else {})
            layer = ours(*case.sizes, affine=case.affine, axis=case.axis, **options)
        layer.set_dtype(self._dtype)
        mx.eval(layer.state)
        return layer


def _views(case: Case) -> tuple[View, View]:
    """Views of x for mlx.nn's layers, and of their y in the shape of the case."""
    if not case.channels_last:
        return lambda x: mx.moveaxis(x, case.axis, -1), lambda y: mx.moveaxis(y, -1, case.axis)
    if _must_reshape(case):
        n, c = case.shape[0], case.channels
        return lambda x: x.reshape(n, -1, c), lambda y: y.reshape(case.shape)
    return _same, _same


def _same(x: mx.array) -> mx.array:
    return x


def _running_statistics(layer: nn.Module) -> Sequence[mx.array]:
    return [layer[name] for name in ("running_mean", "running_var") if name in layer]


def _must_reshape(case: Case) -> bool:
    return case.norm == "BatchNorm" and len(case.shape) > 4


def _values(case: Case, seed: int) -> Values:
    """Normal values; a large array repeats one block of them."""
    generator = np.random.default_rng(seed)
    block = generator.standard_normal(min(case.elements, BLOCK), dtype=np.float32)
    return np.resize(block, case.shape)
