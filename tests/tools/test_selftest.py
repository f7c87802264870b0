"""The self-test passes, and fails where it should."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Literal

import epilogue
import groups
import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
import reference
from conftest import shaders
from memory import address
from mlx_welford import _ext, selftest
from mlx_welford.__main__ import main
from mlx_welford._plans import dispatches, kernels, normalization_plans, traffic
from mlx_welford.selftest import truth
from mlx_welford.selftest.cases import CASES, PATHS, SLOPE, Case, coverage
from mlx_welford.selftest.check import (
    REPEATED,
    TEMPORARY,
    Outcome,
    Result,
    Used,
    _data,
    _truth,
    check,
)
from mlx_welford.selftest.chips import CHIPS, nominal_bandwidth
from mlx_welford.selftest.report import LIMIT, MOST_LOGS
from mlx_welford.selftest.scenarios import SCENARIOS, check_scenario
from mlx_welford.selftest.times import TimedLayer, measure
from mlx_welford.selftest.truth import Arguments
from reference import Array, Kind
from simulator.loader import compile_library

Operation = Callable[..., Any]

SHORT = (
    Case("instance", (3, 37, 5)),
    Case("batch", (4, 9, 8)),
    Case("evaluation", (3, 11, 8)),
    Case("moments", (3, 5, 66), axes=(2,)),
)


# ---- It passes ----


@pytest.mark.every_backend
def test_every_case_passes(backend: str) -> None:
    report = selftest.run(times=False, repeats=20 if backend == "cpu" else 3)
    failed = [part for part in report["cases"] + report["scenarios"] if not part["passed"]]
    assert not failed
    assert report["passed"]
    assert len(report["cases"]) == len(CASES)
    assert [s["scenario"] for s in report["scenarios"]] == list(SCENARIOS)
    assert all(s["composed"]["passed"] for s in report["scenarios"])
    assert report["status"]["backend"] == _ext.backend()
    assert report["status"] == mw.status()
    # What ran is what status prints as the plan, in the order that MLX chose.
    ran = [bool(case["used"]) for case in report["cases"]]
    assert not any(ran) if backend == "cpu" else all(ran)
    if backend == "sim":
        assert not any(case["unplanned"] for case in report["cases"])
        pipelines: set[str] = set()
        for case, result in zip(CASES, report["cases"], strict=True):
            plans = (case.plans["forward"], case.plans.get("backward"))
            planned = [d["pipeline"] for plan in plans if plan for d in plan["dispatches"]]
            pipelines.update(planned)
            assert sorted(d["kernel"] for d in result["used"]) == sorted(planned)
        assert report["pipelines"].keys() >= pipelines
        assert all(p["threads"] == 1024 for p in report["pipelines"].values())


def test_dispatches_are_noted_only_when_asked() -> None:
    _ext.simulate_with(shaders())
    try:
        for on in (True, False):
            _ext.record_dispatches(on)
            mx.eval(mw.moments(mx.ones((3, 5)), 0))
            dispatches = _ext.take_recorded_dispatches()
            assert [d[0].partition("_float")[0] for d in dispatches] == ["moments"] * on
            assert _ext.take_recorded_dispatches() == []
    finally:
        _ext.simulate_with(None)
        _ext.record_dispatches(False)


def test_every_kernel_is_in_the_plan_of_some_case() -> None:
    report = selftest.run(cases=(), scenarios=(), times=False)
    everything = {name for name, _ in _ext.shader_kernels()}
    assert set(report["kernels_in_no_plan"]) == everything
    assert coverage(PATHS) == everything


def test_no_path_is_there_without_need() -> None:
    for i, case in enumerate(PATHS):
        others = coverage(
            other
            for other in PATHS[:i] + PATHS[i + 1 :]
            # A shard goes the way of a batch, but for one kernel.
            if other.operation != "shard" or case.operation == "shard"
        )
        assert set(kernels(case.plans)) - others, f"{case} {case.dtype}"


def test_axes_that_kernels_cannot_walk_over_are_there() -> None:
    """Channels between other axes, which move to the end and back, and kept axes in between."""
    middle = [case for case in CASES if 1 < case.axis % len(case.shape) < len(case.shape) - 1]
    assert "instance" in {case.operation for case in middle}
    assert {(0, 2), (1, 3)} <= {case.axes for case in CASES if len(case.shape) == 4}


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
    statistics = [0, axis] if kind == "instance" else [axis]
    a, c = numbers(arguments), numbers(cotangents)
    want = reference.forward(kind, a["x"], a["weight"], a["bias"], 1e-5, axis)
    grads = reference.backward(
        kind, a["x"], a["weight"], 1e-5, axis, c["y"], c.get("mean"), c.get("var")
    )
    assert_true(
        truth.normalization(arguments, cotangents, [axis], statistics, 1e-5).values,
        {**want._asdict(), **{f"grad {name}": g for name, g in grads._asdict().items()}},
    )


def test_truth_of_an_evaluation() -> None:
    arguments, cotangents = _data(Case("evaluation", (3, 9, 5)))
    a, c = numbers(arguments), numbers(cotangents)
    y = reference.evaluate(a["x"], a["weight"], a["bias"], a["mean"], a["var"], 1e-5, 2)
    grads = reference.evaluate_backward(a["x"], a["weight"], a["mean"], a["var"], 1e-5, 2, c["y"])
    assert_true(
        truth.normalization(arguments, cotangents, [2], [2], 1e-5).values,
        {"y": y, **{f"grad {name}": g for name, g in grads._asdict().items()}},
    )


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "leaky_relu"])
@pytest.mark.parametrize("operation", ["group", "tile"])
def test_truth_of_epilogues(
    operation: Literal["group", "tile"], activation: str, residual: bool
) -> None:
    case = Case(operation, (3, 9, 6), groups=3, activation=activation, residual=residual)
    arguments, cotangents = _data(case)
    a, c = numbers(arguments), numbers(cotangents)
    same = epilogue.Case(case.shape, 3, activation=activation, residual=residual, slope=SLOPE)
    y, grads = epilogue.forward(same, a), epilogue.backward(same, a, c["y"])
    true = _truth(case, arguments, cotangents)
    want = {"y": y, **{f"grad {name}": g for name, g in grads.items()}}
    for name, values in want.items():
        # MLX computes erf and rounds constants in float32
        np.testing.assert_allclose(np.array(true.values[name]), values, atol=2e-6, err_msg=name)
        assert true.allowed(name, mx.float32) > 1e-7


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("operation", ["group", "tile"])
def test_truth_of_groups(operation: Literal["group", "tile"], interleaved: bool) -> None:
    case = Case(operation, (3, 9, 6), groups=3, interleaved=interleaved)
    arguments, cotangents = _data(case)
    a, c = numbers(arguments), numbers(cotangents)
    same = groups.Case(case.shape, 3, interleaved)
    y, grads = groups.forward(same, a), groups.backward(same, a, c["y"])
    true = _truth(case, arguments, cotangents).values
    want = {"y": y, **{f"grad {name}": g for name, g in grads.items()}}
    assert_true({name: true[name] for name in want}, want)


def test_truth_of_moments() -> None:
    arguments, cotangents = _data(Case("moments", (3, 9, 5), axes=(0, 2)))
    a, c = numbers(arguments), numbers(cotangents)
    mean, var = reference.moments(a["x"], (0, 2))
    kept = {name: g.reshape(1, 9, 1) for name, g in c.items()}
    gx = reference.moments_backward(a["x"], (0, 2), kept["mean"], kept["var"])
    assert_true(
        truth.moments(arguments, cotangents, [1]).values,
        {"mean": mean, "var": var, "grad x": gx},
    )


def test_truth_of_a_share() -> None:
    """The gradient of a batch, without what y sends through the statistics."""
    arguments, cotangents = _data(Case("shard", (3, 9, 5), axis=1, bias=False))
    a, c = numbers(arguments), numbers(cotangents)
    mean, var = reference.moments(a["x"], (0, 2))
    kept = {name: c[name].reshape(1, 9, 1) for name in ("mean", "var")}
    scale = (a["weight"] / np.sqrt(var + 1e-5)).reshape(1, 9, 1)
    gx = scale * c["y"] + reference.moments_backward(a["x"], (0, 2), kept["mean"], kept["var"])
    assert_true(
        truth.shard(arguments, cotangents, [1], 1e-5).values,
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
        return (y if len(calls) <= 20 else y * (1 + 2.0**-23)), mean, var

    plant(monkeypatch, "batch_norm", change)
    assert failures(check(Case("batch", (4, 9, 8), temporary=True), 20)) == {TEMPORARY}


def test_bits_that_change_once_in_twenty_runs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def change(f: Operation, x: mx.array, *a: Any, **k: Any) -> Any:
        calls.append(a)
        y = f(x, *a, **k)
        return y * (1 + 2.0**-23) if len(calls) == 13 else y

    plant(monkeypatch, "instance_norm", change)
    outcome = check(Case("instance", (3, 50, 8), nan=True))
    assert failures(outcome) == {REPEATED}
    assert [r.error for r in outcome.results if r.name == REPEATED] == [1]
    assert len(calls) == 20


def late(f: Operation, x: mx.array, *a: Any, **k: Any) -> Any:
    """As if x were read before the operation that writes it is done: its last part is not there."""
    return f(mx.where(mx.arange(x.size).reshape(x.shape) < x.size * 15 // 16, x, 0), *a, **k)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if not name.startswith("training")])
def test_programs_find_what_is_read_too_early(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert check_scenario(name).passed
    with monkeypatch.context() as patch:
        on_the_kernels = _ext.normalize

        def normalize(x: mx.array, *a: Any, **k: Any) -> Any:
            return late(on_the_kernels, x, *a, **k) if x.dtype == mx.float32 else plain(x, *a, **k)

        plain = on_the_kernels
        patch.setattr(_ext, "normalize", normalize)
        wrong = check_scenario(name)
        assert not wrong.passed
        assert not all(result.passed for result in wrong.results)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("training")])
def test_programs_find_wrong_training(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    call = mw.BatchNorm.__call__

    def wrong(self: mw.BatchNorm, x: mx.array) -> mx.array:
        y: mx.array = call(self, x)
        return y + 0.05 if x.dtype == mx.float32 else y

    monkeypatch.setattr(mw.BatchNorm, "__call__", wrong)
    outcome = check_scenario(name)
    assert "losses" in {result.name for result in outcome.results if not result.passed}


def test_a_program_that_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*a: Any, **k: Any) -> Any:
        raise RuntimeError("no such stream")

    monkeypatch.setattr(mx, "new_stream", raises)
    report = selftest.run(cases=(), scenarios=["mx.async_eval", "a second stream"], times=False)
    assert (report["passed"], report["failures"]) == (False, 1)
    line = "a second stream: FAIL  RuntimeError: no such stream; composed: FAIL  RuntimeError: no"
    assert line in selftest.to_text(report)


def test_compiled_training_on_a_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sys.platform", "linux")
    report = selftest.run(cases=(), scenarios=["training under mx.compile"], times=False)
    assert report["passed"]
    text = selftest.to_text(report)
    assert "not run: on a CPU mx.compile needs g++" in text
    assert "0 of 0 programs" in text


def test_what_is_raised_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def moments(*a: Any, **k: Any) -> Any:
        raise RuntimeError("a shader does not compile")

    monkeypatch.setattr(mw, "moments", moments)
    report = selftest.run(cases=SHORT, scenarios=(), times=False)
    assert not report["passed"]
    assert report["failures"] == 1
    assert [case["raised"] for case in report["cases"]] == [
        *(None, None, None),
        "RuntimeError: a shader does not compile",
    ]
    text = selftest.to_text(report)
    assert (
        "moments 3x5x66 axes 2 float32: FAIL  RuntimeError: a shader does not compile; "
        "composed of MLX's operations it fails, too; float_" in text
    )


def log_of(kernel: str, size: int) -> str:
    """Like what Apple's compiler says, with a beginning and an end of its own."""
    middle = "".join(f"program_source:{i}:7: note: expanded from here\n" for i in range(size // 45))
    return f"program_source:3:1: error: no {kernel}\n{middle}1 error generated for {kernel}."


@pytest.fixture
def shaders_that_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The logs: of one of them there are as many copies as calls."""
    logs = [log_of("moments", 70_000), log_of("normalize", 40_000), log_of("short", 900)]

    def raises(log: str) -> Operation:
        def operation(*a: Any, **k: Any) -> Any:
            raise RuntimeError(f"mlx_welford: a shader does not compile.\n{log}")

        return operation

    for name, log in zip(("moments", "batch_norm", "instance_norm"), logs, strict=True):
        monkeypatch.setattr(mw, name, raises(log))
    monkeypatch.setattr(_ext, "pipelines", dict)  # whatever ran before in this process
    return logs


def test_every_log_of_the_compiler_is_there_once(shaders_that_do_not_compile: list[str]) -> None:
    report = selftest.run(cases=CASES, scenarios=(), times=False)
    assert not report["passed"]
    assert len(report["logs"]) == 3
    for log in shaders_that_do_not_compile:
        assert sum(log in kept for kept in report["logs"]) == 1
    text = selftest.to_text(report)
    assert len(text) < LIMIT
    assert len(text) > LIMIT - 10_000  # as much as there is room for
    moments, normalize, short = shaders_that_do_not_compile
    assert text.count(short) == 1
    for log in (moments, normalize):
        assert log not in text
        assert text.count(log[:2000]) == 1
        assert text.count(log[-2000:]) == 1
    assert text.count("characters the middle is left out") == 2
    assert f"({len(report['logs'][1]):,} characters)" in text
    assert "batch 2x1100x64 axis -1 float32: FAIL  RuntimeError, log 2: program_source:3:1" in text


def test_the_text_fits_an_issue_whatever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    report_module = sys.modules["mlx_welford.selftest.report"]
    names = ("y", "mean", "var", "grad x", "grad weight", "grad bias", "the same bits again")
    results = [Result(name, float("inf"), 1.234e-5) for name in names]
    used = tuple(Used("fused_normalize_bfloat_8_Columns", 123456, i) for i in range(1, 1024, 100))
    pipelines = {name: (1024, 32768, 123.4) for name, _ in _ext.shader_kernels()}

    def everything_fails(case: Case, repeats: int = 20) -> Outcome:
        number = CASES.index(case)
        raised = f"RuntimeError: {log_of(str(number), 30_000)}" if number % 2 else None
        return Outcome(case=case, results=[] if raised else results, raised=raised, used=used)

    monkeypatch.setattr(report_module, "check", everything_fails)
    monkeypatch.setattr(_ext, "pipelines", lambda: pipelines)
    pieces: list[str] = []
    report = selftest.run(cases=2 * CASES, times=False, write=pieces.append)
    assert report["failures"] == 2 * len(CASES)
    assert len(report["logs"]) == len(CASES) // 2 > MOST_LOGS
    text = selftest.to_text(report)
    assert "".join(pieces) == text
    assert len(text) < LIMIT
    assert f"{len(report['logs']) - MOST_LOGS} more logs are in the JSON file" in text
    assert all(str(case) in text for case in CASES)
    assert text.count("program_source:3:1: error: no 1\n") == 1


def test_pipelines_and_what_ran_instead_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU where a pipeline allows fewer threads: the plan was made again."""
    report_module = sys.modules["mlx_welford.selftest.report"]
    used = (
        Used("fused_normalize_float_1_Columns", 6, 512),
        Used("parameter_gradients_float", 1, 32),
    )

    def smaller(case: Case, repeats: int = 20) -> Outcome:
        return Outcome(case=case, results=[Result("y", 0.0, 1.0)], used=used)

    monkeypatch.setattr(report_module, "check", smaller)
    monkeypatch.setattr(_ext, "pipelines", lambda: {used[0].kernel: (576, 4096, 41.25)})
    report = selftest.run(cases=SHORT[:1], scenarios=(), times=False)
    assert report["cases"][0]["used"][0] == used[0]._asdict()
    lines = selftest.to_text(report).splitlines()
    (line,) = [line for line in lines if line.startswith("instance 3x37x5")]
    assert line.endswith("; ran instead: fused_normalize_float_1_Columns 6 x 512")
    (line,) = [line for line in lines if line.startswith(used[0].kernel)]
    assert line.split() == [used[0].kernel, "576", "4096", "41.2"]


def test_a_failure_on_a_gpu_asks_for_metals_validation() -> None:
    report = selftest.run(cases=(), scenarios=(), times=False)
    on_gpu = {**report, "status": {**report["status"], "device": "gpu"}}
    hint = "MTL_DEBUG_LAYER=1 MTL_SHADER_VALIDATION=1 python -m mlx_welford selftest --no-times"
    assert hint not in selftest.to_text(on_gpu)
    assert hint in selftest.to_text({**on_gpu, "failures": 1})
    assert hint in selftest.to_text({**on_gpu, "finished": False})
    assert hint not in selftest.to_text({**report, "failures": 1})


def test_the_log_of_the_status_is_not_told_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    report_module = sys.modules["mlx_welford.selftest.report"]
    log = log_of("moments", 5000)
    failed = {"metal_language": "3.2", "shaders_compile": False, "shaders": f"a shader\n{log}"}
    monkeypatch.setattr(report_module, "of_shaders", lambda: dict(failed))

    def moments(*a: Any, **k: Any) -> Any:
        raise RuntimeError(f"a shader\n{log}")

    monkeypatch.setattr(mw, "moments", moments)
    text = selftest.to_text(selftest.run(cases=SHORT, scenarios=(), times=False))
    assert text.count(log) == 1
    assert "log 1: program_source:3:1: error: no moments" in text


def test_a_large_mean_is_held_to_a_hundredth() -> None:
    large = [case for case in CASES if case.mean == 1e5 and case.operation != "shard"]
    assert {case.operation for case in large} == {"batch", "instance", "group"}
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


def test_a_time_is_of_one_application_without_the_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock that an evaluation moves by 5 ms, each application by 2 more, and mlx.nn's by 6."""
    times = sys.modules["mlx_welford.selftest.times"]
    clock = [0.0]
    pending = [0.0]

    def evaluate(*trees: Any) -> None:
        clock[0] += 0.005 + pending[0]
        pending[0] = 0.0

    def taking(seconds: float, f: Operation) -> Operation:
        def call(*a: Any, **k: Any) -> Any:
            pending[0] += seconds
            return f(*a, **k)

        return call

    monkeypatch.setattr(times.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(mx, "eval", evaluate)
    monkeypatch.setattr(mx, "negative", taking(0.001, mx.negative))
    monkeypatch.setattr(mw.BatchNorm, "__call__", taking(0.002, mw.BatchNorm.__call__))
    monkeypatch.setattr(nn.BatchNorm, "__call__", taking(0.006, nn.BatchNorm.__call__))
    # mlx_welford's layer is one of mlx.nn's and calls its own __call__ alone.
    for row in measure(TimedLayer("small", "batch", (2, 6, 5, 8)), "float32", seconds=0.0):
        assert row["empty_ms"] == pytest.approx(5)
        assert row["copy_ms"] == pytest.approx(1)
        assert row["mlx_welford_ms"] == pytest.approx(2)
        assert row["mlx_nn_ms"] == pytest.approx(6)
        assert row["applications"]["mlx_welford"] > 4
        assert row["copy_gigabytes_per_second"] == pytest.approx(2 * 4 * 480 / 1e-3 / 1e9)
        assert row["share_of_copy"] == pytest.approx(row["planned_bytes"] / (2 * 4 * 480) / 2)


def test_applications_are_one_upon_the_other() -> None:
    """The last y and gradient of three are those of three layers, not of one."""
    times = sys.modules["mlx_welford.selftest.times"]
    evaluated: list[Any] = []
    layer = mw.BatchNorm(4)
    layer.weight = mx.array([1.5, 0.5, 2.0, 1.0])
    x, g = mx.random.normal((6, 4)), mx.random.normal((6, 4))
    step = times._applications(layer, x, g, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "eval", lambda *trees: evaluated.append(trees))
        step(3)
    y, gradient, small, _ = evaluated[0]

    weight, bias = layer.weight, layer.bias

    def layers(x: mx.array) -> list[mx.array]:
        for _ in range(3):
            x = mw.batch_norm(x, weight, bias)[0]
        return [x]

    (want,) = layers(x)
    assert mx.allclose(y, want, atol=1e-5)
    assert len(small) == 6
    h, inputs = g, [x, *(mw.batch_norm(x, weight, bias)[0] for _ in range(1))]
    inputs.append(mw.batch_norm(inputs[-1], weight, bias)[0])
    for a in inputs:
        _, (h,) = mx.vjp(lambda v: [mw.batch_norm(v, weight, bias)[0]], [a], [h])
    assert mx.allclose(gradient, h, atol=1e-5)


def test_times_that_raise_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    report_module = sys.modules["mlx_welford.selftest.report"]
    row = with_times("Apple M1")["times"][0]

    def fails(timed: TimedLayer, dtype: str, *, seconds: float) -> list[dict[str, Any]]:
        if timed.layer == "instance":
            raise RuntimeError("[malloc] Unable to allocate 10 bytes.")
        return [row]

    monkeypatch.setattr(report_module, "measure", fails)
    pieces: list[str] = []
    report = selftest.run(cases=(), scenarios=(), quick=True, write=pieces.append)
    assert (report["passed"], report["failures"], report["finished"]) == (False, 1, True)
    assert report["times"] == [row]
    text = selftest.to_text(report)
    assert "".join(pieces) == text
    said = "times of CycleGAN, residual blocks, float32: RuntimeError: [malloc] Unable to allocate"
    assert said in text


def with_times(chip: str, gpu_cores: int | None = None) -> dict[str, Any]:
    """A report of this chip, whose GPU took the times."""
    report = selftest.run(cases=CASES[:1], scenarios=(), times=False)
    rows = measure(TimedLayer("small", "batch", (2, 6, 5, 8)), "float32", seconds=0.0)
    for row in rows:
        row |= {"gigabytes_per_second": 80.0, "copy_gigabytes_per_second": 100.0}
        row |= {"share_of_copy": 0.8, "times_as_fast": 3.25}
    on_metal = {"device": "gpu", "backend": "metal", "device_name": chip}
    facts = {**report["status"], **on_metal, "chip": chip, "gpu_cores": gpu_cores}
    nominal = nominal_bandwidth(chip, gpu_cores)
    return {**report, "status": facts, "times": rows, "nominal_gigabytes_per_second": nominal}


def test_times_stand_beside_the_bandwidth_of_the_chip() -> None:
    text = selftest.to_text(with_times("Apple M2 Pro"))
    assert "Apple M2 Pro has 200 GB/s by its data sheet" in text
    lines = [line for line in text.splitlines() if line.startswith("small ")]
    assert [line.split()[-3:] for line in lines] == [["80", "80%", "40%"]] * 2
    assert "data sheet" not in selftest.to_text(with_times("AMD EPYC"))
    assert "MLX's own operations, since" not in text
    composed = {**with_times("Apple M2"), "backend_of_times": "composed"}
    assert "these are times of MLX's own operations, since" in selftest.to_text(composed)


def test_what_is_published(tmp_path: Path) -> None:
    report = with_times("Apple M3 Max", 40)
    path = selftest.publish(report, tmp_path / "results")
    assert path == tmp_path / "results" / "apple-m3-max-40-cores.json"
    kept = json.loads(path.read_text())
    assert kept["date"] == report["date"][:10]
    assert (kept["chip"], kept["gpu_cores"], kept["backend"]) == ("Apple M3 Max", 40, "metal")
    assert kept["mlx_welford"] == mw.__version__
    assert (kept["cases"], kept["cases_passed"], kept["failed"]) == (1, 1, [])
    assert kept["nominal_gigabytes_per_second"] == 400
    assert kept["times"] == report["times"]
    assert not {"variables", "model", "python"} & kept.keys()

    failing = [{**report["cases"][0], "passed": False}, *report["cases"]]
    kept = json.loads(selftest.publish({**report, "cases": failing}, tmp_path).read_text())
    assert (kept["cases"], kept["cases_passed"]) == (2, 1)
    assert kept["failed"] == [f"{CASES[0]} {CASES[0].dtype}"]


@pytest.mark.parametrize("lacks", [{"finished": False}, {"times": []}])
def test_what_is_not_published(tmp_path: Path, lacks: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be finished and have times"):
        selftest.publish({**with_times("Apple M1"), **lacks}, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("chip", "cores", "nominal"),
    [
        ("Apple M1", 8, 68.25),
        ("Apple M3 Max", 30, 300),
        ("Apple M3 Max", 40, 400),
        ("Apple M4 Max", None, 546),
        ("Apple M5 Max", 32, 460),
        ("M2 Pro", None, 200),
        ("Apple M9", 8, None),
        ("Apple M4 Pro Max", None, None),
        ("Apple M", None, None),
        ("Apple Paravirtual device", None, None),
        ("AMD EPYC", None, None),
    ],
)
def test_nominal_bandwidth(chip: str, cores: int | None, nominal: float | None) -> None:
    assert nominal_bandwidth(chip, cores) == nominal


def test_every_chip_has_a_bandwidth() -> None:
    assert len(CHIPS) == len(set(CHIPS)) >= 20
    assert all(50 < (nominal_bandwidth(f"Apple {chip}") or 0) < 2000 for chip in CHIPS)


def test_a_wider_chip_of_a_generation_has_more_bandwidth() -> None:
    """Pro less than Max; an Ultra is two Max."""
    for generation in ("M1", "M2", "M3", "M4", "M5"):
        variants = [f"{generation}{variant}" for variant in ("", " Pro", " Max")]
        speeds = [nominal_bandwidth(chip) or 0 for chip in variants]
        assert speeds == sorted(set(speeds)), generation
        if ultra := nominal_bandwidth(f"{generation} Ultra"):
            assert ultra == pytest.approx(2 * speeds[-1], rel=0.03)


# ---- The command line ----


def run_in_process(
    program: str, folder: Path, *arguments: str, backend: str = "cpu", library: str | None = None
) -> subprocess.CompletedProcess[str]:
    """`program` and then the self-test, in a process of its own, on a backend."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("MLX_WELFORD_")}
    if backend == "sim":
        environment |= {"MLX_WELFORD_BACKEND": "sim", "MLX_WELFORD_SIMULATOR": library or shaders()}
    main = "import sys, mlx_welford.__main__ as m; sys.exit(m.main(['selftest', *sys.argv[1:]]))"
    return subprocess.run(
        [sys.executable, "-c", f"{program}\n{main}", "--device", "cpu", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlx_welford", "selftest", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "mlx-welford-selftest.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["mlx-welford-selftest.json"]
    assert report["passed"]
    assert report["finished"]
    assert len(report["times"]) == 4
    assert done.stdout == selftest.to_text(report) + "\n"
    assert f"{len(CASES)} of {len(CASES)} cases and 4 of 4 programs passed" in done.stdout
    assert "kernels in no case's launch plan: none" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 240
    assert len(done.stdout) < LIMIT // 2
    assert "mlx-welford-selftest.json has all that happens" in done.stderr


CRASH = """
import ctypes
import mlx_welford as mw
original = mw.batch_norm
def batch_norm(x, *a, **k):
    if x.shape == (3, 11, 33):
        {crash}
    return original(x, *a, **k)
mw.batch_norm = batch_norm
"""


@pytest.mark.parametrize("backend", ["cpu", "sim"])
@pytest.mark.parametrize(
    ("crash", "number", "said"),
    [
        ("ctypes.string_at(0)", signal.SIGSEGV, "Fatal Python error: Segmentation fault"),
        ("ctypes.CDLL(None).abort()", signal.SIGABRT, "Fatal Python error: Aborted"),
        ("import os; os.kill(os.getpid(), 9)", signal.SIGKILL, ""),
    ],
)
def test_a_crash_leaves_what_was_done_and_names_what_was_begun(
    tmp_path: Path, crash: str, number: signal.Signals, said: str, backend: str
) -> None:
    if backend == "sim" and sys.platform != "linux":
        pytest.skip("the simulator is for Linux")
    done = run_in_process(CRASH.format(crash=crash), tmp_path, "--no-times", backend=backend)
    assert done.returncode == -number
    assert said in done.stderr
    before = next(i for i, c in enumerate(CASES) if c.shape == (3, 11, 33))
    case = str(CASES[before])
    assert done.stdout.endswith(f"\n{case} float32: ")
    assert done.stdout.count(": ok  ") == before

    path = tmp_path / "mlx-welford-selftest.json"
    report = json.loads(path.read_text())
    assert report["running"] == f"{case} float32"
    assert not report["finished"]
    assert not report["passed"]
    assert [c["case"] for c in report["cases"]] == [str(c) for c in CASES[:before]]
    assert report["status"]["backend"] == ("simulator" if backend == "sim" else "cpu")
    assert bool(report["pipelines"]) is (backend == "sim")


def test_a_crash_of_the_first_kernel_leaves_the_machine(tmp_path: Path) -> None:
    program = """
import ctypes, sys
import mlx_welford.__main__
sys.modules["mlx_welford.selftest.report"].of_shaders = lambda: ctypes.string_at(0)
"""
    done = run_in_process(program, tmp_path)
    assert done.returncode == -signal.SIGSEGV
    report = json.loads((tmp_path / "mlx-welford-selftest.json").read_text())
    assert report["running"] == "the first kernels, for the status"
    assert f"chip               {report['status']['chip']}\n" in done.stdout


def test_the_text_of_a_run_that_crashed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports: list[str] = []

    def save(report: dict[str, Any]) -> None:
        reports.append(json.dumps(report))

    selftest.run(cases=SHORT, scenarios=["training"], times=False, save=save)
    for text in reports:
        path = tmp_path / "report.json"
        path.write_text(text)
        assert main(["selftest", "--show", str(path)]) == 0
        report = json.loads(text)
        out = capsys.readouterr().out
        assert out.count(": ok  ") == len(report["cases"]) + 2 * len(report["scenarios"])
        if report["finished"]:
            assert "stopped" not in out
        else:
            assert f"stopped at: {report['running']}\n" in out
            assert f"machine            {report['status']['machine']}\n" in out
    assert "shaders" not in json.loads(reports[0])["status"]


def test_a_long_log_in_a_process_of_its_own(tmp_path: Path) -> None:
    program = """
import mlx_welford as mw
def moments(*a, **k):
    raise RuntimeError("a shader does not compile.\\nprogram_source:3:1: error: x\\n" + 70000 * "y")
mw.moments = moments
"""
    done = run_in_process(program, tmp_path, "--no-times")
    assert done.returncode == 1
    report = json.loads((tmp_path / "mlx-welford-selftest.json").read_text())
    assert done.stdout == selftest.to_text(report) + "\n"
    assert len(done.stdout) < LIMIT
    of_moments = [case for case in CASES if case.operation == "moments" and not case.groups]
    assert report["failures"] == len(of_moments)
    assert report["finished"]
    assert len(report["logs"]) == 1
    assert report["logs"][0].endswith(70000 * "y")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the simulator is for Linux")
def test_a_kernel_that_does_not_compile_fails_the_cases_that_need_it(tmp_path: Path) -> None:
    missing = "fused_gradient_float_4_Columns"
    others = [text for name, text in _ext.shader_kernels() if name != missing]
    library = str(compile_library(_ext.shader_source, others).path)
    done = run_in_process("", tmp_path, "--no-times", backend="sim", library=library)
    assert done.returncode == 1
    report = json.loads((tmp_path / "mlx-welford-selftest.json").read_text())
    assert done.stdout == selftest.to_text(report) + "\n"
    failed = [case for case in report["cases"] if not case["passed"]]
    assert [c["case"] for c in failed] == [str(c) for c in CASES if missing in kernels(c.plans)]
    assert failed
    assert all(case["composed_passed"] for case in failed)
    assert all("does not compile" in case["raised"] for case in failed)
    (log,) = {log for log in report["logs"] if missing in log}
    assert done.stdout.count(f"there is no kernel '{missing}'") > 0
    assert log.startswith("mlx_welford: a shader does not compile.")
    planned = {d["pipeline"]: d["kernel"] for case in CASES for d in dispatches(case.plans)}
    made = {name for name, kernel in planned.items() if kernel != missing}
    assert made <= report["pipelines"].keys()
    assert not any(name.startswith(missing) for name in report["pipelines"])


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = selftest.run
    monkeypatch.setattr(selftest, "run", lambda **k: run(cases=SHORT, scenarios=(), **k))
    path = tmp_path / "no folder" / "report.json"
    assert main(["selftest", "--no-times", "--json", str(path)]) == 0
    assert capsys.readouterr().err.count("cannot be written") == 1
    monkeypatch.chdir(tmp_path)
    assert main(["selftest", "--no-times", "--no-json"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_option_to_publish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = sys.modules["mlx_welford.selftest.report"]
    small = (TimedLayer("small", "batch", (2, 6, 5, 8)),)
    monkeypatch.setattr(times, "QUICK_LAYERS", small)
    monkeypatch.chdir(tmp_path)
    assert main(["selftest", "--quick", "--no-json", "--publish"]) == 0
    (path,) = (tmp_path / "results").iterdir()
    assert f"wrote {path.relative_to(tmp_path)}" in capsys.readouterr().err
    kept = json.loads(path.read_text())
    assert kept["cases_passed"] == kept["cases"] == len(CASES)
    with pytest.raises(SystemExit) as stopped:
        main(["selftest", "--publish", "--no-times"])
    assert stopped.value.code == 2


def test_a_planted_error_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plant(monkeypatch, "batch_norm", off_by_a_thousandth)
    path = tmp_path / "report.json"
    assert main(["selftest", "--no-times", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert "batch 2x1100x64 axis -1 float32: FAIL  y " in out
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
