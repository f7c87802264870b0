"""Tries one wheel with several releases of MLX: python cmake/try_releases.py WHEEL RELEASE...

For each: a fresh virtual environment with that MLX and the wheel, the self-test in it, then the
quick profile of the tests of operations, graphs and layers on the CPU, with the test tools of the
environment that runs this. The results are kept in tried.json and written into the table of
docs/building.md.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pins import RELEASES

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "try-mlx"
RESULTS = Path(__file__).with_name("tried.json")
TESTS = ("tests/numerics", "tests/graph", "tests/layers", "tests/cpu")
PAGE = ROOT / "docs" / "building.md"


def run(*command: str | Path, **variables: str) -> bool:
    """Whether a command succeeds."""
    environment = os.environ | variables
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def attempt(wheel: Path, release: str) -> dict[str, Any]:
    """What the tests say of a wheel beside a release of MLX."""
    folder = FOLDER / release
    shutil.rmtree(folder, ignore_errors=True)
    python = folder / "bin" / "python"
    report = folder / "report.xml"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(python)]
    if not (
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        and run(*pip, "install", f"mlx=={release}", f"{wheel}[cpu]")
    ):
        sys.exit(f"{wheel} cannot be installed beside mlx {release}.")
    selftest = run(python, "-m", "mlx_welford", "selftest", "--quick", "--no-times", "--no-json")
    # The tools, behind the environment's own packages.
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "tools.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(
        *(python, "-m", "pytest", "--backend", "cpu", "-m", "not slow", "-n", "2", "-q", *TESTS),
        f"--junit-xml={report}",
        MLX_WELFORD_TEST_PROFILE="quick",
    )
    suite = ElementTree.parse(report).getroot()[0]
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    day = time.strftime("%Y-%m-%d")
    return {
        "where": f"{day}, {platform.system()} {platform.machine()}, {platform.python_version()}",
        "selftest": "passed" if selftest else "failed",
        "failed": failed,
        "passed": count["tests"] - failed - count["skipped"],
        "skipped": count["skipped"],
        "failures": sorted(
            {
                f"{case.attrib['classname'].rpartition('.')[2]}::{case.attrib['name']}"
                for case in suite
                if case.find("failure") is not None or case.find("error") is not None
            }
        ),
    }


def table(results: dict[str, Any]) -> str:
    """The releases, their nanobind, and how the last trial of each ended."""
    lines = [
        "| mlx | nanobind | its internals | self-test | tests: failed, passed, skipped | tried |",
        "|---|---|---|---|---|---|",
    ]
    for row in RELEASES:
        cells = [row["mlx"], row["nanobind"], row["internals"]]
        if found := results.get(row["mlx"]):
            counts = f"{found['failed']}, {found['passed']}, {found['skipped']}"
            cells += [found["selftest"], counts, found["where"]]
        else:
            cells += ["not tried", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    failures = [
        f"- {release}: `{name}`" for release in results for name in results[release]["failures"]
    ]
    return "\n".join([*lines, *(["", "What fails:", "", *failures] if failures else [])])


def fill(section: str, text: str) -> None:
    """Writes the text between the marks of a section of docs/building.md."""
    begin, end = f"<!-- begin: {section} -->", f"<!-- end: {section} -->"
    pattern = re.compile(f"{begin}.*{end}", re.DOTALL)
    PAGE.write_text(pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", PAGE.read_text()))


if __name__ == "__main__":
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    for release in sys.argv[2:]:
        results[release] = attempt(Path(sys.argv[1]).resolve(), release)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    fill("releases", table(results))
