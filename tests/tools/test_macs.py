"""The table of Apple's chips in docs/macs.md says what results/ holds, and what it does not."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlx_welford.selftest.chips import CHIPS

from bench import macs, report

ROOT = Path(__file__).resolve().parents[2]


def published(chip: str, **changes: Any) -> dict[str, Any]:
    """A file of results of a chip, with what the table reads."""
    small: dict[str, Any] = {
        "layer": "batch",
        "mode": "forward+backward",
        "dtype": "float32",
        "planned_bytes": 10,
        "gigabytes_per_second": 999.0,
        "share_of_copy": 9.99,
        "times_as_fast": 4.0,
    }
    large = {**small, "planned_bytes": 1000, "gigabytes_per_second": 150.0, "share_of_copy": 0.875}
    others = [
        {**large, "layer": "instance", "times_as_fast": 2.5},
        {**large, "dtype": "float16", "gigabytes_per_second": 1.0, "times_as_fast": 7.25},
        {**large, "mode": "forward", "gigabytes_per_second": 2.0, "times_as_fast": 3.0},
    ]
    return {
        "date": "2026-12-01",
        "backend": "metal",
        "chip": chip,
        "gpu_cores": 10,
        "system": "macOS 26.1",
        "mlx_welford": "0.1.0",
        "mlx": "0.32.4",
        "cases": 76,
        "cases_passed": 75,
        "programs": 4,
        "programs_passed": 4,
        "nominal_gigabytes_per_second": 200,
        "times": [small, *others, large],
        **changes,
    }


def write(folder: Path, *every: dict[str, Any]) -> None:
    for number, one in enumerate(every):
        (folder / f"{number}.json").write_text(json.dumps(one))


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()][2:]


def test_a_row_of_a_chip() -> None:
    first, last = rows(macs.table([published("Apple M2 Pro")]))
    assert first == [
        "M2 Pro, 10 GPU cores",
        "79 of 80",
        "150",
        "75% of 200",
        "88%",
        "2.5 to 7.2",
        "2026-12-01, macOS 26.1, 0.1.0 with mlx 0.32.4",
    ]
    missing = last[0].split(", ")
    assert missing == [chip for chip in CHIPS if chip != "M2 Pro"]
    assert last[1] == "not measured yet"


def test_a_chip_that_apple_has_published_nothing_about() -> None:
    new = published("Apple M9", nominal_gigabytes_per_second=None, gpu_cores=None)
    first, _ = rows(macs.table([new]))
    assert first[0] == "M9"
    assert first[3] == "unknown"


def test_chips_are_in_order_and_only_gpus_count(tmp_path: Path) -> None:
    write(
        tmp_path,
        published("Apple M9"),
        published("Apple M3 Max", gpu_cores=40),
        published("AMD EPYC", backend="cpu"),
        published("Apple M3 Max", gpu_cores=30),
        published("Apple M1", backend="composed"),
        published("Apple M1 Pro"),
    )
    names = [row[0] for row in rows(macs.table(macs.read(tmp_path)))]
    assert names[:-1] == [
        *("M1 Pro, 10 GPU cores", "M3 Max, 30 GPU cores", "M3 Max, 40 GPU cores"),
        "M9, 10 GPU cores",
    ]
    assert "M1, M1 Max" in names[-1]


def test_the_file_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    results.mkdir()
    write(results, published("Apple M1"))
    path = tmp_path / "file.md"
    path.write_text("before\n<!-- begin: chips -->\nold\n<!-- end: chips -->\nafter\n")
    assert macs.main(["--results", str(results), "--write", str(path)]) == 0
    table = macs.table(macs.read(results))
    expected = f"before\n<!-- begin: chips -->\n\n{table}\n\n<!-- end: chips -->\nafter\n"
    assert path.read_text() == expected
    assert macs.main(["--results", str(results)]) == 0
    assert capsys.readouterr().out == table + "\n"
    path.write_text("no markers")
    with pytest.raises(ValueError, match="must have the markers"):
        macs.main(["--results", str(results), "--write", str(path)])
    assert path.read_text() == "no markers"


def test_the_page_has_the_table_of_the_results() -> None:
    """`python -m bench.macs --write docs/macs.md` makes it so."""
    text = (ROOT / "docs" / "macs.md").read_text()
    assert macs.refresh(text, macs.read(ROOT / "results")) == text
    assert text.count("not measured yet") >= 1


def test_the_report_of_the_benchmarks_leaves_the_table_alone() -> None:
    text = "<!-- begin: chips -->\nx\n<!-- end: chips -->"
    assert report.refresh(text, {}) == text
