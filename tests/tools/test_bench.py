"""The benchmark's arithmetic and memory accounting; never its speed."""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mlx.core as mx
import numpy as np
import pytest
from mlx_welford.selftest.chips import nominal_bandwidth

from bench import (
    compare,
    contestants,
    harness,
    instructions,
    plots,
    report,
    results,
    settings,
    suite,
    torch_contestants,
)
from bench.contestants import (
    BACKWARD,
    BASELINE,
    BOTH,
    COMPILED,
    COPY,
    EVALUATION,
    FORWARD,
    MODES,
    OURS,
    OURS_COMPILED,
    TORCH,
)
from bench.environment import cache_limit_bytes, environment
from bench.harness import (
    Figures,
    Samples,
    Step,
    measure,
    milliseconds,
    mlx_step,
    net,
    peak_above_inputs,
)
from bench.plots import Reports
from bench.results import Report, Row
from bench.settings import AS_FOUND, TUNED
from bench.workloads import CASES, SOME, SWEEP, TARGETS, Case
from bench.yardstick import LEAST_SHARE, PAGE, ThreadedCopy

TINY = Case("tiny", "Tiny", "BatchNorm", (2, 5, 3, 4), quick=True)
TINY_3D = Case("tiny-3d", "Tiny 3-D", "BatchNorm", (2, 3, 4, 5, 6), quick=True)
TINY_INSTANCE = Case("tiny-instance", "Tiny", "InstanceNorm", (2, 5, 3, 4))
TINY_PLAIN = Case("tiny-plain", "Tiny", "InstanceNorm", (2, 7, 4), affine=False)
TINY_FIRST = Case("tiny-first", "Tiny", "BatchNorm", (2, 4, 5, 3), axis=1)
TINY_INSTANCE_FIRST = Case("tiny-instance-first", "Tiny", "InstanceNorm", (2, 4, 5, 3), axis=1)
TINY_NC = Case("tiny-nc", "Tiny", "BatchNorm", (16, 4))
ALL_TINY = (TINY, TINY_3D, TINY_INSTANCE, TINY_PLAIN, TINY_FIRST, TINY_INSTANCE_FIRST, TINY_NC)


# The harness


MEBIBYTE = 2**20


@pytest.fixture
def x() -> mx.array:
    x = mx.random.normal((MEBIBYTE // 4,))
    mx.eval(x)
    return x


def peak(*arrays: mx.array) -> int:
    """Of evaluating arrays whose graph nobody else holds."""
    return peak_above_inputs(mlx_step(lambda: arrays).run)


def test_peak_counts_results(x: mx.array) -> None:
    assert peak(mx.array(x)) == MEBIBYTE
    assert peak(mx.array(x), mx.array(x), mx.array(x)) == 3 * MEBIBYTE


def test_peak_counts_temporaries(x: mx.array) -> None:
    # Both sorted copies are there before the difference, which takes over the buffer of one.
    assert peak(mx.sort(x) - mx.sort(-x)) >= 2 * MEBIBYTE


def test_peak_counts_no_inputs(x: mx.array) -> None:
    assert peak(x) == 0
    assert peak(x.reshape(2, -1)) == 0


def test_peak_ignores_what_the_cache_holds(x: mx.array) -> None:
    # A freed buffer a little larger than the copy, which MLX would reuse for it as it is.
    mx.clear_cache()
    larger = mx.zeros((MEBIBYTE // 4 + 100,)) + 1
    mx.eval(larger)
    del larger
    assert peak(mx.array(x)) == MEBIBYTE


def test_peak_ignores_earlier_peaks(x: mx.array) -> None:
    mx.eval([mx.array(x) for _ in range(5)])
    assert peak(mx.array(x)) == MEBIBYTE


def test_time_contains_graph_and_evaluation(x: mx.array) -> None:
    def slow() -> Sequence[mx.array]:
        time.sleep(0.02)
        return [mx.array(x)]

    assert milliseconds(mlx_step(slow).run) >= 20


def test_measure_interleaves_and_rotates(x: mx.array) -> None:
    order: list[str] = []

    def step(name: str) -> Step:
        def run() -> Sequence[mx.array]:
            order.append(name)
            return [mx.array(x)] * (1 if name == "a" else 2) + [mx.array(x)] * (name == "c")

        return mlx_step(run)

    samples = measure({name: step(name) for name in "abc"}, seconds=0, least_rounds=3)
    assert "".join(order) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert list(samples) == ["a", "b", "c"]
    found = [samples[name].figures() for name in "abc"]
    assert [figures.peak_bytes for figures in found] == [MEBIBYTE, MEBIBYTE, 2 * MEBIBYTE]
    for figures in found:
        assert figures.runs == 3
        assert 0 < figures.low <= figures.milliseconds <= figures.high
        assert figures.first is not None
        assert figures.first > 0


def test_measure_stops_at_most_rounds(x: mx.array) -> None:
    samples = measure({"a": mlx_step(lambda: [x])}, seconds=60, least_rounds=1, most_rounds=4)
    assert samples["a"].figures().runs == 4


def not_counted(run: harness.Run) -> None:
    run()


def test_a_step_sits_out_once_it_has_had_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(harness, "SLOW", 1.0)

    def takes(seconds: float) -> Step:
        def run() -> None:
            nonlocal now
            now += seconds

        return Step(run, not_counted)

    steps = {"dear": takes(0.25), "cheap": takes(0.0625)}
    samples = measure(steps, seconds=1.5, least_rounds=2, most_rounds=20, pause=0)
    # Two runs a round, the untimed one counts.
    assert samples["dear"].times == [250.0] * 3
    assert samples["cheap"].times == [62.5] * 12


def test_slow_steps_are_not_run_untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SLOW", 0.001)
    count = 0

    def run() -> None:
        nonlocal count
        count += 1
        time.sleep(0.002)

    measure({"a": Step(run, not_counted)}, seconds=0, least_rounds=3)
    assert count == 1 + 2 + 1 + 1  # the first round does not know yet


def test_memory_is_counted_once_where_that_is_dear() -> None:
    counted = 0

    def peak(run: harness.Run) -> int:
        nonlocal counted
        counted += 1
        run()
        return 7

    samples = measure({"a": Step(lambda: None, peak, every_round=False)}, seconds=0)
    assert counted == 1
    assert samples["a"].figures().peak_bytes == 7


def test_figures_are_percentiles_and_the_largest_peak() -> None:
    samples = Samples([9.0, 1.0, 3.0, 2.0, 100.0, 4.0], [10, 12, 11, 10, 10, 10], first=30.0)
    assert samples.figures() == Figures(3.5, 2.0, 9.0, runs=6, first=30.0, peak_bytes=12)
    assert Samples([1.0]).figures().peak_bytes is None


def test_net_is_the_difference_within_rounds() -> None:
    whole, part = Samples([10.0, 30.0, 20.0]), Samples([1.0, 15.0, 2.0, 100.0])
    # 9, 15, 18: not the difference of the medians, 20 - 8.5, and the fourth has no partner.
    found = net(whole, part)
    assert (found.milliseconds, found.runs) == (15.0, 3)
    assert [found.low, found.high] == pytest.approx([11.4, 16.8])
    assert found.peak_bytes is None


def test_measure_errors() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        measure({}, seconds=1)
    with pytest.raises(ValueError, match="'least_rounds' must be between 1 and 'most_rounds'"):
        measure({"a": mlx_step(lambda: [])}, seconds=1, least_rounds=5, most_rounds=4)


# The yardstick


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("size", [1, 4097, LEAST_SHARE, 3 * LEAST_SHARE + 5, 8 * LEAST_SHARE])
def test_yardstick_moves_every_byte_once(size: int, threads: int) -> None:
    copy = ThreadedCopy(size, threads)
    copy.source[:] = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    assert not np.array_equal(copy.target, copy.source)
    copy.run()
    copy.close()
    np.testing.assert_array_equal(copy.target, copy.source)
    assert not np.shares_memory(copy.target, copy.source)

    touched = np.zeros(size, np.uint8)
    for share in copy.shares:
        touched[share] += 1
    assert (touched == 1).all()
    assert len(copy.shares) == max(1, min(threads, size // LEAST_SHARE))
    lengths = [share.stop - share.start for share in copy.shares]
    assert max(lengths) - min(lengths) <= PAGE * len(lengths)


def test_yardstick_copies_as_much_as_x_has() -> None:
    for dtype, size in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
        step = contestants.steps(TINY, dtype, contestants=[])[COPY, COPY]
        copy = step.run.__self__  # type: ignore[attr-defined]
        assert copy.source.nbytes == size * TINY.elements


# The contestants


def outputs(
    case: Case, dtype: str, mode: str, names: Sequence[str] = (BASELINE, OURS)
) -> dict[str, list[mx.array]]:
    steps = contestants.steps(case, dtype, contestants=names, modes=[mode])
    runs = {name: step.run() for (name, _), step in steps.items() if name != COPY}
    assert list(runs) == list(names)
    return {name: list(run) for name, run in runs.items()}  # type: ignore[call-overload]


def assert_same_results(found: list[mx.array], expected: list[mx.array]) -> None:
    for left, right in zip(found, expected, strict=True):
        assert left.shape == right.shape
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "mode"),
    [(case, mode) for case in ALL_TINY for mode in contestants.modes_of(case)],
    ids=lambda value: getattr(value, "name", value),
)
def test_contestants_do_the_same_work(case: Case, mode: str) -> None:
    channels = (case.channels,)
    expected = [case.shape]
    if mode == BOTH:
        expected += [case.shape, *[channels] * (2 * case.affine)]
    if mode != EVALUATION and case.norm == "BatchNorm":
        expected += [channels, channels]

    found = outputs(case, "float32", mode)
    assert [array.shape for array in found[BASELINE]] == expected
    assert np.std(np.array(found[BASELINE][0])) > 0.5
    assert_same_results(found[OURS], found[BASELINE])


def test_compiled_contestants_do_the_same_work() -> None:
    reason = contestants.compiler_error()
    if reason is not None:
        pytest.skip(f"mx.compile does not work here: {reason}")
    found = outputs(TINY, "float32", BOTH, [BASELINE, COMPILED, OURS_COMPILED])
    assert_same_results(found[COMPILED], found[BASELINE])
    assert_same_results(found[OURS_COMPILED], found[BASELINE])


@pytest.mark.parametrize(
    ("case", "mode"),
    [(case, mode) for case in ALL_TINY for mode in contestants.modes_of(case)],
    ids=lambda value: getattr(value, "name", value),
)
def test_torch_does_the_same_work(case: Case, mode: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    steps = contestants.steps(case, "float32", contestants=[OURS, TORCH], modes=[mode])
    ours = list(steps[OURS, mode].run())  # type: ignore[call-overload]
    found: Any = steps[TORCH, mode].run()
    y, gradients = found if mode == BOTH else (found, ())
    theirs = [y, *gradients]
    for left, right in zip(ours, theirs, strict=False):
        array = right.detach()
        if case.channels_last and array.ndim > 1:
            assert array.movedim(1, -1).is_contiguous() or array.is_contiguous()
            array = array.movedim(1, -1)
        np.testing.assert_allclose(left, array.numpy(), rtol=1e-4, atol=1e-4)
    assert len(theirs) == (1 + 1 + 2 * case.affine if mode == BOTH else 1)


def test_torch_gets_x_as_it_lies_in_memory() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    values = np.random.default_rng(0).standard_normal(TINY.shape, dtype=np.float32)
    contestant = torch_contestants.TorchContestant(TINY, "float32", values, values)
    x = contestant._x.detach()
    assert x.movedim(1, -1).is_contiguous()
    np.testing.assert_array_equal(x.movedim(1, -1).numpy(), values)


def test_torch_peak_counts_what_is_alive_at_once() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.zeros(MEBIBYTE // 4)

    def run() -> object:
        first = x + 1.0
        second = first + 1.0
        del first
        return second + 1.0

    # Two at a time; a scalar operand takes some bytes.
    assert 2 * MEBIBYTE <= torch_contestants.peak_above_inputs(run) < 2.01 * MEBIBYTE


def test_absent_contestants_are_named_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it now raises
    assert contestants.absent([BASELINE, OURS, TORCH]) == {TORCH: "torch is not installed"}
    assert contestants.absent([OURS]) == {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_contestants_stay_in_their_dtype(dtype: str) -> None:
    for name, arrays in outputs(TINY, dtype, BOTH).items():
        for array in arrays[:4]:  # y and the gradients
            assert str(array.dtype).endswith(f".{dtype}"), name


def test_training_goes_on_from_the_last_statistics() -> None:
    steps = contestants.steps(TINY, "float32", contestants=[BASELINE, OURS], modes=[BOTH])
    for name in (BASELINE, OURS):
        run = steps[name, BOTH].run
        first, second = list(run()), list(run())  # type: ignore[call-overload]
        change = mx.max(mx.abs(first[-1] - second[-1])).item()
        assert isinstance(change, float)
        assert change > 1e-3, name
        # The weights stay: every run does the same work.
        np.testing.assert_array_equal(first[0], second[0], err_msg=name)


@pytest.mark.parametrize("case", [TINY, TINY_INSTANCE], ids=lambda case: case.name)
def test_nothing_stays_alive(case: Case) -> None:
    def run() -> None:
        measure(contestants.steps(case, "float32", contestants=[BASELINE, OURS]), seconds=0)

    run()
    gc.collect()
    before = mx.get_active_memory()
    run()
    gc.collect()
    mx.synchronize()
    assert mx.get_active_memory() == before


def test_large_inputs_repeat_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "BLOCK", 7)
    values = contestants._values(TINY, 0)
    assert values.shape == TINY.shape
    np.testing.assert_array_equal(values.ravel()[:7], values.ravel()[7:14])
    assert len(set(values.ravel())) == 7


def test_reshape_is_noted() -> None:
    assert contestants.note(TINY_3D, BASELINE) == contestants.RESHAPED
    assert contestants.note(TINY_3D, COMPILED) == contestants.RESHAPED
    assert contestants.note(TINY_3D, OURS) == ""
    assert contestants.note(TINY, BASELINE) == ""
    assert contestants.note(TINY_FIRST, BASELINE) == contestants.MOVED
    assert contestants.note(TINY_FIRST, OURS) == ""


def test_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for norm in ("BatchNorm", "InstanceNorm"):
        prescribed = [c for c in CASES if (c.norm, c.shape) == (norm, (8, 56, 56, 64))]
        assert [(case.affine, case.quick) for case in prescribed] == [(True, True)]


def test_targets_are_larger_than_caches_and_the_sweep_is_regular() -> None:
    assert all(4 * case.elements >= 32 * MEBIBYTE for case in TARGETS)
    assert set(SOME) <= {case.name for case in TARGETS}
    sizes = [4 * case.elements for case in reversed(SWEEP)]
    assert sizes[0] == 64 * 1024
    assert sizes[-1] == 1024 * MEBIBYTE
    assert all(following == 4 * size for size, following in pairwise(sizes))


# Results


def samples(*times: float, peak: int | None = None) -> Samples:
    return Samples(list(times), [] if peak is None else [peak], first=2 * times[0])


X_BYTES = 4 * TINY.elements

MEASURED = {
    (BASELINE, FORWARD): samples(12.0, 12.0, 13.0, peak=14 * X_BYTES),
    (OURS, FORWARD): samples(1.5, 1.0, 2.0, peak=X_BYTES),
    (BASELINE, BOTH): samples(36.0, 30.0, 40.0, peak=20 * X_BYTES),
    (OURS, BOTH): samples(4.5, 3.5, 5.5, peak=2 * X_BYTES),
    (COPY, COPY): samples(0.75, 0.5, 1.0, peak=0),
}


def rows_of(case: Case, modes: Sequence[str] = (FORWARD, BACKWARD, BOTH)) -> list[Row]:
    return results.rows(case, "float32", MEASURED, modes)


def test_ratios() -> None:
    rows = {(row.contestant, row.mode): row for row in rows_of(TINY)}
    assert list(rows) == [
        (BASELINE, FORWARD),
        (OURS, FORWARD),
        (BASELINE, BACKWARD),
        (OURS, BACKWARD),
        (BASELINE, BOTH),
        (OURS, BOTH),
        (COPY, COPY),
    ]

    def ratios(name: str, mode: str) -> tuple[float, float | None, float | None]:
        row = rows[name, mode]
        return row.copies, row.speed, row.memory

    assert ratios(BASELINE, FORWARD) == (16, 1, 14)
    assert ratios(OURS, FORWARD) == (2, 8, 1)
    assert ratios(OURS, BOTH) == (6, 8, 2)
    assert ratios(COPY, COPY) == (1, None, 0)
    # Net: 4.5 - 1.5, 3.5 - 1, 5.5 - 2; and 24, 18, 27 of mlx.nn. No memory of its own.
    assert rows[OURS, BACKWARD].figures.milliseconds == 3.0
    assert ratios(OURS, BACKWARD) == (4, 8, None)


def test_only_modes_that_were_asked_for() -> None:
    assert {row.mode for row in rows_of(TINY, [BACKWARD])} == {BACKWARD, COPY}


def test_bandwidth_is_traffic_by_time() -> None:
    # Too large for the registers of a threadgroup, so all passes go through memory.
    large = Case("large", "Large", "BatchNorm", (65536, 64))
    x_bytes = 4 * large.elements
    for case in (large, Case("first", "Large", "InstanceNorm", (4, 16, 65536), axis=1)):
        assert results.moved_bytes(case, "float32", FORWARD) == 3 * x_bytes
        assert results.moved_bytes(case, "float32", BACKWARD) == 5 * x_bytes
        assert results.moved_bytes(case, "float32", BOTH) == 8 * x_bytes
    assert results.moved_bytes(large, "float16", EVALUATION) == x_bytes
    forward = {row.contestant: row for row in rows_of(large) if row.mode in (FORWARD, COPY)}
    assert forward[OURS].gigabytes_per_second == pytest.approx(3 * x_bytes / 1.5e-3 / 1e9)
    assert forward[OURS].limit == 1.5
    assert forward[COPY].gigabytes_per_second == pytest.approx(2 * x_bytes / 0.75e-3 / 1e9)


def described(setting: str = AS_FOUND, threads: int = 2) -> dict[str, str | int | float | None]:
    tuned = settings.description(setting)
    return {**environment(), "setting": setting, "tuned": tuned, "threads": threads}


def test_json_round_trip(tmp_path: Path) -> None:
    written = Report(described(), rows_of(TINY) + rows_of(TINY_3D), ("torch: not installed",))
    written.write(tmp_path / "folder" / "figures.json")
    assert Report.read(tmp_path / "folder" / "figures.json") == written


def test_json_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    Report(described(), []).write(path)
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 1'))
    with pytest.raises(ValueError, match=r"'figures.json' must have schema 2 but got 1"):
        Report.read(path)


def test_environment_names_machine_versions_and_settings() -> None:
    found = environment()
    assert found["mlx"] == metadata.version("mlx")
    assert isinstance(found["cores"], int)
    assert found["cores"] >= 1
    assert found["cpu"]
    assert str(found["date"]).startswith("20")


def test_asking_for_the_cache_limit_leaves_it() -> None:
    previous = mx.set_cache_limit(3 * MEBIBYTE)
    try:
        assert cache_limit_bytes() == 3 * MEBIBYTE
        assert environment()["cache_limit_bytes"] == 3 * MEBIBYTE
    finally:
        mx.set_cache_limit(previous)


def test_nominal_bandwidth_is_of_the_chip_and_not_of_its_family() -> None:
    """Bus widths in bytes times transfers a second, of the memory that each generation has."""
    widths = {"": 16, " Pro": 32, " Max": 64, " Ultra": 128}
    transfers = {"M1": 4.266, "M2": 6.4, "M3": 6.4, "M4": 7.5}  # LPDDR4X, then LPDDR5 and 5X
    for generation, rate in transfers.items():
        for variant, width in widths.items():
            stated = nominal_bandwidth(f"Apple {generation}{variant}")
            if (generation, variant) == ("M4", " Ultra"):
                assert stated is None  # there is none
            elif (generation, variant) == ("M3", " Pro"):
                assert stated == pytest.approx(24 * rate, rel=0.03)  # a narrower bus
            elif (generation, variant) in (("M1", " Pro"), ("M1", " Max"), ("M1", " Ultra")):
                assert stated == pytest.approx(width * 6.4, rel=0.03)  # has LPDDR5 already
            elif (generation, variant) in (("M4", " Pro"), ("M4", " Max")):
                assert stated == pytest.approx(width * 8.533, rel=0.03)
            else:
                assert stated == pytest.approx(width * rate, rel=0.03)
    # Whatever else the system may say
    for name in (
        "AMD EPYC",
        "Apple M4 Pro Max",
        "Apple M",
        "Apple M99",
        "Apple Paravirtual device",
    ):
        assert nominal_bandwidth(name) is None
    assert nominal_bandwidth("M2 Pro") == nominal_bandwidth("Apple M2 Pro")


# Settings


def test_settings_are_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*settings.MALLOC, *settings.THREADS):
        monkeypatch.delenv(name, raising=False)
    assert settings.is_entered(AS_FOUND, None)
    assert not settings.is_entered(TUNED, None)
    assert not settings.is_entered(AS_FOUND, 1)

    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")  # somebody tuned it already
    assert not settings.is_entered(AS_FOUND, None)
    for name, value in settings.MALLOC.items():
        monkeypatch.setenv(name, value)
    assert settings.is_entered(TUNED, None)
    for name in settings.THREADS:
        monkeypatch.setenv(name, "3")
    assert settings.is_entered(TUNED, 3)
    assert not settings.is_entered(TUNED, 2)


def test_a_child_gets_exactly_its_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*settings.MALLOC, *settings.THREADS, "OTHER"]
    (tmp_path / "child.py").write_text(
        "import json, os, sys\n"
        f"json.dump({{n: os.environ.get(n) for n in {names}}}, open(sys.argv[1], 'w'))\n"
        "sys.exit(7)\n"
    )

    def child(setting: str, threads: int | None) -> dict[str, str | None]:
        seen = tmp_path / "seen.json"
        other = {"OTHER": "value"}
        status = settings.run_in_child("child", [str(seen)], setting, threads, variables=other)
        assert status == 7
        found: dict[str, str | None] = json.loads(seen.read_text())
        assert found.pop("OTHER") == "value"
        return found

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "5")
    for name in settings.THREADS:
        monkeypatch.delenv(name, raising=False)
    nothing: dict[str, str | None] = dict.fromkeys(names[:-1])
    assert child(AS_FOUND, None) == nothing
    assert child(TUNED, None) == nothing | settings.MALLOC
    assert child(AS_FOUND, 3) == nothing | dict.fromkeys(settings.THREADS, "3")


# The command lines


@pytest.fixture
def only_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (TINY, TINY_3D, TINY_INSTANCE)
    monkeypatch.setattr(compare, "CASES", cases)
    monkeypatch.setattr(compare, "MODELS", cases)
    reasons = dict.fromkeys((COMPILED, OURS_COMPILED), "left out of this test")
    reasons[TORCH] = "not here"
    monkeypatch.setattr(compare, "absent", lambda _: {**reasons, contestants.TORCH_MPS: "no Mac"})
    for name in (*settings.MALLOC, *settings.THREADS):
        monkeypatch.delenv(name, raising=False)


def test_choice_of_cases() -> None:
    def names(patterns: list[str] | None, *, quick: bool) -> list[str]:
        return [case.name for case in compare.choose(cases, patterns, quick=quick)]

    large = Case("large", "Large", "BatchNorm", (2, 3), large=True)
    cases = (TINY, TINY_3D, TINY_INSTANCE, large)
    assert names(None, quick=True) == ["tiny", "tiny-3d"]
    assert names(None, quick=False) == ["tiny", "tiny-3d", "tiny-instance"]
    assert names(["*-instance", "large"], quick=True) == ["tiny-instance", "large"]
    assert names(["tiny"], quick=False) == ["tiny"]


@pytest.mark.usefixtures("only_tiny")
def test_comparison_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert compare.main(["--quick", "--seconds", "1e-3", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "Tiny: BatchNorm 2x5x3x4 (as found)" in printed
    assert "Tiny 3-D: BatchNorm 2x3x4x5x6 (as found)" in printed
    assert "Without torch: not here." in printed
    assert "mlx.nn *" in printed
    assert contestants.RESHAPED in printed
    assert "Tiny: InstanceNorm" not in printed  # not a quick case

    written = Report.read(path)
    assert [(row.case, row.mode, row.dtype, row.contestant) for row in written.rows] == [
        (case.name, *key)
        for case in (TINY, TINY_3D)
        for key in [
            *((mode, "float32", name) for mode in MODES for name in (BASELINE, OURS)),
            (COPY, "float32", COPY),
        ]
    ]
    assert written.environment["setting"] == AS_FOUND
    assert written.left_out == (
        *(f"{name}: left out of this test" for name in (COMPILED, OURS_COMPILED)),
        f"{TORCH}: not here",
    )
    for row in written.rows:
        assert f"{row.figures.milliseconds:.2f}" in printed
        if row.contestant == COPY:
            assert row.copies == 1


@pytest.mark.usefixtures("only_tiny")
def test_filters(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    options = ["--cases", "*-instance", "--dtypes", "float16", "--modes", BACKWARD]
    options += ["--contestants", OURS, "--seconds", "1e-3"]
    assert compare.main([*options, "--json", str(path)]) == 0
    chosen = [(row.case, row.dtype, row.mode, row.contestant) for row in Report.read(path).rows]
    assert chosen == [
        ("tiny-instance", "float16", BACKWARD, OURS),
        ("tiny-instance", "float16", COPY, COPY),
    ]


@pytest.mark.usefixtures("only_tiny")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cases", "resnet51"], "no case is called resnet51"),
        (["--threads", "0"], "--threads must be at least 1 but got 0"),
    ],
)
def test_errors_of_the_command_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("only_tiny")
def test_who_needs_too_much_memory_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--cases", "tiny", "--dtypes", "float32", "--modes", FORWARD, "--seconds", "1e-3"]
    enough_for_ours = 40 * TINY.elements / compare.USABLE_MEMORY
    monkeypatch.setattr(compare, "memory_bytes", lambda: enough_for_ours)
    assert compare.main(options) == 0
    printed = capsys.readouterr().out
    assert "Without mlx.nn in tiny: too large for this memory." in printed
    assert OURS in printed
    monkeypatch.setattr(compare, "memory_bytes", lambda: 1)
    assert compare.main(options) == 1
    assert "Nothing was measured" in capsys.readouterr().out


@pytest.mark.usefixtures("only_tiny")
def test_large_cases_are_not_compiled_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compare, "CASES", (replace(TINY, large=True),))
    monkeypatch.setattr(compare, "absent", lambda _: {})
    monkeypatch.setattr(compare, "PEERS", (BASELINE, COMPILED))
    path = tmp_path / "figures.json"
    options = ["--cases", "tiny", "--dtypes", "float32", "--modes", EVALUATION]
    assert compare.main([*options, "--seconds", "1e-3", "--json", str(path)]) == 0
    found = Report.read(path)
    assert [row.contestant for row in found.rows] == [BASELINE, COPY]
    assert found.left_out == (f"{COMPILED} in tiny: takes too long",)


# Instructions


def test_instructions_are_read_from_the_report() -> None:
    assert instructions.count("==1== \n==1== I   refs:      1,234,567\n") == 1234567
    with pytest.raises(ValueError, match="must report 'I refs' but reported:\nnothing"):
        instructions.count("nothing")


def test_instructions_are_of_the_calls_beyond_the_first_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(instructions, "CASES", (TINY,))
    monkeypatch.setattr(instructions, "CASE", TINY.name)
    monkeypatch.setattr(shutil, "which", lambda _: "valgrind")
    monkeypatch.setattr(
        instructions, "instructions", lambda *what: 10_000 + what[-1] * 7 * TINY.elements
    )
    assert instructions.main(["--modes", FORWARD]) == 0
    assert capsys.readouterr().out == f"tiny float32 forward {OURS}: 7.00 per element\n"


def test_instructions_without_valgrind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit):
        instructions.main([])
    assert "valgrind is not installed" in capsys.readouterr().err


def test_work_calls_the_step_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1

    step = Step(run, not_counted)
    monkeypatch.setattr(instructions, "CASES", (TINY,))
    monkeypatch.setattr(
        instructions, "steps", lambda *_, **__: {(OURS, FORWARD): step, (COPY, COPY): step}
    )
    instructions.work("tiny", "float32", FORWARD, OURS, calls=3)
    assert calls == 3


# The suite and its report


def test_jobs_measure_what_the_report_needs(tmp_path: Path) -> None:
    jobs = {job.name: job for job in suite.jobs()}
    needed = {job for _, of_section in report.SECTIONS.values() for job in of_section}
    assert needed <= set(jobs)
    for job in jobs.values():
        parsed = compare.arguments(job.arguments(tmp_path))
        assert [case.name for case in parsed.chosen] == [
            case.name for case in CASES if case.name in job.cases
        ]
        assert parsed.setting == job.setting
        assert parsed.json == tmp_path / f"{job.name}.json"


def test_threads_are_powers_of_two_below_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, expected in ((1, []), (2, [1]), (6, [1, 2, 4]), (8, [1, 2, 4])):
        monkeypatch.setattr(suite, "cores", lambda count=count: count)
        assert [job.threads for job in suite._fewer_threads()] == expected


@pytest.mark.slow
def test_scripts_run_as_programs(tmp_path: Path) -> None:
    def run(module: str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *options],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
            env={k: v for k, v in os.environ.items() if k not in settings.MALLOC},
        )

    path = tmp_path / "tuned.json"
    options = "--cases cifar-resnet-64kb --dtypes float32 --modes forward --seconds 1e-3"
    run(
        "bench.compare", *options.split(), "--setting", TUNED, "--threads", "1", "--json", str(path)
    )
    found = Report.read(path).environment
    assert found["MALLOC_MMAP_MAX_"] == "0"
    assert found["MLX_WELFORD_NUM_THREADS"] == "1"
    assert found["threads"] == 1
    assert int(str(found["cache_limit_bytes"])) > 100 * MEBIBYTE

    assert "cases-tuned" in run("bench.suite", "--list").stdout.split()
    run("bench.suite", "--only", "cold-mlx_welford", "--results", str(tmp_path))
    assert Report.read(tmp_path / "cold-mlx_welford.json").rows


SMALL_CASE = Case("little", "Little", "BatchNorm", (2, 4))
LARGE_CASES = (
    Case("one", "One", "BatchNorm", (8192, 64)),
    Case("two", "Two", "InstanceNorm", (2, 16, 65536), axis=1),
)


def made_up_reports() -> dict[str, Report]:
    """As suite.py would write them, of figures made up."""
    evaluation = {
        (name, EVALUATION): samples(2.0, 3.0, 1.0, peak=X_BYTES) for name in (BASELINE, OURS)
    }

    def of(cases: Sequence[Case], dtypes: Sequence[str], setting: str, threads: int) -> Report:
        rows = [
            row
            for case in cases
            for dtype in dtypes
            for row in results.rows(case, dtype, MEASURED | evaluation, (FORWARD, BOTH, EVALUATION))
        ]
        return Report(described(setting, threads), rows)

    reports = {}
    for setting in (TUNED, AS_FOUND):
        suffix = setting.replace(" ", "-")
        cases = (*LARGE_CASES, SMALL_CASE)
        reports[f"cases-{suffix}"] = of(cases, ["float32"], setting, 2)
        reports[f"halves-{suffix}"] = of(LARGE_CASES[:1], ["float16", "bfloat16"], setting, 2)
        reports[f"sizes-{suffix}"] = of(cases, ["float32"], setting, 2)
    reports["compiled"] = of(LARGE_CASES[:1], ["float32"], TUNED, 2)
    reports["threads-1"] = of(LARGE_CASES, ["float32"], TUNED, 1)
    reports["cold-mlx_welford"] = of(LARGE_CASES[:1], ["float32"], AS_FOUND, 2)
    return reports


DOCUMENT = "Before.\n\n" + "".join(
    f"## {name}\n\n<!-- begin: {name} -->\nstale\n<!-- end: {name} -->\n\nBetween.\n\n"
    for name in report.SECTIONS
)


def test_report_is_refreshed_between_markers_and_only_once() -> None:
    reports = made_up_reports()
    once = report.refresh(DOCUMENT, reports)
    assert report.refresh(once, reports) == once
    assert "stale" not in once
    assert once.startswith("Before.\n\n## machine")
    assert once.count("\n\nBetween.\n\n") == len(report.SECTIONS)


def test_report_keeps_what_it_has_no_figures_for() -> None:
    reports = made_up_reports()
    del reports["halves-tuned"]
    text = report.refresh(DOCUMENT, reports)
    assert "<!-- begin: halves -->\nstale\n<!-- end: halves -->" in text
    assert text.count("stale") == 1
    assert report.refresh(DOCUMENT, {}) == DOCUMENT


def test_unknown_sections_are_refused() -> None:
    text = "<!-- begin: forwards -->\n<!-- end: forwards -->"
    with pytest.raises(ValueError, match=r"a section must be one of .* but got 'forwards'"):
        report.refresh(text, made_up_reports())


def lines_of(section: str, reports: dict[str, Report]) -> list[list[str]]:
    make, _ = report.SECTIONS[section]
    lines = [line for line in make(reports).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_tables_tell_the_figures() -> None:
    reports = made_up_reports()
    header, _, *body = lines_of("ratios", reports)
    # The small case counts for nothing here; torch took no part.
    assert header[:4] == ["float32", "limit", "mlx.nn, as found", "torch, as found"]
    forward = ["BatchNorm forward, channels last", "1.50"]
    assert body[0] == [*forward, "16.0", "", "2.00", "16.0", "", "2.00"]
    assert [line[0] for line in lines_of(FORWARD, reports)[2:]] == ["one", "two"]
    assert [line[0] for line in lines_of("small", reports)[2:]] == ["little"] * 3
    assert lines_of("small", reports)[2] == [
        *("little", FORWARD, "12000", "", "1500", "12000", "", "1500")
    ]
    halves = lines_of("halves", reports)[2]
    assert halves == ["one", FORWARD, "float16", "16.0", "", "2.00", "16.0", "", "2.00", "1.00"]
    compiled = ["one", FORWARD, "12", "", "1.50"]
    assert lines_of("compiled", reports)[2][:5] == compiled
    assert lines_of("cold", reports)[2] == [OURS, "3.0", "1.5"]
    assert lines_of("sizes", reports)[0][4:6] == ["as found, ms", "1 of 2 threads, ms"]
    assert f"{environment()['cores']} cores" in report.machine(reports)


def test_spans_and_numbers() -> None:
    assert report._span([]) == ""
    assert report._span([1.004, 1.0]) == "1.00"
    assert report._span([30.4, 1.5, 12.34]) == "1.50 to 30"
    assert report._number(12.34) == "12.3"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The figures of the reports made up, by name."""
    written = plots.draw(made_up_reports(), tmp_path_factory.mktemp("drawn"))
    return {path.stem: path.read_bytes() for path in written}


def test_plots_are_drawn_from_what_is_there(drawn: dict[str, bytes], tmp_path: Path) -> None:
    assert list(drawn) == ["cases", "memory", "bandwidth", "scaling"]
    for data in drawn.values():
        assert ElementTree.fromstring(data).tag.endswith("svg")

    reports = made_up_reports()
    del reports["sizes-as-found"]
    some = {path.stem: path.read_bytes() for path in plots.draw(reports, tmp_path)}
    assert list(some) == ["cases", "memory", "scaling"]
    # The same figures give the same bytes.
    assert [some[name] for name in ("cases", "memory")] == [drawn["cases"], drawn["memory"]]


def test_report_writes_tables_and_plots(
    drawn: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:

    def draw(reports: Reports, directory: Path) -> list[Path]:
        """As drawn before: drawing takes seconds."""
        assert reports.keys() == made_up_reports().keys()
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / f"{name}.svg" for name in drawn]
        for path in paths:
            path.write_bytes(drawn[path.stem])
        return paths

    monkeypatch.setattr(plots, "draw", draw)
    for name, of_job in made_up_reports().items():
        of_job.write(tmp_path / "results" / f"{name}.json")
    document = tmp_path / "performance.md"
    document.write_text(DOCUMENT)
    options = ["--results", str(tmp_path / "results"), "--write", str(document)]
    assert report.main(options) == 0
    first = document.read_text()
    assert "BatchNorm forward, channels last" in first
    assert (tmp_path / "performance" / "cases.svg").exists()
    assert report.main(options) == 0
    assert document.read_text() == first


def test_report_without_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path)])
    assert "run bench.suite" in capsys.readouterr().err


def test_the_documents_have_every_section() -> None:
    root = Path(report.__file__).parent.parent
    files = (root / "docs" / "performance.md", root / "README.md")
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    for name in report.SECTIONS:
        places = 2 if name == "ratios" else 1
        assert text.count(f"<!-- begin: {name} -->") == places, name
        assert text.count(f"<!-- end: {name} -->") == places, name
