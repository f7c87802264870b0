"""docs/dossier.md is made of docs/dossier.toml, and its tests exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

from docs import dossier

REPORTS = [(t, report) for t in dossier.trackers() for report in t["report"]]


def test_the_page_is_that_of_the_reports() -> None:
    """`python docs/dossier.py` makes it so."""
    assert dossier.page() == dossier.PAGE.read_text(encoding="utf-8")


def test_no_report_is_listed_twice() -> None:
    names = [(tracker["repository"], report["number"]) for tracker, report in REPORTS]
    assert len(set(names)) == len(names)


def test_every_test_is_collected() -> None:
    """pytest fails for one that it does not find, and for one that no profile would run."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--collect-only", "--quiet"),
            *sorted({report["test"] for _, report in REPORTS}),
        ],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "MLX_WELFORD_TEST_PROFILE": "nightly"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    for _, report in REPORTS:
        assert report["test"] in done.stdout


def test_every_test_of_the_dossier_has_a_report() -> None:
    tests = Path(__file__).parents[1] / "numerics" / "test_dossier.py"
    defined = set(re.findall(r"^def (test_\w+)", tests.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(defined) > 20
    assert defined <= {report["test"].split("::")[1] for _, report in REPORTS}
