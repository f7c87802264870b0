"""The figures of one case as a table in the terminal."""

from collections.abc import Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .environment import Environment
from .implementations import COPY, OURS
from .results import Row

HEADINGS = ("ms", "20-80 %", "copies", "x mlx.nn", "memory/x", "GB/s")


def table(of_one_case: Sequence[Row], environment: Environment) -> Table:
    first = of_one_case[0]
    shape = "x".join(map(str, first.shape))
    norm = f"{first.norm}({first.groups})" if first.groups else first.norm
    nominal = environment.get("nominal_gigabytes_per_second")
    notes = sorted({row.note for row in of_one_case if row.note})
    result = Table(
        title=f"{first.model}: {norm} {shape} ({environment['setting']})",
        caption="\n".join(f"* {text}" for text in notes) or None,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for heading in ("mode", "dtype", "implementation"):
        result.add_column(heading, no_wrap=True)
    for heading in (*HEADINGS, *(["of nominal"] if nominal else [])):
        result.add_column(heading, justify="right", no_wrap=True)

    for (mode, dtype), group in groupby(of_one_case, key=lambda row: (row.mode, row.dtype)):
        for index, row in enumerate(group):
            figures = row.figures
            shown = [
                f"{figures.milliseconds:.2f}",
                f"{figures.low:.2f}-{figures.high:.2f}",
                f"{row.copies:.1f}",
                "" if row.speed is None else f"{row.speed:.1f}",
                "" if row.memory is None or row.implementation == COPY else f"{row.memory:.2f}",
                f"{row.gigabytes_per_second:.1f}",
            ]
            if nominal:
                shown.append(f"{100 * row.gigabytes_per_second / float(nominal):.0f} %")
            result.add_row(
                mode if index == 0 and mode != COPY else "",
                dtype if index == 0 else "",
                row.implementation + (" *" if row.note else ""),
                *shown,
                style="bold" if row.implementation == OURS else None,
            )
        result.add_section()
    return result
