"""The plots of docs/performance.md, from the results of bench.suite."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mlx_welford.bench.implementations import BASELINE, BOTH, COPY, FORWARD, OURS, TORCH
from mlx_welford.bench.plot import COLOURS, cases, legend, save, style
from mlx_welford.bench.results import Report, Row
from mlx_welford.bench.settings import AS_FOUND, TUNED

from .suite import GROUPS

Reports = Mapping[str, Report]

LINES = {AS_FOUND: "--", TUNED: "-"}
MEBIBYTE = 2**20


def draw(reports: Reports, directory: Path) -> list[Path]:
    """Draws the plots for which there are figures."""
    wanted: dict[str, tuple[Callable[[Reports], Figure], tuple[str, ...]]] = {
        "cases": (_both_settings, ("cases-tuned", "cases-as-found")),
        "groups": (
            lambda reports: _both_settings(in_folder(reports, GROUPS)),
            (f"{GROUPS}cases-tuned", f"{GROUPS}cases-as-found"),
        ),
        "memory": (memory, ("cases-tuned",)),
        "bandwidth": (bandwidth, ("sizes-tuned", "sizes-as-found")),
        "scaling": (scaling, ("sizes-tuned",)),
    }
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    with style():
        for name, (make, needed) in wanted.items():
            if all(job in reports for job in needed):
                written.append(directory / f"{name}.svg")
                save(make(reports), written[-1])
    return written


def in_folder(reports: Reports, folder: str) -> Reports:
    """Those in a folder of the results, by their names there; "" is the top."""
    return {
        job.removeprefix(folder): report
        for job, report in reports.items()
        if job.startswith(folder) and "/" not in job.removeprefix(folder)
    }


def _both_settings(reports: Reports) -> Figure:
    """Of cases where the overhead of calls is small."""
    settings = {AS_FOUND: reports["cases-as-found"], TUNED: reports["cases-tuned"]}
    return cases(settings, least_bytes=MEBIBYTE)


def memory(reports: Reports) -> Figure:
    """Peak above the inputs in forward+backward."""
    large = [row for row in reports["cases-tuned"].rows if row.x_bytes >= MEBIBYTE]
    names = list(dict.fromkeys(row.case for row in large))
    figure = Figure(figsize=(6, 1.0 + 0.24 * len(names)), layout="constrained")
    panel = figure.subplots()
    for implementation in (BASELINE, TORCH, OURS):
        rows = reports["cases-tuned"].only(mode=BOTH, implementation=implementation).rows
        known = [(row.memory, row.case) for row in rows if row.memory is not None]
        shown = [(peak, names.index(case)) for peak, case in known if case in names]
        panel.scatter(
            [peak for peak, _ in shown],
            [place for _, place in shown],
            s=22,
            color=COLOURS[implementation],
            label=implementation,
        )
    panel.set(xlim=(0, None), xlabel=f"peak memory of {BOTH} above the inputs, in sizes of x")
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.grid(axis="x", linewidth=0.3)
    legend(figure, panel)
    return figure


def bandwidth(reports: Reports) -> Figure:
    """GB/s of the operation's own traffic against the size of x."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, mode in zip(panels, (FORWARD, BOTH), strict=True):
        for setting, job in ((TUNED, "sizes-tuned"), (AS_FOUND, "sizes-as-found")):
            for implementation in (COPY, BASELINE, TORCH, OURS):
                if implementation == COPY and setting == AS_FOUND:
                    continue  # its buffers are warm in both
                rows = reports[job].only(
                    implementation=implementation, mode=COPY if implementation == COPY else mode
                )
                _curve(
                    panel,
                    rows.rows,
                    lambda row: row.gigabytes_per_second,
                    color=COLOURS[implementation],
                    linestyle=LINES[setting],
                    label=implementation if setting == TUNED else None,
                )
        nominal = reports["sizes-tuned"].environment.get("nominal_gigabytes_per_second")
        if nominal:
            panel.axhline(float(nominal), color="black", linewidth=0.6, label="nominal")
        panel.set(title=mode, ylim=(0, None), xlabel="x, MiB; full: tuned, dashed: as found")
    panels[0].set_ylabel("GB/s")
    legend(figure, panels[0])
    return figure


def scaling(reports: Reports) -> Figure:
    """Milliseconds against the size of x, with all threads and with fewer."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    styles = ("-", "--", ":", "-.")
    counts = by_threads(reports)
    for panel, mode in zip(panels, (FORWARD, BOTH), strict=True):
        for line, (threads, report) in zip(styles, counts, strict=False):
            for implementation in (COPY, BASELINE, TORCH, OURS):
                own_mode = COPY if implementation == COPY else mode
                rows = report.only(implementation=implementation, mode=own_mode)
                _curve(
                    panel,
                    rows.rows,
                    lambda row: row.figures.milliseconds,
                    color=COLOURS[implementation],
                    linestyle=line,
                    label=f"{implementation}, {threads} thread{'s' if threads > 1 else ''}",
                )
        panel.set(yscale="log", title=f"{mode}, tuned", xlabel="x, MiB")
        panel.grid(which="major", linewidth=0.3)
    panels[0].set_ylabel("ms")
    legend(figure, panels[0], columns=4)
    return figure


def by_threads(reports: Reports) -> list[tuple[int, Report]]:
    """From most to fewest."""
    jobs = [job for job in reports if job == "sizes-tuned" or job.startswith("threads-")]
    counted = [(int(str(reports[job].environment["threads"])), reports[job]) for job in jobs]
    return sorted(counted, key=lambda pair: -pair[0])


def _curve(panel: Axes, rows: Sequence[Row], value: Callable[[Row], float], **style: Any) -> None:
    if not rows:
        return  # nor a line in the legend
    rows = sorted(rows, key=lambda row: row.x_bytes)
    panel.plot(
        [row.x_bytes / MEBIBYTE for row in rows],
        [value(row) for row in rows],
        marker="o",
        markersize=2.5,
        linewidth=1.2,
        **style,
    )
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.grid(axis="y", linewidth=0.3)
