"""Make the table of Apple's chips in docs/macs.md from the files that `selftest --publish` wrote.

    python -m bench.macs                       print the table
    python -m bench.macs --write docs/macs.md  put it between the markers in this file

Each file in results/ holds what one chip measured. What has not been measured is said, too.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlx_welford.selftest.chips import CHIPS

RESULTS = Path(__file__).resolve().parents[1] / "results"
SECTION = "chips"
HEADER = (
    "chip",
    "passed",
    "BatchNorm forward+backward, GB/s",
    "of the chip's",
    "of a copy",
    "times as fast as mlx.nn",
    "measured",
)
MODE = "forward+backward"

Published = dict[str, Any]


def read(folder: Path) -> list[Published]:
    """What was measured on GPUs, in the order of the chips and of their GPU cores."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    on_gpus = [published for published in found if published["backend"] == "metal"]

    def key(published: Published) -> tuple[int, str, int]:
        name = _name(published)
        place = CHIPS.index(name) if name in CHIPS else len(CHIPS)
        return place, name, published["gpu_cores"] or 0

    return sorted(on_gpus, key=key)


def table(every: Sequence[Published]) -> str:
    """A row for each file, and one for all chips that there is none of."""
    rows = [_row(published) for published in every]
    measured = {_name(published) for published in every}
    missing = [chip for chip in CHIPS if chip not in measured]
    if missing:
        rows.append((", ".join(missing), "not measured yet", *[""] * (len(HEADER) - 2)))
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def refresh(text: str, every: Sequence[Published]) -> str:
    """`text` with the table between the markers made anew; ValueError if there are none."""
    begin, end = f"<!-- begin: {SECTION} -->", f"<!-- end: {SECTION} -->"
    if begin not in text or end not in text:
        raise ValueError(f"[refresh] the text must have the markers {begin} and {end}.")
    pattern = re.compile(f"{begin}.*?{end}", re.DOTALL)
    return pattern.sub(lambda match: f"{begin}\n\n{table(every)}\n\n{end}", text)


def _name(published: Published) -> str:
    return str(published["chip"]).removeprefix("Apple ")


def _row(published: Published) -> tuple[str, ...]:
    cores = published["gpu_cores"]
    parts = published["cases"] + published["programs"]
    passed = published["cases_passed"] + published["programs_passed"]
    times = [
        row
        for row in published["times"]
        if (row["layer"], row["mode"], row["dtype"]) == ("batch", MODE, "float32")
    ]
    # The largest, since small arrays stay in a cache.
    largest = max(times, key=lambda row: row["planned_bytes"])
    speed = largest["gigabytes_per_second"]
    nominal = published["nominal_gigabytes_per_second"]
    return (
        f"{_name(published)}, {cores} GPU cores" if cores else _name(published),
        f"{passed} of {parts}",
        f"{speed:.0f}",
        "unknown" if nominal is None else f"{speed / nominal:.0%} of {nominal:g}",
        f"{largest['share_of_copy']:.0%}",
        _span(row["times_as_fast"] for row in published["times"]),
        f"{published['date']}, {published['system']}, {published['mlx_welford']} "
        f"with mlx {published['mlx']}",
    )


def _span(values: Iterable[float]) -> str:
    values = list(values)
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIRECTORY")
    parser.add_argument("--write", type=Path, metavar="FILE", help="refresh its table")
    options = parser.parse_args(argv)

    every = read(options.results)
    if options.write is None:
        print(table(every))
        return 0
    text = options.write.read_text(encoding="utf-8")
    options.write.write_text(refresh(text, every), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
