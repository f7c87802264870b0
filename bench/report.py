"""Make plots and tables of what bench.suite measured.

    python -m bench.report                              plots in build/bench
    python -m bench.report --write docs/performance.md
        the tables between its markers, plots in a folder beside it

README.md beside this file says what they mean.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_welford.bench.implementations import (
    BASELINE,
    BOTH,
    COPY,
    EVALUATION,
    FORWARD,
    INSTANCE,
    OF_MLX,
    OURS,
    TORCH,
    UNFUSED,
)
from mlx_welford.bench.results import Report, Row
from mlx_welford.bench.settings import TUNED

from . import macs, plots
from .plots import MEBIBYTE, Reports, in_folder
from .suite import COLD, FOLLOWED, GROUPS, RESULTS, SUFFIXES

NAMES = (BASELINE, TORCH, INSTANCE, OURS)

# Of the table of ratios: operation, layer, whether channels are last, mode.
OPERATIONS = (
    ("BatchNorm forward, channels last", "BatchNorm", True, FORWARD),
    ("BatchNorm forward, channels first", "BatchNorm", False, FORWARD),
    ("BatchNorm forward+backward, channels last", "BatchNorm", True, BOTH),
    ("BatchNorm forward+backward, channels first", "BatchNorm", False, BOTH),
    ("InstanceNorm forward, channels last", "InstanceNorm", True, FORWARD),
    ("InstanceNorm forward, channels first", "InstanceNorm", False, FORWARD),
    ("InstanceNorm forward+backward, channels last", "InstanceNorm", True, BOTH),
    ("InstanceNorm forward+backward, channels first", "InstanceNorm", False, BOTH),
    ("BatchNorm evaluation, channels last", "BatchNorm", True, EVALUATION),
    ("BatchNorm evaluation, channels first", "BatchNorm", False, EVALUATION),
)


# Sections


def machine(reports: Reports) -> str:
    """Where the figures come from; the same for all jobs but for setting, threads and load."""
    environment = reports["cases-tuned"].environment
    told = {
        "date": "",
        "cpu": "",
        "cores": " cores",
        "device": "",
        "system": "",
        "mlx": "mlx ",
        "torch": "torch ",
        "numpy": "numpy ",
        "python": "Python ",
        "commit": "commit ",
        "load_average": "load average ",
    }
    words = []
    for name, unit in told.items():
        value = environment.get(name)
        if value is not None:
            words.append(f"{value}{unit}" if name == "cores" else f"{unit}{value}")
    tuned = {str(r.environment["tuned"]) for r in reports.values() if _setting(r) == TUNED}
    left_out = sorted({what for report in reports.values() for what in report.left_out})
    lines = [", ".join(words) + "."]
    lines += [f"*Tuned*: {what}." for what in sorted(tuned)]
    lines += [f"Left out: {'; '.join(left_out)}."] if left_out else []
    return "\n\n".join(lines)


def ratios(reports: Reports) -> str:
    """Every operation: from the best to the worst case of 32 MB and more, in copies."""
    columns = _columns(reports, "cases")
    header = ["float32", "limit", *(f"{name}, {setting}" for name, setting in columns)]
    body = []
    for label, norm, channels_last, mode in OPERATIONS:
        chosen = {
            setting: reports[f"cases-{suffix}"].only(
                norm=norm, channels_last=channels_last, mode=mode
            )
            for setting, suffix in SUFFIXES.items()
        }
        limits = [row.limit for row in _large(chosen[TUNED].only(implementation=OURS))]
        if limits:
            found = [_large(chosen[setting].only(implementation=name)) for name, setting in columns]
            spans = [_span(row.copies for row in rows) for rows in found]
            body.append([label, _span(limits), *spans])
    return _markdown(header, body)


def of_mode(mode: str) -> Callable[[Reports], str]:
    def section(reports: Reports) -> str:
        """Every case of 1 MiB and more in copies."""
        columns = _columns(reports, "cases")
        grouped = any(row.groups for row in reports["cases-tuned"].rows)
        header = ["case", "x", *(["groups"] if grouped else []), "limit"]
        header += [f"{name}, {setting}" for name, setting in columns]
        large = _large(reports["cases-tuned"].only(mode=mode, implementation=OURS))
        body = [
            [
                row.case,
                _shape(row),
                *([f"{row.groups}"] if grouped else []),
                f"{row.limit:.2g}",
                *(_copies(reports[f"cases-{SUFFIXES[s]}"], row, mode, name) for name, s in columns),
            ]
            for row in large
        ]
        best, worst = (choose(large, key=lambda row: row.copies) for choose in (min, max))
        cliff = (
            f"The slowest shape, {worst.case}, takes {worst.copies / best.copies:.2f} times as "
            f"many copies as the fastest, {best.case} (tuned)."
        )
        return f"{_markdown(header, body)}\n\n{cliff}"

    return section


def halves(reports: Reports) -> str:
    """16 bits: copies of x in its own type, and our time relative to float32."""
    columns = _columns(reports, "halves")
    header = ["case", "mode", "dtype", *(f"{name}, {setting}" for name, setting in columns)]
    header.append("ms by ms in float32")
    body = []
    for row in reports["halves-tuned"].only(implementation=OURS).rows:
        time = row.figures.milliseconds
        whole = _find(reports["cases-tuned"], row.case, row.mode, OURS)
        body.append(
            [
                row.case,
                row.mode,
                row.dtype,
                *(
                    _copies(reports[f"halves-{SUFFIXES[s]}"], row, row.mode, name, row.dtype)
                    for name, s in columns
                ),
                "" if whole is None else f"{time / whole.figures.milliseconds:.2f}",
            ]
        )
    return _markdown(header, body)


def small(reports: Reports) -> str:
    """64 KB in microseconds."""
    columns = _columns(reports, "cases")
    header = ["case", "mode", *(f"{name}, {setting}" for name, setting in columns)]
    rows = reports["cases-tuned"].only(implementation=OURS).rows
    body = []
    for row in (row for row in rows if row.x_bytes < MEBIBYTE):
        found = [
            _find(reports[f"cases-{SUFFIXES[s]}"], row.case, row.mode, name) for name, s in columns
        ]
        times = ["" if f is None else f"{1e3 * f.figures.milliseconds:.0f}" for f in found]
        body.append([row.case, row.mode, *times])
    return _markdown(header, body)


def compiled(reports: Reports) -> str:
    """Under mx.compile: milliseconds and memory."""
    report = reports["compiled"]
    header = ["case", "mode", *(f"{n}, ms" for n in OF_MLX), *(f"{n}, memory" for n in OF_MLX)]
    body = []
    for row in report.only(implementation=OURS).rows:
        found = [_find(report, row.case, row.mode, name) for name in OF_MLX]
        times = [_milliseconds(f) for f in found]
        body.append([row.case, row.mode, *times, *(_memory(f) for f in found)])
    return _markdown(header, body)


def followed(reports: Reports) -> str:
    """Milliseconds of layers with an activation and a residual, and of ours alone."""
    report = reports["followed"]
    of_epilogues = report.only(implementation=UNFUSED).rows
    alone = {
        (row.shape, row.mode): row
        for row in report.only(implementation=OURS).rows
        if row.case not in {row.case for row in of_epilogues}
    }
    body = []
    for row in of_epilogues:
        found = [_find(report, row.case, row.mode, name) for name in FOLLOWED]
        times = [_milliseconds(f) for f in (*found, alone.get((row.shape, row.mode)))]
        body.append([row.case, _shape(row), row.mode, *times])
    header = ["case", "x", "mode", *(f"{name}, ms" for name in FOLLOWED), "BatchNorm alone, ms"]
    return _markdown(header, body)


def memory(reports: Reports) -> str:
    """Peak above the inputs in forward+backward, in sizes of x."""
    names = [name for name, setting in _columns(reports, "cases") if setting == TUNED]
    body = []
    for row in reports["cases-tuned"].only(implementation=OURS, mode=BOTH).rows:
        found = [_find(reports["cases-tuned"], row.case, BOTH, name) for name in names]
        body.append([row.case, _shape(row), *(_memory(f) for f in found)])
    return _markdown(["case", "x", *names], body)


def sizes(reports: Reports) -> str:
    """Milliseconds and GB/s against size, and against threads."""
    by_threads = plots.by_threads(reports)
    most = by_threads[0][0]
    header = ["x", "copy, ms"]
    for mode in (FORWARD, BOTH):
        header += [f"{mode}, ms", "GB/s", "as found, ms"]
        header += [f"{n} of {most} threads, ms" for n, _ in by_threads[1:]]
    body = []
    for copy in _by_size(reports["sizes-tuned"].only(implementation=COPY).rows):
        line = [_size(copy.x_bytes), _milliseconds(copy)]
        for mode in (FORWARD, BOTH):
            ours = _find(reports["sizes-tuned"], copy.case, mode, OURS)
            line.append(_milliseconds(ours))
            line.append("" if ours is None else f"{ours.gigabytes_per_second:.1f}")
            line.append(_milliseconds(_find(reports["sizes-as-found"], copy.case, mode, OURS)))
            line += [_milliseconds(_find(r, copy.case, mode, OURS)) for _, r in by_threads[1:]]
        body.append(line)
    return _markdown(header, body)


def cold(reports: Reports) -> str:
    """The first call in a new process, and later ones."""
    body = []
    for name in COLD:
        report = reports.get(f"cold-{name.replace(' ', '-')}")
        if report is not None:
            row = report.only(implementation=name).rows[0]
            first, later = row.figures.first, row.figures.milliseconds
            body.append([name, f"{first:.1f}", f"{later:.1f}"])
    return _markdown(["implementation", "first call, ms", "later calls, ms"], body)


@dataclass(frozen=True)
class Claim:
    """A bound of a ratio, that each case of 32 MB and more has to keep which the claim covers."""

    text: str
    mode: str
    bound: float
    ratio: Callable[[Report, Row], float | None]
    covers: Callable[[Row], bool]
    at_least: bool = False


def _by_instance_norm(report: Report, row: Row) -> float | None:
    other = _find(report, row.case, row.mode, INSTANCE)
    return None if other is None else row.figures.milliseconds / other.figures.milliseconds


def _copies_of_x(_: Report, row: Row) -> float:
    return row.copies


def _has_32_groups(row: Row) -> bool:
    """As in diffusion models; a few large groups fit the caches less than instances do."""
    return row.groups == 32


CLAIMS = (
    Claim(
        "32 groups: forward, in times of InstanceNorm",
        FORWARD,
        1.15,
        _by_instance_norm,
        _has_32_groups,
    ),
    Claim(
        "32 groups: forward+backward, in times of InstanceNorm",
        BOTH,
        1.15,
        _by_instance_norm,
        _has_32_groups,
    ),
    Claim("32 groups: forward, in copies", FORWARD, 1.6, _copies_of_x, _has_32_groups),
    Claim("32 groups: forward+backward, in copies", BOTH, 4.4, _copies_of_x, _has_32_groups),
    Claim(
        "forward+backward, times as fast as mlx.nn in torch's order of groups",
        BOTH,
        8,
        lambda _, row: row.speed,
        lambda row: not row.interleaved,
        at_least=True,
    ),
)


def claims(reports: Reports) -> str:
    """Whether each claim holds in all cases, its worst case, and the median of all."""
    body = []
    for claim in CLAIMS:
        cells = [f"at {'least' if claim.at_least else 'most'} {claim.bound:g}"]
        for suffix in SUFFIXES.values():
            report = reports[f"cases-{suffix}"]
            rows = report.only(implementation=OURS, mode=claim.mode).rows
            ratios = {row.case: claim.ratio(report, row) for row in rows if claim.covers(row)}
            known = [(ratio, case) for case, ratio in ratios.items() if ratio is not None]
            if not known:
                cells.append("")
                continue
            ratio, case = (min if claim.at_least else max)(known)
            holds = ratio >= claim.bound if claim.at_least else ratio <= claim.bound
            middle = statistics.median(ratio for ratio, _ in known)
            answer = "yes" if holds else "no"
            cells.append(f"{answer}: {_number(ratio)} ({case}), median {_number(middle)}")
        body.append([claim.text, *cells])
    return _markdown(["claim", "bound", *SUFFIXES], body)


Section = tuple[Callable[[Reports], str], tuple[str, ...]]
"""What makes it, and the jobs that it needs."""

CASES = ("cases-tuned", "cases-as-found")

COMMON: dict[str, Section] = {
    "machine": (machine, ("cases-tuned",)),
    FORWARD: (of_mode(FORWARD), CASES),
    BOTH: (of_mode(BOTH), CASES),
    "halves": (halves, ("halves-tuned", "halves-as-found", "cases-tuned")),
    "compiled": (compiled, ("compiled",)),
    "memory": (memory, CASES),
}


def _sections(folder: str, sections: Mapping[str, Section]) -> dict[str, Section]:
    """Sections of the results in a folder, by their names in documents."""

    def of_folder(make: Callable[[Reports], str]) -> Callable[[Reports], str]:
        return lambda reports: make(in_folder(reports, folder))

    return {
        folder + name: (of_folder(make), tuple(folder + job for job in jobs))
        for name, (make, jobs) in sections.items()
    }


SECTIONS = _sections(
    "",
    COMMON
    | {
        "ratios": (ratios, CASES),
        EVALUATION: (of_mode(EVALUATION), CASES),
        "small": (small, CASES),
        "followed": (followed, ("followed",)),
        "sizes": (sizes, ("sizes-tuned", "sizes-as-found")),
        "cold": (cold, ("cold-mlx_welford",)),
    },
) | _sections(GROUPS, COMMON | {"claims": (claims, CASES)})


# Parts of tables


def _columns(reports: Reports, job: str) -> list[tuple[str, str]]:
    """Implementation and setting of each column: those that were measured."""
    return [
        (name, setting)
        for setting, suffix in SUFFIXES.items()
        for name in NAMES
        if reports[f"{job}-{suffix}"].only(implementation=name).rows
    ]


def _setting(report: Report) -> str:
    return str(report.environment["setting"])


def _by_size(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.x_bytes)


def _large(report: Report) -> list[Row]:
    """Whose time is not that of calls."""
    return [row for row in report.rows if row.x_bytes >= MEBIBYTE]


def _find(
    report: Report, case: str, mode: str, implementation: str, dtype: str = "float32"
) -> Row | None:
    rows = report.only(case=case, mode=mode, implementation=implementation, dtype=dtype).rows
    return rows[0] if rows else None


def _copies(report: Report, row: Row, mode: str, name: str, dtype: str = "float32") -> str:
    found = _find(report, row.case, mode, name, dtype)
    return "" if found is None else _number(found.copies)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _span(values: Iterable[float]) -> str:
    values = list(values)
    if not values:
        return ""
    low, high = _number(min(values)), _number(max(values))
    return low if low == high else f"{low} to {high}"


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return ""
    ms = row.figures.milliseconds
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 10 else f"{ms:.0f}"


def _memory(row: Row | None) -> str:
    return "" if row is None or row.memory is None else f"{row.memory:.2f}"


def _shape(row: Row) -> str:
    return "x".join(map(str, row.shape))


def _size(count: int) -> str:
    return f"{count >> 10} KB" if count < MEBIBYTE else f"{count >> 20} MB"


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# Files


def read(directory: Path) -> dict[str, Report]:
    """The reports by job."""
    return {
        path.relative_to(directory).with_suffix("").as_posix(): Report.read(path)
        for path in sorted(directory.rglob("*.json"))
    }


def refresh(text: str, reports: Reports) -> str:
    """`text` with what stands between markers made anew; a section without figures stays."""

    def section(match: re.Match[str]) -> str:
        name = match["name"]
        if name == macs.SECTION:  # made from other files, by macs.py
            return match[0]
        if name not in SECTIONS:
            raise ValueError(
                f"[refresh] a section must be one of {', '.join(SECTIONS)} but got '{name}'."
            )
        make, needed = SECTIONS[name]
        if not reports or any(job not in reports for job in needed):
            return match[0]
        return f"<!-- begin: {name} -->\n\n{make(reports)}\n\n<!-- end: {name} -->"

    pattern = r"<!-- begin: (?P<name>\S+) -->.*?<!-- end: (?P=name) -->"
    return re.sub(pattern, section, text, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIRECTORY")
    parser.add_argument(
        "--write", type=Path, nargs="+", default=[], metavar="FILE", help="refresh its tables"
    )
    options = parser.parse_args(argv)

    reports = read(options.results)
    if not reports:
        parser.error(f"no figures in {options.results}: run bench.suite")
    directory = options.results
    for path in options.write:
        text = path.read_text(encoding="utf-8")
        path.write_text(refresh(text, reports), encoding="utf-8")
    if options.write:
        directory = options.write[0].with_suffix("")
    for path in plots.draw(reports, directory):
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
