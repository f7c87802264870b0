"""The benchmark's ratios, the file that keeps them, and the environment they are from."""

from importlib import metadata
from pathlib import Path

import mlx.core as mx
import pytest
from bench_cases import MEBIBYTE, TINY, TINY_3D, described, rows_of
from mlx_welford.bench import results
from mlx_welford.bench.environment import cache_limit_bytes, environment
from mlx_welford.bench.implementations import (
    BACKWARD,
    BASELINE,
    BOTH,
    COPY,
    EVALUATION,
    FORWARD,
    OURS,
)
from mlx_welford.bench.results import Report
from mlx_welford.bench.workloads import Case


def test_ratios() -> None:
    rows = {(row.implementation, row.mode): row for row in rows_of(TINY)}
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
    # A channel fits the registers of a threadgroup, a group of 8 channels does not.
    for groups, passes in ((0, 2), (8, 3)):
        case = Case("rows", "Rows", "InstanceNorm", (4, 64, 2048), axis=1, groups=groups)
        assert results.moved_bytes(case, "float32", FORWARD) == passes * 4 * case.elements
    forward = {row.implementation: row for row in rows_of(large) if row.mode in (FORWARD, COPY)}
    assert forward[OURS].gigabytes_per_second == pytest.approx(3 * x_bytes / 1.5e-3 / 1e9)
    assert forward[OURS].limit == 1.5
    assert forward[COPY].gigabytes_per_second == pytest.approx(2 * x_bytes / 0.75e-3 / 1e9)


@pytest.mark.parametrize(
    ("activation", "residual", "forward", "backward", "evaluation"),
    [("silu", False, 3, 5, 2), (None, True, 4, 5, 3), ("relu", True, 4, 7, 3)],
)
def test_what_follows_counts(
    activation: str | None, residual: bool, forward: int, backward: int, evaluation: int
) -> None:
    """In the layer, as docs/kernels.md says."""
    case = Case("large", "", "BatchNorm", (65536, 64), activation=activation, residual=residual)
    found = [results.moved_bytes(case, "float32", mode) for mode in (FORWARD, BACKWARD, EVALUATION)]
    assert found == [4 * case.elements * n for n in (forward, backward, evaluation)]


def test_json_round_trip(tmp_path: Path) -> None:
    written = Report(described(), rows_of(TINY) + rows_of(TINY_3D), ("torch: not installed",))
    written.write(tmp_path / "folder" / "figures.json")
    assert Report.read(tmp_path / "folder" / "figures.json") == written


def test_json_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    Report(described(), []).write(path)
    path.write_text(path.read_text().replace('"schema": 4', '"schema": 1'))
    with pytest.raises(ValueError, match=r"'figures.json' must have schema 4 but got 1"):
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
