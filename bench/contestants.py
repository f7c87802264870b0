"""What competes: the same work by mlx.nn, by mlx.nn under mx.compile, by us; and a copy of x."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
from harness import Step
from workloads import DTYPES, Case

MODES = ("forward", "forward+backward", "evaluation")

BASELINE = "mlx.nn"
COMPILED = "mlx.nn compiled"
OURS = "mlx_welford"
COPY = "copy of x"

RESHAPED = "mlx.nn.BatchNorm refuses 5-D input: it gets x as (N, D*H*W, C), which costs nothing"


def note(case: Case, contestant: str) -> str:
    """What is special about this contestant in this case; empty for most."""
    return RESHAPED if contestant in (BASELINE, COMPILED) and _must_reshape(case) else ""


def steps(case: Case, dtype: str, mode: str, *, compiled: bool = True) -> dict[str, Step]:
    """One step for every contestant, all of them on the same input.

    A step gives every result that a training loop would go on with: y, the gradients of x, weight
    and bias in forward+backward (against a given cotangent, so that no loss is timed), and in
    training the new running statistics.
    """
    mx.random.seed(0)
    x = mx.random.normal(case.shape).astype(DTYPES[dtype])
    cotangent = mx.random.normal(case.shape).astype(DTYPES[dtype])
    mx.eval(x, cotangent)

    def step(layer: nn.Module, *, flat: bool, under_compile: bool = False) -> Step:
        def forward(x: mx.array) -> mx.array:
            given = x.reshape(x.shape[0], -1, x.shape[-1]) if flat else x
            y: mx.array = layer(given)
            return y.reshape(x.shape)

        def evaluate(x: mx.array, _: mx.array) -> list[mx.array]:
            return [forward(x)]

        def train(x: mx.array, _: mx.array) -> list[mx.array]:
            return [forward(x), *_running_statistics(layer)]

        def train_and_differentiate(x: mx.array, cotangent: mx.array) -> list[mx.array]:
            parameters = layer.trainable_parameters()

            def of_parameters(x: mx.array, *values: mx.array) -> mx.array:
                layer.update(dict(zip(parameters, values, strict=True)))
                return forward(x)

            outputs, gradients = mx.vjp(of_parameters, [x, *parameters.values()], [cotangent])
            layer.update(parameters)
            return [*outputs, *gradients, *_running_statistics(layer)]

        layer.train(mode != "evaluation")
        run = {
            "forward": train,
            "forward+backward": train_and_differentiate,
            "evaluation": evaluate,
        }[mode]
        if under_compile:
            run = mx.compile(run, inputs=layer.state, outputs=layer.state)
        return lambda: run(x, cotangent)

    flat = _must_reshape(case)
    result = {BASELINE: step(_layer(nn, case, dtype), flat=flat)}
    if compiled:
        result[COMPILED] = step(_layer(nn, case, dtype), flat=flat, under_compile=True)
    result[OURS] = step(_layer(mw, case, dtype), flat=False)
    # Asked for an array of an array, mx.array makes a copy: one read and one write of x, into a
    # buffer of its own, since x lives on and cannot be donated. (mx.contiguous, astype and
    # copy.copy give x itself; x + 0 computes as well.)
    result[COPY] = lambda: [mx.array(x)]
    return result


def compiler_error() -> str | None:
    """Why mx.compile cannot be used here (on the CPU it calls a C++ compiler), None if it can."""
    try:
        mx.eval(mx.compile(lambda x: mx.exp(x) + x)(mx.ones((8,))))
    except RuntimeError as error:
        return str(error)
    return None


def _layer(library: object, case: Case, dtype: str) -> nn.Module:
    layer: nn.Module = getattr(library, case.norm)(case.shape[-1], affine=case.affine)
    layer.set_dtype(DTYPES[dtype])
    mx.eval(layer.state)
    return layer


def _running_statistics(layer: nn.Module) -> Sequence[mx.array]:
    return [layer[name] for name in ("running_mean", "running_var") if name in layer]


def _must_reshape(case: Case) -> bool:
    return case.norm == "BatchNorm" and len(case.shape) > 4
