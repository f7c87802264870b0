"""What the suite runs on a GPU, on a machine that pretends to have one (pretend_gpu.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import SkipTest

import pytest
from conftest import present
from problems import FLOAT64_IS_NOT_ON_GPU
from simulator import compile_library
from simulator.oracle.air import link

TESTS = Path(__file__).parents[1]
CONFIGURATION = TESTS.parent / "pyproject.toml"


class Report:
    """One run of pytest, in a process of its own, on what pretends to be a GPU."""

    def __init__(self, directory: Path, *arguments: str, profile: str = "default"):
        (directory / "record.py").write_text(RECORD)
        path = directory / "record.json"
        command = [sys.executable, "-m", "pytest", "-p", "pretend_gpu", "--backend", "gpu", "-q"]
        options = ["-p", "record", "-p", "no:cacheprovider", f"--config-file={CONFIGURATION}"]
        variables = {
            "PYTHONPATH": os.pathsep.join(map(str, [TESTS, TESTS / "support", directory])),
            "RECORD": str(path),
        }
        variables["MLX_WELFORD_TEST_PROFILE"] = profile
        done = subprocess.run(
            [*command, *options, *arguments],
            cwd=TESTS.parent,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        self.text = done.stdout + done.stderr
        assert path.exists(), self.text
        record = json.loads(path.read_text())
        self.marks: dict[str, list[str]] = record["marks"]
        self.outcomes: dict[str, str] = record["outcomes"]

    def names(self, outcome: str) -> list[str]:
        """Of the functions, one for each time that one of their tests ended so."""
        found = [name for name, how in self.outcomes.items() if how == outcome]
        return [name.split("::")[-1].split("[")[0] for name in found]


# A plugin of that run: the marks of the tests by name, and how they ended.
RECORD = """
import json
import os
from pathlib import Path

outcomes = {}


def pytest_runtest_logreport(report):
    if report.when == "call" or not report.passed and outcomes.get(report.nodeid) is None:
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session):
    marks = {item.nodeid: [mark.name for mark in item.iter_markers()] for item in session.items}
    text = json.dumps({"marks": marks, "outcomes": outcomes})
    Path(os.environ["RECORD"]).write_text(text)
"""


@pytest.mark.slow
def test_all_tests_of_float64_are_skipped_and_no_others(tmp_path: Path) -> None:
    marks = Report(tmp_path, "--collect-only", str(TESTS), profile="nightly").marks
    assert len(marks) > 3000
    wide = {name for name in marks if "float64" in name or "float64" in marks[name]}
    assert len(wide) > 400
    assert {name for name in marks if "skip" in marks[name]} == wide


def test_what_chooses_dtypes_by_itself_takes_those_of_the_device(tmp_path: Path) -> None:
    files = ("numerics/test_properties.py", "layers/test_options.py")
    report = Report(tmp_path, *(str(TESTS / file) for file in files))
    assert set(report.outcomes.values()) == {"passed", "skipped"}, report.text
    assert report.names("skipped") == ["test_float64_takes_the_running_statistics_along"]
    assert report.names("passed").count("test_forward_is_right_to_rounding") == 1
    assert FLOAT64_IS_NOT_ON_GPU in report.text


PLANTED = """
import mlx.core as mx
import pretend_gpu
import pytest
from memory import address, settle
from problems import Case, dtypes

pytestmark = pytest.mark.every_backend


@pytest.fixture(scope="module")
def of_the_module():
    return pretend_gpu.device.is_gpu


def test_passes_on_the_gpu():
    assert pretend_gpu.device.is_gpu
    assert dtypes() == ["float32", "float16", "bfloat16"]


def test_passes_with_a_fixture_of_the_module(of_the_module):
    assert not of_the_module


def test_fails_by_float64():
    mx.zeros((3,), mx.float64)


@pytest.mark.float64
def test_skipped_by_its_mark():
    mx.zeros((3,), mx.float64)


@pytest.mark.parametrize("dtype", ["float64", mx.float64, Case("batch", (2, 3), -1, "float64")])
def test_skipped_by_its_parameter(dtype):
    mx.zeros((3,), mx.float64)


@pytest.mark.parametrize("dtype", ["float32", mx.float16, Case("batch", (2, 3)), 64])
def test_passes_with_another_parameter(dtype):
    pass


def reused(evaluate):
    a = mx.ones((1 << 16,))
    evaluate(a)
    before = address(a)
    a = a + 1
    mx.eval(a)
    return address(a) == before


def test_passes_once_memory_is_free():
    assert reused(settle)


def test_fails_by_memory_that_is_still_held():
    assert reused(mx.eval)
"""


def test_the_pretended_gpu_is_one(tmp_path: Path) -> None:
    """What a GPU refuses fails, what conftest.py knows of is skipped, and all else passes."""
    planted = tmp_path / "test_planted.py"
    planted.write_text(PLANTED)
    report = Report(tmp_path, "-p", "conftest", str(planted))
    assert len(report.outcomes) == 13
    for outcome, prefix in (
        ("passed", "test_passes"),
        ("failed", "test_fails"),
        ("skipped", "test_skipped"),
    ):
        for name in report.names(outcome):
            assert name.startswith(prefix), report.text
    assert "Float64IsRefused" in report.text


def test_no_simulator_but_on_linux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "platform", "darwin")
        assert present()[0] == "cpu"
        assert "sim" not in present()
        with pytest.raises(SkipTest, match="written for Linux"):
            compile_library("", cache=tmp_path)
        with pytest.raises(SkipTest, match="written for Linux"):
            link([], tmp_path)
    assert list(tmp_path.iterdir()) == []
