"""The figures of a comparison: as a table, as JSON and as a plot."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from contestants import BASELINE, COMPILED, COPY, OURS, note
from environment import Environment
from harness import Figures
from rich.box import SIMPLE_HEAD
from rich.table import Table
from workloads import Case


@dataclass(frozen=True)
class Row:
    """One contestant in one case, dtype and mode."""

    case: str
    model: str
    norm: str
    shape: tuple[int, ...]
    dtype: str
    mode: str
    contestant: str
    figures: Figures
    copies: float  # time in copies of x
    speed: float  # how many times as fast as mlx.nn
    memory: float  # peak above the inputs in sizes of x
    note: str


def rows(
    case: Case, dtype: str, mode: str, x_bytes: int, measured: Mapping[str, Figures]
) -> list[Row]:
    """Figures of all contestants with their ratios."""
    return [
        Row(
            case=case.name,
            model=case.model,
            norm=case.norm,
            shape=case.shape,
            dtype=dtype,
            mode=mode,
            contestant=name,
            figures=figures,
            copies=figures.milliseconds / measured[COPY].milliseconds,
            speed=measured[BASELINE].milliseconds / figures.milliseconds,
            memory=figures.peak_bytes / x_bytes,
            note=note(case, name),
        )
        for name, figures in measured.items()
    ]


# JSON


@dataclass(frozen=True)
class Report:
    environment: Environment
    rows: list[Row]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> "Report":
        data = json.loads(path.read_text())
        return Report(
            data["environment"],
            [
                Row(**{**row, "shape": tuple(row["shape"]), "figures": Figures(**row["figures"])})
                for row in data["rows"]
            ],
        )


# Table


def table(of_one_case: Sequence[Row]) -> Table:
    first = of_one_case[0]
    shape = "x".join(map(str, first.shape))
    notes = sorted({row.note for row in of_one_case if row.note})
    result = Table(
        title=f"{first.model}: {first.norm} {shape}",
        caption="\n".join(f"* {text}" for text in notes) or None,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for heading in ("mode", "dtype", "contestant"):
        result.add_column(heading, no_wrap=True)
    for heading in ("ms", "20-80 %", "copies", "x mlx.nn", "memory/x"):
        result.add_column(heading, justify="right", no_wrap=True)

    for (mode, dtype), group in groupby(of_one_case, key=lambda row: (row.mode, row.dtype)):
        for index, row in enumerate(group):
            figures = row.figures
            result.add_row(
                mode if index == 0 else "",
                dtype if index == 0 else "",
                row.contestant + (" *" if row.note else ""),
                f"{figures.milliseconds:.2f}",
                f"{figures.low:.2f}-{figures.high:.2f}",
                f"{row.copies:.1f}",
                "" if row.contestant == COPY else f"{row.speed:.1f}",
                f"{row.memory:.2f}",
                style="bold" if row.contestant == OURS else None,
            )
        result.add_section()
    return result


# Plot

COLOURS = {BASELINE: "#8c8c8c", COMPILED: "#d08c2f", OURS: "#1f6fb4"}


def plot(report: Report, path: Path) -> None:
    """Time in copies of x: a panel for every dtype and mode, a line for every case."""
    # No pyplot: it would look for a display.
    from matplotlib.figure import Figure

    cases = _distinct(row.case for row in report.rows)
    dtypes = _distinct(row.dtype for row in report.rows)
    modes = _distinct(row.mode for row in report.rows)
    figure = Figure(
        figsize=(1.6 + 3.4 * len(modes), 1.4 + len(dtypes) * (0.6 + 0.32 * len(cases))),
        layout="constrained",
    )
    panels = figure.subplots(len(dtypes), len(modes), sharex=True, sharey=True, squeeze=False)
    for i, dtype in enumerate(dtypes):
        for j, mode in enumerate(modes):
            panel = panels[i][j]
            chosen = [row for row in report.rows if (row.dtype, row.mode) == (dtype, mode)]
            for name, colour in COLOURS.items():
                points = [row for row in chosen if row.contestant == name]
                panel.errorbar(
                    [row.copies for row in points],
                    [cases.index(row.case) for row in points],
                    xerr=np.array([_spread(row) for row in points]).reshape(-1, 2).T,
                    fmt="o",
                    markersize=5,
                    color=colour,
                    label=name,
                )
            panel.axvline(1, color="black", linewidth=0.8, linestyle="--")
            panel.set_xscale("log")
            panel.set_yticks(range(len(cases)), cases)
            panel.set_title(f"{mode}, {dtype}", fontsize=10)
            panel.grid(axis="x", which="both", linewidth=0.3)
    panels[0][0].invert_yaxis()
    for panel in panels[-1]:
        panel.set_xlabel("time in copies of x")
    environment = report.environment
    figure.suptitle(
        f"{environment['cpu']}, {environment['cores']} cores, mlx {environment['mlx']}", fontsize=9
    )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    figure.savefig(path, dpi=150)


def _spread(row: Row) -> tuple[float, float]:
    """How far the percentiles lie from the median, in copies of x."""
    figures = row.figures
    unit = row.copies / figures.milliseconds
    return unit * (figures.milliseconds - figures.low), unit * (figures.high - figures.milliseconds)


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
