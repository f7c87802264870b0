"""Makes docs/dossier.md of docs/dossier.toml: python docs/dossier.py"""

import tomllib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PAGE = FOLDER / "dossier.md"
INTRODUCTION = """\
# Faults elsewhere

<!-- Made by `python docs/dossier.py` of docs/dossier.toml. -->

Normalisation looks simple, and has been wrong in many ways. These are {count} public reports of
faults in other libraries, each in our own words, with the test of this repository that has such an
input and shows the right value. Most tests compare with float64. They run on the CPU's kernels, and
those of `tests/numerics` on the shaders in the [simulator](simulator.md), too.

Many of these faults have been fixed since, and a report may have been a mistake of its author. The
list says what can go wrong, not which library is better.
"""


def trackers() -> list[dict[str, Any]]:
    data = tomllib.loads((FOLDER / "dossier.toml").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = data["tracker"]
    return found


def page() -> str:
    count = sum(len(tracker["report"]) for tracker in trackers())
    lines = [INTRODUCTION.format(count=count)]
    for tracker in trackers():
        lines += [f"## {tracker['name']}\n", "| report | what was wrong | test |", "|---|---|---|"]
        for report in tracker["report"]:
            number, (file, test) = report["number"], report["test"].split("::")
            url = f"https://github.com/{tracker['repository']}/issues/{number}"
            lines.append(f"| [#{number}]({url}) | {report['fault']} | [`{test}`](../{file}) |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
