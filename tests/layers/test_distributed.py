"""SyncBatchNorm between real processes: MLX's ring over loopback, every rank a process.

What the ranks compute is in shares.py and rank_worker.py. The processes of a group are started once
and save all results; tests compare these with float64, and with one process that has the whole
batch, which is held to the rule of tolerance.py elsewhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
import reference
import shares
from conftest import chosen, shaders
from mlx_welford._operations import operations
from problems import DTYPES
from ranks import TESTS, Ended, assert_all_succeeded, run_ranks
from reference import Array
from shares import BATCH, CASES, MOMENTUM, SHARES, STEPS, Case
from tolerance import largest, ulp, wide

WORKER = TESTS / "rank_worker.py"
EPS = 1e-5


class Processes(NamedTuple):
    """A group of processes, and what they run their kernels on."""

    ranks: int
    backend: str

    def __str__(self) -> str:
        return f"{self.ranks}-{self.backend}"

    def run(self, task: str, directory: Path, timeout: float = 90) -> list[Ended]:
        variables = {"DEVICE": "gpu"} if self.backend == "gpu" else {}
        if self.backend == "sim":
            variables["SHADERS"] = shaders()
        return run_ranks(
            self.ranks,
            WORKER,
            task,
            str(directory),
            directory=directory,
            timeout=timeout,
            **variables,
        )


class Results(NamedTuple):
    """What the ranks of a group saved, by task."""

    processes: Processes
    directory: Path

    @property
    def ranks(self) -> int:
        return self.processes.ranks

    def of(self, task: str) -> list[dict[str, Array]]:
        """By rank, then by name."""
        found = []
        for rank in range(self.ranks):
            with np.load(self.directory / f"{task}{rank}.npz") as arrays:
                found.append(dict(arrays))
        return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "saved" in metafunc.fixturenames:
        groups = [
            Processes(ranks, backend)
            for backend in chosen(metafunc.config)
            for ranks in ((1, 2, 3, 4) if backend == "cpu" else (2,))
        ]
        metafunc.parametrize("saved", groups, indirect=True, ids=str, scope="module")


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All results of one group."""
    processes: Processes = request.param
    directory = tmp_path_factory.mktemp("ranks")
    tasks = ["cases", "derivatives", "graphs"]
    assert_all_succeeded(processes.run(",".join(tasks), directory))
    return Results(processes, directory)


# ---- Outputs, gradients and running statistics ---------------------------------------------------


@cache
def alone(case: Case) -> dict[str, Array]:
    """Of one process that has the whole batch."""
    layer = mw.BatchNorm(
        case.channels,
        momentum=case.momentum,
        affine=case.affine,
        axis=case.axis,
        activation=case.activation,
    )
    return shares.results(case, layer, slice(None))


def activated(case: Case, p: Array) -> tuple[Array, Array]:
    """activation(p), and its derivative."""
    if case.activation is None:
        return p, np.ones_like(p)
    if case.activation == "relu":
        return np.maximum(p, 0), (p > 0).astype(p.dtype)
    sigmoid = 1 / (1 + np.exp(-p))  # silu
    return p * sigmoid, sigmoid * (1 + p * (1 - sigmoid))


@cache
def truth(case: Case) -> dict[str, Array]:
    whole = shares.data(case)
    x, gz, weight, bias, residual = (wide(a) for a in whole)
    x = x + case.handed
    if not case.affine:
        weight, bias = np.ones_like(weight), np.zeros_like(bias)
    if not case.residual:
        residual = np.zeros_like(residual)
    y = reference.forward("batch", x, weight, bias, EPS, case.axis).y
    z, slope = activated(case, y + residual)
    gy = gz * slope
    of_x = reference.backward("batch", x, weight, EPS, case.axis, gy)
    channels = case.channels
    at = reference.Running(np.zeros(channels), np.ones(channels))
    for step in range(STEPS):
        momentum = 1 / (step + 1) if case.momentum is None else MOMENTUM
        at = reference.running("batch", at, x, momentum, case.axis)
    y = reference.evaluate(x, weight, bias, at.mean, at.var, EPS, case.axis)
    found = {
        "y": z,
        "x": of_x.x,
        "running_mean": at.mean,
        "running_var": at.var,
        "evaluation": activated(case, y + residual)[0],
    }
    if case.residual:
        found["residual"] = gy
    if case.affine:
        found |= {"weight": of_x.weight, "bias": of_x.bias}
    return {name: np.asarray(a, np.float64) for name, a in found.items()}


def magnitudes(case: Case) -> dict[str, float]:
    """The largest term of the sum that a result is, since terms may cancel."""
    whole = shares.data(case)
    x, gy, weight, *_ = (wide(a) for a in whole)
    axes = reference.reduction_axes("batch", x.ndim, case.axis)
    mean, var = reference.moments(x, axes, keepdims=True)
    r = 1 / np.sqrt(var + EPS)
    w = reference.along(case.axis, x.ndim, weight if case.affine else None, 1)
    return {
        "x": largest(gy * w * r),
        "weight": largest(gy * (x - mean) * r),
        "bias": largest(gy),
    }


def together(saved: Results, case: Case) -> dict[str, Array]:
    """The results of all ranks as those of one process: concatenated, added, or all the same."""
    by_rank = [
        {n.split("/")[1]: a for n, a in arrays.items() if n.startswith(f"{case.name}/")}
        for arrays in saved.of("cases")
    ]
    found = {}
    for name in by_rank[0]:
        arrays = [results[name] for results in by_rank]
        if name in ("y", "x", "residual", "evaluation"):
            found[name] = np.concatenate(arrays)
        elif name in ("weight", "bias"):
            found[name] = np.sum(arrays, axis=0)
        else:
            for other in arrays[1:]:
                np.testing.assert_array_equal(other, arrays[0], err_msg=name)
            found[name] = arrays[0]
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_as_one_process_with_the_whole_batch(saved: Results, case: Case) -> None:
    """The largest error is at most twice that of one process, and one unit in the last place.

    A unit for each rank, where a sum over ranks adds up what each has rounded. Without kernels one
    more, since the statistics are merged in float32.
    """
    found = together(saved, case)
    terms = magnitudes(case)
    for name, true in truth(case).items():
        theirs = largest(alone(case)[name] - true)
        dtype = mx.float32 if name.startswith("running") else DTYPES[case.dtype]
        units = saved.ranks if name in ("weight", "bias") else 1
        units += operations.backend() == "composed"
        size = max(largest(true), terms.get(name, 0.0))
        allowed = 2 * theirs + units * ulp(size, dtype)
        assert found[name].shape == true.shape
        error = largest(found[name] - true)
        assert error <= allowed, f"{name}: {error:.3g}, allowed {allowed:.3g}, alone {theirs:.3g}"


@pytest.mark.parametrize("name", ["large mean", "large mean, channels first"])
def test_a_large_mean_costs_no_accuracy(saved: Results, name: str) -> None:
    """Mean 1e5, deviation about 1: a hundredth for y; the variance to a few roundings."""
    case = CASES[name]
    found, true = together(saved, case), truth(case)
    assert largest(found["y"] - true["y"]) <= 1e-2
    np.testing.assert_allclose(found["running_var"], true["running_var"], rtol=1e-6)


def test_an_average_counts_batches(saved: Results) -> None:
    assert together(saved, CASES["average"])["num_batches_tracked"] == STEPS


def test_shares_are_what_they_are_called() -> None:
    for ranks in range(2, 5):
        assert len(set(SHARES["equal"][ranks])) == 1
        assert len(set(SHARES["unequal"][ranks])) > 1
        assert 0 in SHARES["empty"][ranks]
        assert all(sum(by_ranks[ranks]) == BATCH for by_ranks in SHARES.values())


def test_ranks_have_different_means() -> None:
    """Otherwise local statistics would be nearly right."""
    case = CASES["equal"]
    x = wide(shares.data(case).x)
    halves = [x[: BATCH // 2].mean((0, 1)), x[BATCH // 2 :].mean((0, 1))]
    assert (np.abs(halves[0] - halves[1]) > x.std((0, 1))).all()


# ---- Derivatives that layers rarely see ----------------------------------------------------------


def derivatives(saved: Results, name: str) -> dict[str, Array]:
    """Those of the whole batch, of a case."""
    by_rank = [
        {of.split("/")[1]: a for of, a in arrays.items() if of.startswith(f"{name}/")}
        for arrays in saved.of("derivatives")
    ]
    return {
        of: np.sum([arrays[of] for arrays in by_rank], axis=0)
        if of == "weight"
        else np.concatenate([arrays[of] for arrays in by_rank])
        for of in by_rank[0]
    }


def test_second_derivatives(saved: Results) -> None:
    """Of the sum over the ranks of sum(gx^2): the gradient of the sum of all ranks' losses."""
    case = CASES["unequal"]
    x, gy, weight, *_ = (wide(a) for a in shares.data(case))
    found = derivatives(saved, "unequal")
    true = reference.gradient_penalty("batch", x, weight, EPS, case.axis, gy)
    for name, expected in (("x", true.x), ("gy", true.gy), ("weight", true.weight)):
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-5 * largest(expected))


@pytest.mark.parametrize("name", shares.DERIVATIVES)
@pytest.mark.since("0.32.0", "the jvp of mx.where took the tangent of another argument")
def test_derivatives_are_those_of_one_process(saved: Results, name: str) -> None:
    case = CASES[name]
    layer = mw.BatchNorm(case.channels, axis=case.axis, activation=case.activation)
    alone = shares.derivatives(case, layer, slice(None))
    found = derivatives(saved, name)
    assert found.keys() == alone.keys()
    for of, expected in alone.items():
        atol = 2e-5 * largest(expected)
        np.testing.assert_allclose(found[of], expected, rtol=0, atol=atol, err_msg=of)


@pytest.mark.since("0.32.0", "the jvp of mx.where took the tangent of another argument")
def test_forward_mode(saved: Results) -> None:
    case = CASES["unequal"]
    x, gy, weight, *_ = (wide(a) for a in shares.data(case))
    expected = reference.directional(
        lambda x: reference.forward("batch", x, weight, None, EPS, case.axis).y, [x], [gy]
    )
    # The layer's own bias is zero, its weight is that of the case.
    tangent = derivatives(saved, "unequal")["tangent"]
    np.testing.assert_allclose(tangent, expected, rtol=0, atol=2e-5 * largest(expected))


# ---- What is sent, and what is read --------------------------------------------------------------

COLLECTIVES = ("AllGather", "Sum AllReduce", "AllReduce")


def graph(saved: Results, name: str) -> Counter[str]:
    """The nodes of a graph: the same on all ranks, even if the shard of rank 0 is empty."""
    arrays = saved.of("graphs")
    for other in arrays[1:]:
        np.testing.assert_array_equal(other["kinds"], arrays[0]["kinds"])
        np.testing.assert_array_equal(other[f"nodes/{name}"], arrays[0][f"nodes/{name}"])
    table = zip(arrays[0]["kinds"], arrays[0][f"nodes/{name}"], strict=True)
    return Counter({str(kind): int(count) for kind, count in table})


def collectives(nodes: Counter[str]) -> list[int]:
    assert not [kind for kind in nodes if "All" in kind and kind not in COLLECTIVES]
    return [nodes["AllGather"], nodes["Sum AllReduce"] + nodes["AllReduce"]]


def test_one_collective_each_way_per_layer(saved: Results) -> None:
    several = saved.ranks > 1
    assert collectives(graph(saved, "layer")) == [1 * several, 1 * several]
    assert collectives(graph(saved, "training")) == [2 * several, 2 * several]


def test_evaluation_sends_nothing(saved: Results) -> None:
    assert collectives(graph(saved, "evaluation")) == [0, 0]


@pytest.mark.kernels("their nodes in MLX's graph")
@pytest.mark.parametrize("name", ["layer", "fused layer", "fused sum"])
def test_as_few_passes_as_without(saved: Results, name: str) -> None:
    """The operations that read x, whose traffic test_traffic.py counts: 2R + 1W and 4R + 1W.

    Or with relu and a residual 3R + 1W and 5R + 2W.
    """
    if saved.ranks == 1:
        expected = {"WelfordNormalize": 1, "WelfordNormalizeGradient": 1}
    else:
        expected = {
            "WelfordPartialMoments": 1,  # 1R
            "WelfordMergeRanks": 1,
            "WelfordNormalize": 1,  # 1R + 1W
            "WelfordNormalizeGradient": 1,  # 2R, without that of x
            "WelfordInputGradient": 1,  # 2R + 1W
        }
    nodes = graph(saved, name)
    assert {kind: n for kind, n in nodes.items() if kind.startswith("Welford") and n} == expected


# ---- Training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Results:
    processes = Processes(2, "cpu")
    directory = tmp_path_factory.mktemp("training")
    assert_all_succeeded(processes.run("training", directory))
    return Results(processes, directory)


def parameters(trained: Results, kind: str) -> list[dict[str, Array]]:
    return [
        {name.split("/")[1]: a for name, a in arrays.items() if name.startswith(f"{kind}/")}
        for arrays in trained.of("training")
    ]


@pytest.mark.parametrize("division", SHARES)
def test_20_steps_on_2_ranks_are_those_of_one_process(trained: Results, division: str) -> None:
    """To 1e-5 of the largest parameter of an array: some ten times the rounding of 20 steps."""
    one = shares.train(mw.BatchNorm)
    first, second = parameters(trained, division)
    assert shares.largest_difference(first, one) < 1e-5
    assert shares.largest_difference(second, first) == 0


def test_local_statistics_give_something_else(trained: Results) -> None:
    """Shows that the test above can fail."""
    one = shares.train(mw.BatchNorm)
    first, second = parameters(trained, "local")
    assert shares.largest_difference(first, one) > 0.1
    assert shares.largest_difference(second, first) > 0.01  # running statistics


# ---- When ranks disagree or are lost -------------------------------------------------------------

BOUND = 30  # seconds


def ended(ranks: int, task: str, directory: Path) -> list[Ended]:
    start = time.monotonic()
    found = Processes(ranks, "cpu").run(task, directory, timeout=BOUND)
    assert time.monotonic() - start < BOUND
    return found


@pytest.mark.since("0.32.1", "an exception while MLX evaluated on the CPU ended the process")
def test_a_lost_rank_ends_the_others(tmp_path: Path) -> None:
    first, second = ended(2, "lost", tmp_path)
    assert second.status == -9
    assert first.status == 1
    assert "RuntimeError: [ring] connection to a peer was lost" in first.text


@pytest.mark.since("0.32.1", "an exception while MLX evaluated on the CPU ended the process")
def test_another_number_of_channels(tmp_path: Path) -> None:
    found = ended(3, "other_channels", tmp_path)
    assert all(rank.status == 1 for rank in found)
    assert (
        "RuntimeError: [SyncBatchNorm] The ranks disagree: rank 0 has 4 channels of float32, "
        "rank 1 has 6 channels of float32." in found[0].text
    )


@pytest.mark.since("0.32.1", "an exception while MLX evaluated on the CPU ended the process")
def test_another_dtype(tmp_path: Path) -> None:
    for rank, process in enumerate(ended(2, "other_dtype", tmp_path)):
        assert process.status == 1
        names = ("float16", "float32")
        assert (
            f"RuntimeError: [SyncBatchNorm] The ranks disagree: rank {rank} has 4 channels of "
            f"{names[rank]}, rank {1 - rank} has 4 channels of {names[1 - rank]}." in process.text
        )


@pytest.mark.since("0.32.1", "an exception while MLX evaluated on the CPU ended the process")
def test_another_collective(tmp_path: Path) -> None:
    first, _ = ended(2, "other_message", tmp_path)
    assert first.status == 1
    assert "rank 1 sent something else. Do all ranks run the same layers" in first.text


@pytest.mark.since("0.32.1", "an exception while MLX evaluated on the CPU ended the process")
def test_one_value_on_all_ranks_together(tmp_path: Path) -> None:
    for rank in ended(2, "one_value", tmp_path):
        assert rank.status == 1
        assert (
            "RuntimeError: [SyncBatchNorm] expected more than one value per channel in training, "
            "but all ranks together have one." in rank.text
        )


def test_a_batch_that_is_empty_everywhere_changes_nothing(tmp_path: Path) -> None:
    assert_all_succeeded(ended(2, "nothing", tmp_path))


def test_a_rank_that_hangs_is_ended(tmp_path: Path) -> None:
    """Tests the helper: no test can wait for ever."""
    script = tmp_path / "hangs.py"
    script.write_text("import time\nprint('here', flush=True)\ntime.sleep(100)\n")
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] still ran after 1 seconds"):
        run_ranks(2, script, directory=tmp_path, timeout=1)
    assert time.monotonic() - start < 10


def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Tests the helper: where pytest is killed, no rank goes on spinning."""
    alive = tmp_path / "alive"  # open for writing as long as the rank lives
    os.mkfifo(alive)
    script = tmp_path / "hangs.py"
    script.write_text(
        "import sys, time\n"
        "with open(sys.argv[1], 'wb', buffering=0) as alive:\n"
        "    time.sleep(60)\n"
        "    alive.write(b'still here')\n"
    )
    start = "import sys; from pathlib import Path; from ranks import run_ranks\n"
    start += "run_ranks(1, Path(sys.argv[1]), *sys.argv[2:], directory=Path(sys.argv[2]).parent)"
    starter = subprocess.Popen(
        [sys.executable, "-c", start, str(script), str(alive)],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
    )
    with alive.open("rb") as rank:
        starter.kill()
        starter.wait()
        assert rank.read() == b""
