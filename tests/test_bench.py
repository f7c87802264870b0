"""The benchmark's arithmetic and memory accounting; never its speed."""

import gc
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import compare
import contestants
import mlx.core as mx
import numpy as np
import pytest
import report
from contestants import BASELINE, COMPILED, COPY, MODES, OURS
from environment import cache_limit_bytes, environment
from harness import Figures, Step, measure, milliseconds, peak_above_inputs
from report import Report
from workloads import CASES, Case

TINY = Case("tiny", "Tiny", "BatchNorm", (2, 5, 3, 4), quick=True)
TINY_3D = Case("tiny-3d", "Tiny 3-D", "BatchNorm", (2, 3, 4, 5, 6), quick=True)
TINY_INSTANCE = Case("tiny-instance", "Tiny", "InstanceNorm", (2, 5, 3, 4))
TINY_PLAIN = Case("tiny-plain", "Tiny", "InstanceNorm", (2, 7, 4), affine=False)


# The harness


MEBIBYTE = 2**20


@pytest.fixture
def x() -> mx.array:
    x = mx.random.normal((MEBIBYTE // 4,))
    mx.eval(x)
    return x


def test_peak_counts_results(x: mx.array) -> None:
    assert peak_above_inputs(lambda: [mx.array(x)]) == MEBIBYTE
    assert peak_above_inputs(lambda: [mx.array(x), mx.array(x), mx.array(x)]) == 3 * MEBIBYTE


def test_peak_counts_temporaries(x: mx.array) -> None:
    # Both sorted copies are there before the difference, which takes over the buffer of one.
    assert peak_above_inputs(lambda: [mx.sort(x) - mx.sort(-x)]) >= 2 * MEBIBYTE


def test_peak_counts_no_inputs(x: mx.array) -> None:
    assert peak_above_inputs(lambda: [x]) == 0
    assert peak_above_inputs(lambda: [x.reshape(2, -1)]) == 0


def test_peak_ignores_what_the_cache_holds(x: mx.array) -> None:
    # A freed buffer a little larger than the copy, which MLX would reuse for it as it is.
    mx.clear_cache()
    larger = mx.zeros((MEBIBYTE // 4 + 100,)) + 1
    mx.eval(larger)
    del larger
    assert peak_above_inputs(lambda: [mx.array(x)]) == MEBIBYTE


def test_peak_ignores_earlier_peaks(x: mx.array) -> None:
    mx.eval([mx.array(x) for _ in range(5)])
    assert peak_above_inputs(lambda: [mx.array(x)]) == MEBIBYTE


def test_time_contains_graph_and_evaluation(x: mx.array) -> None:
    def slow() -> Sequence[mx.array]:
        time.sleep(0.02)
        return [mx.array(x)]

    assert milliseconds(slow) >= 20


def test_measure_interleaves_and_rotates(x: mx.array) -> None:
    order: list[str] = []

    def step(name: str) -> Step:
        def run() -> Sequence[mx.array]:
            order.append(name)
            return [mx.array(x)] * (1 if name == "a" else 2) + [mx.array(x)] * (name == "c")

        return run

    result = measure({name: step(name) for name in "abc"}, seconds=0, least_rounds=3)
    assert "".join(order) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert list(result) == ["a", "b", "c"]
    assert [figures.peak_bytes for figures in result.values()] == [
        MEBIBYTE,
        MEBIBYTE,
        2 * MEBIBYTE,
    ]
    for figures in result.values():
        assert figures.runs == 3
        assert 0 < figures.low <= figures.milliseconds <= figures.high


def test_measure_stops_at_most_rounds(x: mx.array) -> None:
    result = measure({"a": lambda: [x]}, seconds=60, least_rounds=1, most_rounds=4)
    assert result["a"].runs == 4


def test_figures_are_percentiles_and_the_largest_peak() -> None:
    found = Figures.of([9.0, 1.0, 3.0, 2.0, 100.0, 4.0], [10, 12, 11, 10, 10, 10])
    assert found == Figures(milliseconds=3.5, low=2.0, high=9.0, runs=6, peak_bytes=12)


def test_measure_errors() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        measure({}, seconds=1)
    with pytest.raises(ValueError, match="'least_rounds' must be between 1 and 'most_rounds'"):
        measure({"a": lambda: []}, seconds=1, least_rounds=5, most_rounds=4)


# The contestants


def results(
    case: Case, dtype: str, mode: str, *, compiled: bool = False
) -> dict[str, list[mx.array]]:
    steps = contestants.steps(case, dtype, mode, compiled=compiled)
    return {name: list(step()) for name, step in steps.items()}


def assert_same_results(found: list[mx.array], expected: list[mx.array]) -> None:
    for left, right in zip(found, expected, strict=True):
        assert left.shape == right.shape
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [TINY, TINY_3D, TINY_INSTANCE, TINY_PLAIN], ids=lambda c: c.name)
def test_contestants_do_the_same_work(case: Case, mode: str) -> None:
    channels = (case.shape[-1],)
    expected = [case.shape]
    if mode == "forward+backward":
        expected += [case.shape, *[channels] * (2 * case.affine)]
    if mode != "evaluation" and case.norm == "BatchNorm":
        expected += [channels, channels]

    found = results(case, "float32", mode)
    assert [array.shape for array in found[BASELINE]] == expected
    assert np.std(np.array(found[BASELINE][0])) > 0.5
    assert_same_results(found[OURS], found[BASELINE])


def test_compiled_contestant_does_the_same_work() -> None:
    reason = contestants.compiler_error()
    if reason is not None:
        pytest.skip(f"mx.compile does not work here: {reason}")
    found = results(TINY, "float32", "forward+backward", compiled=True)
    assert_same_results(found[COMPILED], found[BASELINE])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_contestants_stay_in_their_dtype(dtype: str) -> None:
    for name, arrays in results(TINY, dtype, "forward+backward").items():
        for array in arrays[:4]:  # y and the gradients
            assert str(array.dtype).endswith(f".{dtype}"), name


def test_training_goes_on_from_the_last_statistics() -> None:
    steps = contestants.steps(TINY, "float32", "forward+backward", compiled=False)
    for name in (BASELINE, OURS):
        first, second = steps[name](), steps[name]()
        change = mx.max(mx.abs(first[-1] - second[-1])).item()
        assert isinstance(change, float)
        assert change > 1e-3, name
        # The weights stay: every run does the same work.
        np.testing.assert_array_equal(first[0], second[0], err_msg=name)


def test_copy_is_a_copy() -> None:
    case = Case("copy", "Copy", "BatchNorm", (MEBIBYTE // 64, 16))
    step = contestants.steps(case, "float32", "forward", compiled=False)[COPY]
    assert peak_above_inputs(step) == MEBIBYTE


@pytest.mark.parametrize("case", [TINY, TINY_INSTANCE], ids=lambda case: case.name)
def test_nothing_stays_alive(case: Case) -> None:
    def run() -> None:
        measure(contestants.steps(case, "float32", "forward+backward", compiled=False), seconds=0)

    run()
    gc.collect()
    before = mx.get_active_memory()
    run()
    gc.collect()
    mx.synchronize()
    assert mx.get_active_memory() == before


def test_reshape_is_noted() -> None:
    assert contestants.note(TINY_3D, BASELINE) == contestants.RESHAPED
    assert contestants.note(TINY_3D, COMPILED) == contestants.RESHAPED
    assert contestants.note(TINY_3D, OURS) == ""
    assert contestants.note(TINY, BASELINE) == ""


def test_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for norm in ("BatchNorm", "InstanceNorm"):
        prescribed = [c for c in CASES if (c.norm, c.shape) == (norm, (8, 56, 56, 64))]
        assert [(case.affine, case.quick) for case in prescribed] == [(True, True)]


# The report


def figures(time: float, peak: int) -> Figures:
    return Figures(milliseconds=time, low=time - 0.5, high=time + 1, runs=3, peak_bytes=peak)


def rows_of(case: Case) -> list[report.Row]:
    measured = {BASELINE: figures(12, 1400), OURS: figures(1.5, 200), COPY: figures(0.75, 100)}
    return report.rows(case, "float32", "forward", 100, measured)


def test_ratios() -> None:
    baseline, ours, copy = rows_of(TINY)
    assert (baseline.copies, baseline.speed, baseline.memory) == (16, 1, 14)
    assert (ours.copies, ours.speed, ours.memory) == (2, 8, 2)
    assert (copy.copies, copy.speed, copy.memory) == (1, 16, 1)


def test_json_round_trip(tmp_path: Path) -> None:
    written = Report(environment(), rows_of(TINY) + rows_of(TINY_3D))
    written.write(tmp_path / "figures.json")
    assert Report.read(tmp_path / "figures.json") == written


def test_plot_without_compiled_contestant(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    path = tmp_path / "figures.png"
    report.plot(Report(environment(), rows_of(TINY) + rows_of(TINY_3D)), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_environment_names_machine_versions_and_settings() -> None:
    found = environment()
    assert found["mlx"] == metadata.version("mlx")
    assert isinstance(found["cores"], int)
    assert found["cores"] >= 1
    assert found["cpu"]


def test_asking_for_the_cache_limit_leaves_it() -> None:
    previous = mx.set_cache_limit(3 * MEBIBYTE)
    try:
        assert cache_limit_bytes() == 3 * MEBIBYTE
        assert environment()["cache_limit_bytes"] == 3 * MEBIBYTE
    finally:
        mx.set_cache_limit(previous)


# The command line


@pytest.fixture
def only_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "CASES", (TINY, TINY_3D, TINY_INSTANCE))
    monkeypatch.setattr(compare, "compiler_error", lambda: "left out of this test")


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
    assert "Tiny: BatchNorm 2x5x3x4" in printed
    assert "Tiny 3-D: BatchNorm 2x3x4x5x6" in printed
    assert "mlx.nn *" in printed
    assert contestants.RESHAPED in printed
    assert "Tiny: InstanceNorm" not in printed  # not a quick case

    written = Report.read(path)
    assert [(row.case, row.mode, row.dtype, row.contestant) for row in written.rows] == [
        (case.name, mode, "float32", contestant)
        for case in (TINY, TINY_3D)
        for mode in MODES
        for contestant in (BASELINE, OURS, COPY)
    ]
    for row in written.rows:
        assert f"{row.figures.milliseconds:.2f}" in printed
        assert f"{row.memory:.2f}" in printed
        if row.contestant == COPY:
            assert row.copies == 1
            assert row.memory == 1


@pytest.mark.usefixtures("only_tiny")
def test_filters(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    options = ["--cases", "*-instance", "--dtypes", "float16", "--modes", "evaluation"]
    assert compare.main([*options, "--seconds", "1e-3", "--json", str(path)]) == 0
    chosen = {(row.case, row.dtype, row.mode) for row in Report.read(path).rows}
    assert chosen == {("tiny-instance", "float16", "evaluation")}


@pytest.mark.usefixtures("only_tiny")
def test_unknown_case(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--cases", "resnet51"])
    assert "no case is called resnet51" in capsys.readouterr().err


@pytest.mark.usefixtures("only_tiny")
def test_too_large_a_case_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "memory_bytes", lambda: 1000)
    assert compare.main(["--cases", "tiny", "--dtypes", "float32", "--modes", "forward"]) == 1
    assert "tiny float32 left out" in capsys.readouterr().out


@pytest.mark.usefixtures("only_tiny")
def test_cache_limit_is_set_and_recorded(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    before = cache_limit_bytes()
    options = "--cases tiny --dtypes float32 --modes evaluation --seconds 1e-3 --cache-limit 5"
    try:
        assert compare.main([*options.split(), "--json", str(path)]) == 0
    finally:
        mx.set_cache_limit(before)
    assert Report.read(path).environment["cache_limit_bytes"] == 5 * MEBIBYTE
