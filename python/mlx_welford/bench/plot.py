"""The plot of a comparison, and what the plots of docs/performance.md share with it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .implementations import (
    BASELINE,
    BOTH,
    COMPILED,
    COPY,
    FORWARD,
    INSTANCE,
    OURS,
    OURS_COMPILED,
    TORCH,
    TORCH_MPS,
    UNFUSED,
)
from .results import Report

COLOURS = {
    BASELINE: "#8c8c8c",
    COMPILED: "#c9b26b",
    TORCH: "#c4453c",
    TORCH_MPS: "#e08a50",
    INSTANCE: "#6fa83c",
    UNFUSED: "#7a5ca8",
    OURS: "#1f6fb4",
    OURS_COMPILED: "#7fb2dc",
    COPY: "#222222",
}
STYLE: Any = {"svg.fonttype": "path", "svg.hashsalt": "bench", "font.size": 8, "axes.titlesize": 9}


def style() -> AbstractContextManager[None]:
    return mpl.rc_context(STYLE)


def draw(report: Report, path: Path) -> None:
    """The cases of one comparison."""
    with style():
        save(cases({str(report.environment["setting"]): report}), path)


def cases(reports: Mapping[str, Report], *, least_bytes: int = 0) -> Figure:
    """Time relative to the copy, a line for each case and dtype whose x is not smaller.

    Keys are settings. Dots of the last report are full, those of another one hollow.
    """
    *hollow, full = reports
    rows = [row for row in reports[full].rows if row.x_bytes >= least_bytes]
    lines = list(dict.fromkeys((row.case, row.dtype) for row in rows))
    dtypes = {dtype for _, dtype in lines}
    names = [case if len(dtypes) == 1 else f"{case} {dtype}" for case, dtype in lines]
    figure = Figure(figsize=(9, 1.1 + 0.24 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, mode in zip(panels, (FORWARD, BOTH), strict=True):
        for setting, report in reports.items():
            for implementation, colour in COLOURS.items():
                rows = report.only(mode=mode, implementation=implementation).rows
                rows = [row for row in rows if (row.case, row.dtype) in lines]
                if not rows:
                    continue  # nor in the legend
                panel.scatter(
                    [row.copies for row in rows],
                    [lines.index((row.case, row.dtype)) for row in rows],
                    s=22,
                    facecolors=colour if setting == full else "none",
                    edgecolors=colour,
                    linewidths=1,
                    label=implementation if setting == full else None,
                )
        limits = {
            (row.case, row.dtype): row.limit
            for row in reports[full].only(mode=mode).rows
            if (row.case, row.dtype) in lines
        }
        panel.scatter(
            limits.values(),
            [lines.index(line) for line in limits],
            marker="|",
            s=90,
            color="black",
            linewidths=1,
            label="limit by traffic",
        )
        dots = f"full: {full}, hollow: {', '.join(hollow)}" if hollow else full
        panel.set(xscale="log", title=mode, xlabel=f"time in copies of x; {dots}")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("")
        panel.grid(axis="x", which="both", linewidth=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    legend(figure, panels[0])
    return figure


def legend(figure: Figure, panel: Axes, columns: int = 6) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)


def save(figure: Figure, path: Path) -> None:
    """An SVG has no date and no spaces at the ends of lines."""
    if path.suffix != ".svg":
        figure.savefig(path, dpi=150)
        return
    figure.savefig(path, metadata={"Date": None})
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
