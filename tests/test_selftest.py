"""The self-test passes, and fails where it should."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
import reference
from memory import address
from mlx_welford import _ext, selftest
from mlx_welford.__main__ import main
from mlx_welford.dispatches import kernels, normalization_plans, traffic
from mlx_welford.selftest import truth
from mlx_welford.selftest.cases import CASES, PATHS, Case, coverage
from mlx_welford.selftest.check import TEMPORARY, Outcome, _data, check
from mlx_welford.selftest.times import TimedLayer, measure
from mlx_welford.selftest.truth import Arguments
from reference import Array, Kind

Operation = Callable[..., Any]

SHORT = (
    Case("instance", (3, 37, 5)),
    Case("batch", (4, 9, 8)),
    Case("evaluation", (3, 11, 8)),
    Case("moments", (3, 5, 66), axes=(2,)),
)


# ---- It passes ----


@pytest.mark.every_backend
def test_every_case_passes() -> None:
    report = selftest.run(times=False)
    failed = [case for case in report["cases"] if not case["passed"]]
    assert not failed
    assert report["passed"]
    assert len(report["cases"]) == len(CASES)
    assert report["status"]["backend"] == _ext.backend()
    assert report["status"] == mw.status()


def test_every_kernel_is_in_the_plan_of_some_case() -> None:
    report = selftest.run(cases=(), times=False)
    everything = {name for name, _ in _ext.shader_kernels()}
    assert set(report["kernels_in_no_plan"]) == everything
    assert coverage(PATHS) == everything


def test_no_path_is_there_without_need() -> None:
    for i, case in enumerate(PATHS):
        others = coverage(
            other
            for other in PATHS[:i] + PATHS[i + 1 :]
            # A share goes the way of a batch, but for one kernel.
            if other.operation != "share" or case.operation == "share"
        )
        assert set(kernels(case.plans)) - others, f"{case} {case.dtype}"


def test_no_case_is_there_twice() -> None:
    assert len({(str(case), case.dtype) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", [c for c in CASES if not c.aligned], ids=str)
def test_views_are_not_aligned(case: Case) -> None:
    x = _data(case)[0]["x"]
    memory = address(mx.contiguous(x + 0))  # of whole arrays, which MLX itself aligns as it likes
    assert (address(x) - memory) % 16 == x.itemsize


def test_data_are_the_same_every_time() -> None:
    for case in SHORT:
        for first, second in zip(_data(case), _data(case), strict=True):
            assert first.keys() == second.keys()
            assert all(mx.array_equal(first[name], second[name]) for name in first)


# ---- Its truth is the truth ----


def numbers(arrays: Arguments) -> dict[str, Array]:
    return {name: np.array(a, dtype=np.float64) for name, a in arrays.items()}


def assert_true(values: Arguments, expected: dict[str, Array]) -> None:
    assert values.keys() == expected.keys()
    for name, want in expected.items():
        assert values[name].dtype == mx.float64
        np.testing.assert_allclose(
            np.array(values[name]), want, rtol=1e-10, atol=1e-11, err_msg=name
        )


@pytest.mark.parametrize(("kind", "axis"), list(product(("batch", "instance"), (1, 2))))
def test_truth_of_a_normalization(kind: Kind, axis: int) -> None:
    arguments, cotangents = _data(Case(kind, (3, 9, 5), axis=axis))
    axes = reference.reduction_axes(kind, 3, axis)
    a, c = numbers(arguments), numbers(cotangents)
    want = reference.forward(kind, a["x"], a["weight"], a["bias"], 1e-5, axis)
    grads = reference.backward(
        kind, a["x"], a["weight"], 1e-5, axis, c["y"], c.get("mean"), c.get("var")
    )
    assert_true(
        truth.normalization(arguments, cotangents, list(axes), axis, 1e-5).values,
        {**want._asdict(), **{f"grad {name}": g for name, g in grads._asdict().items()}},
    )


def test_truth_of_an_evaluation() -> None:
    arguments, cotangents = _data(Case("evaluation", (3, 9, 5)))
    a, c = numbers(arguments), numbers(cotangents)
    y = reference.evaluate(a["x"], a["weight"], a["bias"], a["mean"], a["var"], 1e-5, 2)
    grads = reference.evaluate_backward(a["x"], a["weight"], a["mean"], a["var"], 1e-5, 2, c["y"])
    assert_true(
        truth.evaluation(arguments, cotangents, 2, 1e-5).values,
        {"y": y, **{f"grad {name}": g for name, g in grads._asdict().items()}},
    )


def test_truth_of_moments() -> None:
    arguments, cotangents = _data(Case("moments", (3, 9, 5), axes=(0, 2)))
    a, c = numbers(arguments), numbers(cotangents)
    mean, var = reference.moments(a["x"], (0, 2))
    kept = {name: g.reshape(1, 9, 1) for name, g in c.items()}
    gx = reference.moments_backward(a["x"], (0, 2), kept["mean"], kept["var"])
    assert_true(
        truth.moments(arguments, cotangents, [0, 2]).values,
        {"mean": mean, "var": var, "grad x": gx},
    )


def test_truth_of_a_share() -> None:
    """The gradient of a batch, without what y sends through the statistics."""
    arguments, cotangents = _data(Case("share", (3, 9, 5), axis=1, bias=False))
    a, c = numbers(arguments), numbers(cotangents)
    mean, var = reference.moments(a["x"], (0, 2))
    kept = {name: c[name].reshape(1, 9, 1) for name in ("mean", "var")}
    scale = (a["weight"] / np.sqrt(var + 1e-5)).reshape(1, 9, 1)
    gx = scale * c["y"] + reference.moments_backward(a["x"], (0, 2), kept["mean"], kept["var"])
    assert_true(
        truth.share(arguments, cotangents, [0, 2], 1, 1e-5).values,
        {"mean": mean, "var": var, "grad x": gx},
    )


def test_truth_of_running_statistics() -> None:
    arguments, cotangents = _data(Case("running", (3, 5)))
    a = numbers(arguments)
    assert not cotangents
    assert_true(
        truth.running(arguments, 0.3, 7).values,
        {
            "running_mean": 0.7 * a["running_mean"] + 0.3 * a["mean"].mean(0),
            "running_var": 0.7 * a["running_var"] + 0.3 * 7 / 6 * a["var"].mean(0),
        },
    )


def test_errors_of_arrays() -> None:
    nan = float("nan")
    true = mx.array([1.0, nan, 3.0])
    assert truth.error(mx.array([1.0, nan, 3.5]), true) == 0.5
    assert truth.error(mx.array([nan, nan, 3.0]), true) == float("inf")
    assert truth.error(mx.array([1.0, 2.0, 3.0]), true) == float("inf")
    assert truth.error(mx.array([1.0, nan, float("inf")]), true) == float("inf")
    assert truth.error(mx.array([1.0, nan]), true) == float("inf")


# ---- It fails ----


def failures(outcome: Outcome) -> set[str]:
    return {result.name for result in outcome.results if not result.passed}


def plant(monkeypatch: pytest.MonkeyPatch, name: str, change: Operation) -> None:
    """Replaces an operation by `change` of the original and its arguments."""
    original = getattr(mw, name)
    monkeypatch.setattr(mw, name, lambda *a, **k: change(original, *a, **k))


def off_by_a_thousandth(f: Operation, *a: Any, **k: Any) -> Any:
    y, mean, var = f(*a, **k)
    return y + 1e-3, mean, var


def without_the_last_instance(f: Operation, x: mx.array, *a: Any, **k: Any) -> Any:
    y, _, _ = f(x, *a, **k)
    _, mean, var = f(x[:-1], *a, **k)
    return y, mean, var


def unbiased(f: Operation, *a: Any, **k: Any) -> Any:
    y, mean, var = f(*a, **k)
    return y, mean, var * (36 / 35)


def constant_statistics(f: Operation, *a: Any, **k: Any) -> Any:
    y, mean, var = f(*a, **k)
    return y, mx.stop_gradient(mean), mx.stop_gradient(var)


def wrong_type(f: Operation, *a: Any, **k: Any) -> Any:
    y, mean, var = f(*a, **k)
    return y, mean.astype(mx.float16).astype(mx.float32), var


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (off_by_a_thousandth, {"y"}),
        (without_the_last_instance, {"mean", "var", "grad x"}),
        (unbiased, {"var", "grad x"}),
        (constant_statistics, {"grad x"}),
        (wrong_type, {"mean"}),
    ],
)
def test_a_planted_error_is_found(
    monkeypatch: pytest.MonkeyPatch, change: Operation, wrong: set[str]
) -> None:
    plant(monkeypatch, "batch_norm", change)
    outcome = check(Case("batch", (4, 9, 8)))
    assert not outcome.passed
    assert wrong <= failures(outcome)
    assert outcome.worst.name in failures(outcome)
    assert "bias" not in " ".join(failures(outcome))


def test_nan_that_leaves_its_instance_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "instance_norm", lambda f, x, *a, **k: f(x, *a, **k) + 0 * x.sum())
    assert check(Case("instance", (3, 50, 8))).passed
    assert "y" in failures(check(Case("instance", (3, 50, 8), nan=True)))


def test_nan_that_is_hidden_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "instance_norm", lambda f, *a, **k: mx.nan_to_num(f(*a, **k)))
    assert "y" in failures(check(Case("instance", (3, 50, 8), nan=True)))


def test_results_that_depend_on_who_holds_x_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def change(f: Operation, *a: Any, **k: Any) -> Any:
        calls.append(a)
        y, mean, var = f(*a, **k)
        return (y if len(calls) == 1 else y * (1 + 2.0**-23)), mean, var

    plant(monkeypatch, "batch_norm", change)
    assert failures(check(Case("batch", (4, 9, 8), temporary=True))) == {TEMPORARY}


def test_what_is_raised_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def moments(*a: Any, **k: Any) -> Any:
        raise RuntimeError("a shader does not compile")

    monkeypatch.setattr(mw, "moments", moments)
    report = selftest.run(cases=SHORT, times=False)
    assert not report["passed"]
    assert report["failures"] == 1
    assert [case["raised"] for case in report["cases"]] == [
        *(None, None, None),
        "RuntimeError: a shader does not compile",
    ]
    text = selftest.to_text(report)
    assert "FAIL  moments 3x5x66 axes 2" in text
    assert "a shader does not compile" in text


def test_a_large_mean_is_held_to_a_hundredth() -> None:
    large = [case for case in CASES if case.mean == 1e5 and case.operation != "share"]
    assert {case.operation for case in large} == {"batch", "instance"}
    for case in large:
        (y,) = [result for result in check(case).results if result.name == "y"]
        assert y.allowed <= 1e-2


# ---- Times ----


@pytest.mark.parametrize("layer", ["batch", "instance"])
@pytest.mark.parametrize("affine", [True, False])
def test_times_of_a_small_layer(layer: Any, affine: bool) -> None:
    timed = TimedLayer("small", layer, (2, 6, 5, 8), affine)
    rows = measure(timed, "float32", seconds=0.0)
    assert [row["mode"] for row in rows] == ["forward", "forward+backward"]
    for row, wanted in zip(rows, [(), ("x", "weight", "bias")], strict=True):
        plans = normalization_plans(layer, timed.shape, weight=affine, bias=affine, wanted=wanted)
        assert row["planned_bytes"] == traffic(plans, 4 * 2 * 6 * 5 * 8)
        assert row["mlx_nn_ms"] > 0
        assert row["mlx_welford_ms"] > 0
        assert row["times_as_fast"] == row["mlx_nn_ms"] / row["mlx_welford_ms"]
        seconds = row["mlx_welford_ms"] / 1e3
        assert row["gigabytes_per_second"] == pytest.approx(row["planned_bytes"] / seconds / 1e9)


def test_times_stand_beside_the_bandwidth_of_the_chip() -> None:
    def text(device: str) -> str:
        report = selftest.run(cases=CASES[:1], times=False)
        row = {
            **{"model": "small", "shape": [2, 3], "dtype": "float32", "mode": "forward"},
            **dict.fromkeys(("mlx_nn_ms", "mlx_welford_ms", "times_as_fast"), 1.0),
            "gigabytes_per_second": 80.0,
        }
        status = {**report["status"], "device_name": device}
        return selftest.to_text({**report, "status": status, "times": [row]})

    assert "Apple M2 Pro has 200 GB/s by its data sheet" in text("Apple M2 Pro")
    assert "data sheet" not in text("AMD EPYC")


# ---- The command line ----


def test_the_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "mlx_welford", "selftest", "--quick", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    assert report["passed"]
    assert len(report["times"]) == 4
    assert done.stdout == selftest.to_text(report) + "\n"
    assert f"{len(CASES)} of {len(CASES)} cases passed" in done.stdout
    assert "kernels in no case's launch plan: none" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 220


def test_a_planted_error_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plant(monkeypatch, "batch_norm", off_by_a_thousandth)
    path = tmp_path / "report.json"
    assert main(["selftest", "--no-times", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert "FAIL  batch 2x1100x64 axis -1" in out
    report = json.loads(path.read_text())
    assert report["times"] == []
    assert 0 < report["failures"] < len(CASES)
    assert selftest.to_text(report) + "\n" == out


def test_a_device_that_is_not_there() -> None:
    if mx.is_available(mx.gpu):
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as stopped:
        main(["selftest", "--device", "gpu"])
    assert stopped.value.code == 2
