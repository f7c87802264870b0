"""What a rank of test_distributed.py runs: rank_worker.py TASK FOLDER."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import shares
from graphs import nodes
from mlx_welford._operations import operations
from mlx_welford.compat import torch as compat
from reference import Array
from shares import CASES, Case, Network, Results, share
from trees import leaves

GROUP = mx.distributed.init()
RANK, RANKS = GROUP.rank(), GROUP.size()


def layer_of(case: Case) -> nn.Module:
    options: dict[str, Any] = {
        "momentum": case.momentum,
        "affine": case.affine,
        "activation": case.activation,
    }
    if case.torch:
        return compat.SyncBatchNorm(case.channels, **options, process_group=GROUP)
    return mw.SyncBatchNorm(case.channels, **options, axis=case.axis)


# ---- Results -------------------------------------------------------------------------------------


def cases() -> dict[str, Array]:
    found: dict[str, Array] = {}
    for case in CASES.values():
        if case.dtype == "float64" and mx.default_device() == mx.gpu:
            continue
        part = share(case.division, RANKS, RANK)
        for name, a in shares.results(case, layer_of(case), part).items():
            found[f"{case.name}/{name}"] = a
    return found


def training() -> dict[str, Array]:
    found: dict[str, Array] = {}
    for division in ("equal", "unequal", "empty"):

        def part(division: shares.Division = division) -> slice:
            return share(division, RANKS, RANK)

        synchronised = shares.train(mw.SyncBatchNorm, part, ranks=RANKS)
        found |= {f"{division}/{name}": a for name, a in synchronised.items()}

    def equal() -> slice:
        return share("equal", RANKS, RANK)

    local = shares.train(mw.BatchNorm, equal, ranks=RANKS)
    return found | {f"local/{name}": a for name, a in local.items()}


def derivatives() -> dict[str, Array]:
    """Second derivatives and forward mode."""
    found: dict[str, Array] = {}
    for name in shares.DERIVATIVES:
        case = CASES[name]
        part = share(case.division, RANKS, RANK)
        of_case = shares.derivatives(case, layer_of(case), part)
        found |= {f"{name}/{of}": a for of, a in of_case.items()}
    return found


# ---- Graphs --------------------------------------------------------------------------------------


def counted(network: nn.Module, x: mx.array, *, training: bool = True) -> Counter[str]:
    """The nodes of a network's output and all gradients, those of x among them."""
    network.train(training)

    def loss(parameters: dict[str, object], x: mx.array) -> mx.array:
        network.update(parameters)
        return mx.square(network(x)).sum()

    parameters = network.trainable_parameters()
    value, (of_parameters, of_x) = mx.value_and_grad(loss, argnums=(0, 1))(parameters, x)
    arrays = leaves(of_parameters).values()
    found = Counter(nodes(value, of_x, *arrays))
    network.update(parameters)
    mx.eval(value, of_x, *arrays)
    return found


class Sum(nn.Module):
    """relu(norm(x) + 2 x)"""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.norm = mw.SyncBatchNorm(8, activation="relu")

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(x, x * 2)


def graphs() -> dict[str, Array]:
    """Numbers of nodes, as arrays."""
    network = Network(mw.SyncBatchNorm)
    mx.eval(network.state)
    x = mx.random.normal((0 if RANK == 0 and RANKS > 1 else 4, 8))
    mx.eval(x)
    found = {
        "training": counted(network, x),
        "evaluation": counted(network, x, training=False),
        "layer": counted(mw.SyncBatchNorm(8), x),
        "fused layer": counted(mw.SyncBatchNorm(8, activation="relu"), x),
        "fused sum": counted(Sum(), x),
    }
    kinds = sorted(set().union(*found.values()))
    table = {
        f"nodes/{name}": np.array([counts[k] for k in kinds]) for name, counts in found.items()
    }
    return table | {"kinds": np.array(kinds)}


# ---- Failures ------------------------------------------------------------------------------------


def lost() -> None:
    """Rank 1 dies between two steps."""
    layer = mw.SyncBatchNorm(4)
    mx.eval(layer(mx.random.normal((5, 4))))
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    for _ in range(3):
        mx.eval(layer(mx.random.normal((5, 4))))


def other_channels() -> None:
    mx.eval(mw.SyncBatchNorm()(mx.random.normal((5, 4 if RANK == 0 else 6))))
    time.sleep(1)  # rank 0 is to read its message before this connection ends


def other_dtype() -> None:
    x = mx.random.normal((5, 4)).astype(mx.float16 if RANK == 0 else mx.float32)
    mx.eval(mw.SyncBatchNorm(4, affine=False)(x))


def other_message() -> None:
    """Rank 1 runs another collective of the same size."""
    if RANK == 0:
        mx.eval(mw.SyncBatchNorm(4)(mx.random.normal((5, 4))))
    else:
        mx.eval(mx.distributed.all_gather(mx.random.normal((5, 4))))


def one_value() -> None:
    mx.eval(mw.SyncBatchNorm(4)(mx.random.normal((1 if RANK == 0 else 0, 4))))


def nothing() -> None:
    """No rank has anything."""
    layer = mw.SyncBatchNorm(4, momentum=None)
    y = layer(mx.zeros((0, 4)))
    mx.eval(y, layer.state)
    assert y.shape == (0, 4)
    assert layer.running_var.tolist() == [1.0] * 4
    assert layer.running_mean.tolist() == [0.0] * 4
    assert layer.num_batches_tracked.item() == 0


RESULTS: dict[str, Callable[[], Results]] = {
    "cases": cases,
    "training": training,
    "derivatives": derivatives,
    "graphs": graphs,
}
FAILURES: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (lost, other_channels, other_dtype, other_message, one_value, nothing)
}


def main(tasks: str, folder: str) -> None:
    if library := os.environ.get("SHADERS"):
        operations.simulate_with(library)
    for task in tasks.split(","):
        if task in FAILURES:
            FAILURES[task]()
        else:
            results: dict[str, Any] = RESULTS[task]()
            np.savez(Path(folder) / f"{task}{RANK}.npz", **results)


if __name__ == "__main__":
    mx.set_default_device(mx.gpu if os.environ.get("DEVICE") == "gpu" else mx.cpu)
    main(*sys.argv[1:])
