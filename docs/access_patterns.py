"""Draws docs/access_patterns.svg: python docs/access_patterns.py [OUTPUT]

Which thread reads which vector in the two access patterns, and how their results merge. Drawn with
simdgroups of eight lanes and threadgroups of two simdgroups; on a GPU they are 32 and up to 32.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

LANES = 8
THREADS = 16
COLUMNS = ["#1f77b4", "#d95f02", "#2a9d5c", "#8e5bb5"]  # a colour for each statistic
GREY = "#555555"


def shade(colour: str, simdgroup: int) -> tuple[float, float, float]:
    """Lighter for the first simdgroup."""
    weight = (0.28, 0.62)[simdgroup]
    red, green, blue = mpl.colors.to_rgb(colour)
    return (1 - weight + weight * red, 1 - weight + weight * green, 1 - weight + weight * blue)


def cell(
    ax: Axes, x: float, y: float, label: str, colour: Any, width: float = 1, height: float = 1
) -> None:
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=1))
    ax.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=7.5)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=7, linewidth=0.8, color=colour, shrinkA=0
        )
    )


def note(ax: Axes, x: float, y: float, text: str, **style: Any) -> None:
    ax.text(x, y, text, **{"fontsize": 8, "color": GREY, "va": "center", **style})


def brace(ax: Axes, x: float, low: float, high: float, text: str) -> None:
    """A bracket left of rows low..high."""
    ax.plot([x + 0.25, x, x, x + 0.25], [low, low, high, high], color=GREY, linewidth=0.8)
    note(ax, x - 0.2, (low + high) / 2, text, rotation=90, ha="right")


# Where the three stages of a merge stand, on the right of both patterns.
LANE_X, ENTRY_X, RESULT_X, FINAL_X = 17.0, 23.4, 28.6, 33.2


def merge(ax: Axes, top: float, statistics: int) -> None:
    """Registers -> entries of threadgroup memory -> partial results -> the statistic."""
    pitch = 0.62
    height = 0.52
    for g in range(2):
        base = top - g * (LANES * pitch + 0.7)
        for lane in range(LANES):
            a = lane % statistics
            y = base - lane * pitch
            cell(
                ax,
                LANE_X,
                y,
                f"t{g * LANES + lane}",
                shade(COLUMNS[a], g),
                width=1.3,
                height=height,
            )
            entry_y = base - (LANES / 2 + a - (statistics - 1) / 2) * pitch
            arrow(
                ax,
                (LANE_X + 1.35, y + height / 2),
                (ENTRY_X - 0.05, entry_y + height / 2),
                COLUMNS[a],
            )
        for a in range(statistics):
            y = base - (LANES / 2 + a - (statistics - 1) / 2) * pitch
            cell(ax, ENTRY_X, y, f"e{g * statistics + a}", shade(COLUMNS[a], g), 1.3, height)
            result_y = top - (LANES + 0.6 + a - (statistics - 1) / 2) * pitch
            arrow(
                ax,
                (ENTRY_X + 1.35, y + height / 2),
                (RESULT_X - 0.05, result_y + height / 2),
                COLUMNS[a],
            )
    for a in range(statistics):
        y = top - (LANES + 0.6 + a - (statistics - 1) / 2) * pitch
        cell(ax, RESULT_X, y, f"(piece 0, {a})", shade(COLUMNS[a], 1), 2.4, height)
        low = y - 5.4 * pitch
        cell(ax, RESULT_X, low, f"(piece 1, {a})", shade(COLUMNS[a], 0), 2.4, height)
        final = (y + low) / 2
        for start in (y, low):
            arrow(
                ax,
                (RESULT_X + 2.45, start + height / 2),
                (FINAL_X - 0.05, final + height / 2),
                COLUMNS[a],
            )
        cell(ax, FINAL_X, final, f"mean, var {a}", shade(COLUMNS[a], 1), 2.9, height)
    heading = {"fontsize": 8, "ha": "center", "va": "bottom"}
    y = top + 1.0
    note(ax, LANE_X + 0.65, y, "registers:\nchains of a thread", **heading)
    note(ax, (LANE_X + ENTRY_X) / 2 + 0.65, y, "shuffles", **heading)
    note(ax, ENTRY_X + 0.65, y, "threadgroup\nmemory", **heading)
    note(ax, RESULT_X + 1.2, y, "partial results in\ndevice memory", **heading)
    note(ax, FINAL_X + 1.45, y, "merge\ndispatch", **heading)


def columns(ax: Axes) -> None:
    """Sixteen positions of six vectors: a strip of four, and part of the next."""
    across, positions, pieces = 4, 8, 2
    left = 3.4
    ax.text(0.6, 18.3, "Columns: inner > 1, lanes across neighbouring statistics", fontsize=10.5)
    for row in range(positions * pieces):
        y = 15.2 - row * 0.88 - (row // positions) * 0.35
        for a in range(across):
            thread = row % positions % (THREADS // across) * across + a
            colour = shade(COLUMNS[a], thread // LANES) if row < positions else "#f0f0f0"
            cell(ax, left + a * 1.7, y, f"t{thread}", colour, 1.7, 0.88)
        for a in range(across, across + 2):
            cell(ax, left + 0.25 + a * 1.7, y, "", "#f0f0f0", 1.7, 0.88)
    brace(ax, 2.9, 9.05, 16.05, "piece 0: this threadgroup")
    brace(ax, 2.9, 1.65, 8.65, "piece 1: another")
    note(ax, left + 3.4, 16.6, "strip: across = 4 vectors of V columns", ha="center")
    note(ax, left + 8.75, 16.6, "next strip", ha="center")
    note(ax, 0.6, 9, "positions along the reduction", rotation=90, ha="center")
    note(ax, left + 5.2, 1.0, "memory runs to the right, then down", ha="center")
    merge(ax, 13.6, across)


def rows(ax: Axes) -> None:
    """Two pieces of a segment that begins in the middle of a vector of four elements."""
    top, left = -3.3, 1.55
    ax.text(
        0.6,
        top + 2.2,
        "Rows: inner == 1, lanes along the reduction of one statistic",
        fontsize=10.5,
    )
    height, element, vector = 0.88, 0.55, 1.6
    y = top - 0.6
    for piece, tail in enumerate((2, 1)):
        colours = [shade(COLUMNS[0], g) if piece == 0 else "#f0f0f0" for g in range(2)]
        high = y + height
        for i in range(2):
            cell(ax, left + i * element, y, f"t{i}", colours[0], element, height)
        note(ax, left + 1.4, y + height / 2, "elements before the first aligned vector")
        for line in range(4):
            y -= height
            for k in range(LANES):
                thread = (line * LANES + k) % THREADS
                colour = colours[thread // LANES]
                cell(ax, left + k * vector, y, f"t{thread}", colour, vector, height)
        y -= height
        for i in range(tail):
            cell(ax, left + i * element, y, f"t{2 + i}", colours[0], element, height)
        note(ax, left + 1.4, y + height / 2, "and after the last")
        brace(ax, 1.2, y, high, ("piece 0: this threadgroup", "piece 1: another")[piece])
        y -= height + 0.35
    note(
        ax, left + 6.4, y + 0.5, "one segment; memory runs to the right, line by line", ha="center"
    )
    merge(ax, top - 0.9, 1)


def main(output: Path) -> None:
    mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "access", "font.size": 8})
    figure, ax = plt.subplots(figsize=(11, 9.4))
    columns(ax)
    rows(ax)
    ax.set_xlim(0, 37)
    ax.set_ylim(-15.0, 19.2)
    ax.axis("off")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None, dpi=110)
    if output.suffix == ".svg":
        lines = output.read_text(encoding="utf-8").splitlines()
        output.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
