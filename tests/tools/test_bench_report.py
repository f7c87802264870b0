"""The suite of measurements, and the tables and plots that are made of it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bench_cases import MEASURED, MEBIBYTE, X_BYTES, described, samples
from mlx_welford.bench import compare, results, settings
from mlx_welford.bench.environment import environment
from mlx_welford.bench.implementations import (
    BASELINE,
    BOTH,
    EVALUATION,
    FORWARD,
    INSTANCE,
    OURS,
    UNFUSED,
)
from mlx_welford.bench.results import Report
from mlx_welford.bench.settings import AS_FOUND, TUNED
from mlx_welford.bench.workloads import CASES, EPILOGUES, WITHOUT_EPILOGUE, Case, followed

from bench import plots, report, suite
from bench.plots import Reports
from bench.suite import GROUPS


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


def test_every_layer_with_an_epilogue_is_also_measured_alone() -> None:
    without = [case for case in CASES if case.name in WITHOUT_EPILOGUE]
    assert not any(case.has_epilogue for case in without)
    shapes = [(case.shape, case.axis) for case in without]
    assert set(shapes) == {(case.shape, case.axis) for case in EPILOGUES}


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
    options = "bench --cases cifar-resnet-64kb --dtypes float32 --modes forward --seconds 1e-3"
    setting = ("--setting", TUNED, "--threads", "1")
    run("mlx_welford", *options.split(), *setting, "--json", str(path))
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
GROUP_CASES = (
    Case("three", "Three", "GroupNorm", (2, 64, 64, 64), groups=8),
    Case("four", "Four", "GroupNorm", (2, 64, 64, 64), groups=32, interleaved=True),
)


def made_up_reports() -> dict[str, Report]:
    """As suite.py would write them, of figures made up."""
    evaluation = {
        (name, EVALUATION): samples(2.0, 3.0, 1.0, peak=X_BYTES) for name in (BASELINE, OURS)
    }
    modes = (FORWARD, BOTH, EVALUATION)

    def of(cases: Sequence[Case], dtypes: Sequence[str], setting: str, threads: int) -> Report:
        rows = [
            row
            for case in cases
            for dtype in dtypes
            for row in results.rows(case, dtype, MEASURED | evaluation, modes)
        ]
        return Report(described(setting, threads), rows)

    def of_groups(dtypes: Sequence[str], setting: str) -> Report:
        instance = {(INSTANCE, FORWARD): samples(1.5), (INSTANCE, BOTH): samples(3.0)}
        fast = {(BASELINE, BOTH): samples(18.0)}
        rows = [
            row
            for case in GROUP_CASES
            for dtype in dtypes
            for row in results.rows(
                case, dtype, MEASURED | instance | (fast if case.interleaved else {}), modes[:2]
            )
        ]
        return Report(described(setting), rows)

    def of_followed() -> Report:
        unfused = {(UNFUSED, FORWARD): samples(4.0), (UNFUSED, BOTH): samples(9.0)}
        rows = [
            *results.rows(
                followed(LARGE_CASES[0], "relu"), "float32", MEASURED | unfused, modes[:2]
            ),
            *results.rows(LARGE_CASES[0], "float32", MEASURED, modes[:2]),
            *results.rows(LARGE_CASES[1], "float32", MEASURED, modes[:2]),
        ]
        return Report(described(TUNED), rows)

    reports = {}
    for setting in (TUNED, AS_FOUND):
        suffix = setting.replace(" ", "-")
        cases = (*LARGE_CASES, SMALL_CASE)
        reports[f"cases-{suffix}"] = of(cases, ["float32"], setting, 2)
        reports[f"halves-{suffix}"] = of(LARGE_CASES[:1], ["float16", "bfloat16"], setting, 2)
        reports[f"sizes-{suffix}"] = of(cases, ["float32"], setting, 2)
        reports[f"{GROUPS}cases-{suffix}"] = of_groups(["float32"], setting)
        reports[f"{GROUPS}halves-{suffix}"] = of_groups(["float16", "bfloat16"], setting)
    reports[f"{GROUPS}compiled"] = of_groups(["float32"], TUNED)
    reports["compiled"] = of(LARGE_CASES[:1], ["float32"], TUNED, 2)
    reports["followed"] = of_followed()
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
    # The small case counts for nothing here; torch was not measured.
    assert header[:4] == ["float32", "limit", "mlx.nn, as found", "mlx_welford, as found"]
    forward = ["BatchNorm forward, channels last", "1.50"]
    assert body[0] == [*forward, "16.0", "2.00", "16.0", "2.00"]
    assert [line[0] for line in lines_of(FORWARD, reports)[2:]] == ["one", "two"]
    assert [line[0] for line in lines_of("small", reports)[2:]] == ["little"] * 3
    assert lines_of("small", reports)[2] == [*("little", FORWARD, "12000", "1500", "12000", "1500")]
    halves = lines_of("halves", reports)[2]
    assert halves == ["one", FORWARD, "float16", "16.0", "2.00", "16.0", "2.00", "1.00"]
    assert lines_of("followed", reports) == [
        [
            *("case", "x", "mode", "mlx.nn, ms", "mlx.nn compiled, ms", "mlx_welford unfused, ms"),
            *("mlx_welford, ms", "BatchNorm alone, ms"),
        ],
        ["---"] * 8,
        ["one-relu", "8192x64", FORWARD, "12", "", "4.00", "1.50", "1.50"],
        ["one-relu", "8192x64", BOTH, "36", "", "9.00", "4.50", "4.50"],
    ]
    compiled = ["one", FORWARD, "12", "", "1.50"]
    assert lines_of("compiled", reports)[2][:5] == compiled
    assert lines_of("cold", reports)[2] == [OURS, "3.0", "1.5"]
    assert lines_of("sizes", reports)[0][4:6] == ["as found, ms", "1 of 2 threads, ms"]
    assert f"{environment()['cores']} cores" in report.machine(reports)


def test_tables_of_groups_tell_the_figures_of_groups() -> None:
    reports = made_up_reports()
    header, _, *body = lines_of("groups/forward", reports)
    assert header[:5] == ["case", "x", "groups", "limit", "mlx.nn, as found"]
    assert header[5:7] == ["InstanceNorm, as found", "mlx_welford, as found"]
    figures = ["16.0", "2.00", "2.00"]
    assert body == [
        [case, "2x64x64x64", groups, "1.5", *figures * 2]
        for case, groups in (("three", "8"), ("four", "32"))
    ]
    assert lines_of("groups/memory", reports)[0] == ["case", "x", BASELINE, INSTANCE, OURS]


def test_claims_tell_the_worst_case() -> None:
    """Of 32 groups in either order, and of torch's order: mlx.nn is faster in its own."""
    reports = made_up_reports()
    _, _, *body = lines_of("groups/claims", reports)
    assert [line[1] for line in body] == [
        *("at most 1.15", "at most 1.15", "at most 1.6", "at most 4.4", "at least 8")
    ]
    assert [line[2] for line in body] == [
        "yes: 1.00 (four), median 1.00",
        "no: 1.50 (four), median 1.50",
        "no: 2.00 (four), median 2.00",
        "no: 6.00 (four), median 6.00",
        "yes: 8.00 (three), median 8.00",
    ]


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
    assert list(drawn) == ["cases", "groups", "memory", "bandwidth", "scaling"]
    for data in drawn.values():
        assert ElementTree.fromstring(data).tag.endswith("svg")

    reports = made_up_reports()
    del reports["sizes-as-found"]
    some = {path.stem: path.read_bytes() for path in plots.draw(reports, tmp_path)}
    assert list(some) == ["cases", "groups", "memory", "scaling"]
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


def test_the_page_has_every_section() -> None:
    page = Path(report.__file__).parents[1] / "docs" / "performance.md"
    text = page.read_text(encoding="utf-8")
    for name in report.SECTIONS:
        assert text.count(f"<!-- begin: {name} -->") == 1, name
        assert text.count(f"<!-- end: {name} -->") == 1, name
