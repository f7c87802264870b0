"""The benchmark's harness: who is measured when, and what counts as memory; never its speed."""

import time
from collections.abc import Sequence

import mlx.core as mx
import pytest
from bench_cases import MEBIBYTE, not_counted
from mlx_welford.bench import harness
from mlx_welford.bench.harness import (
    Figures,
    Samples,
    Step,
    measure,
    milliseconds,
    mlx_step,
    net,
    peak_above_inputs,
)


@pytest.fixture
def x() -> mx.array:
    x = mx.random.normal((MEBIBYTE // 4,))
    mx.eval(x)
    return x


def peak(*arrays: mx.array) -> int:
    """Peak of evaluating arrays of which this holds the only references."""
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


def test_measure_interleaves_in_changing_order(x: mx.array) -> None:
    order: list[str] = []

    def step(name: str) -> Step:
        def run() -> Sequence[mx.array]:
            order.append(name)
            return [mx.array(x)] * (1 if name == "a" else 2) + [mx.array(x)] * (name == "c")

        return mlx_step(run)

    samples = measure({name: step(name) for name in "abc"}, seconds=0, least_rounds=12)
    rounds = ["".join(order[i : i + 6]) for i in range(3, len(order), 6)]
    assert order[:3] == ["a", "b", "c"]
    assert all(sorted(found) == list("aabbcc") and found[::2] == found[1::2] for found in rounds)
    assert len(set(rounds)) > 3
    assert list(samples) == ["a", "b", "c"]
    found = [samples[name].figures() for name in "abc"]
    assert [figures.peak_bytes for figures in found] == [MEBIBYTE, MEBIBYTE, 2 * MEBIBYTE]
    for figures in found:
        assert figures.runs == 12
        assert 0 < figures.low <= figures.milliseconds <= figures.high
        assert figures.first is not None
        assert figures.first > 0


def test_measure_stops_at_most_rounds(x: mx.array) -> None:
    samples = measure({"a": mlx_step(lambda: [x])}, seconds=60, least_rounds=1, most_rounds=4)
    assert samples["a"].figures().runs == 4


def test_a_step_sits_out_once_it_has_had_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(harness, "SLOW", 1.0)

    def takes(seconds: float) -> Step:
        def run() -> None:
            nonlocal now
            now += seconds

        return Step(run, not_counted)

    steps = {"slow": takes(0.25), "fast": takes(0.0625)}
    samples = measure(steps, seconds=1.5, least_rounds=2, most_rounds=20, pause=0)
    # Two runs a round, the untimed one counts.
    assert samples["slow"].times == [250.0] * 3
    assert samples["fast"].times == [62.5] * 12


def test_slow_steps_are_not_run_untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SLOW", 0.001)
    count = 0

    def run() -> None:
        nonlocal count
        count += 1
        time.sleep(0.002)

    measure({"a": Step(run, not_counted)}, seconds=0, least_rounds=3)
    assert count == 1 + 2 + 1 + 1  # the first round does not know yet


def test_memory_is_counted_once_where_that_is_slow() -> None:
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
