"""`make cuda`, on a machine without a GPU: what it does when steps fail, hang, or have no time."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda_twin.__main__ as command
import pytest
from cuda_twin import bandwidth
from cuda_twin.bandwidth import Case
from cuda_twin.device import Device, DeviceError, Memory, Twin
from cuda_twin.host_driver import HostDriver, struct_bytes
from cuda_twin.progress import Budget, write_json
from cuda_twin.shaders import shader_program
from plan_cases import SOME
from plans import shaders

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("cuda") is None,
    reason="NVIDIA's compiler (nvidia-cuda-nvrtc, cuda-bindings) is not installed; it has no macOS",
)


class Clock:
    """Time that passes only when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def twin() -> Twin:
    program = shader_program()
    return Twin(Device(HostDriver(program, shaders(), struct_bytes())), program)


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def is_running(process: int) -> bool:
    """A process that has ended, and was not waited for, is a zombie."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


# ---- Time ----------------------------------------------------------------------------------------


def test_what_fits(clock: Clock) -> None:
    budget = Budget(100, clock)
    assert budget.fits("a")
    with budget.taking("a"):
        clock.now += 40
    assert budget.left == 60
    assert budget.fits("a")
    assert budget.fits("a", reserved=19)
    assert not budget.fits("a", reserved=20)
    assert budget.fits("b", reserved=59), "nothing is known of its kind"
    with budget.taking("a"):
        clock.now += 30
    assert not budget.fits("a"), "it may take 40 again"
    clock.now += 30
    assert not budget.fits("b")


def test_one_that_was_slow_long_ago_does_not_count(clock: Clock) -> None:
    budget = Budget(100, clock)
    for seconds in (50, 1, 2, 3, 2, 1):
        with budget.taking("a"):
            clock.now += seconds
    assert budget.expected("a") == 3


def test_without_a_limit_everything_fits(clock: Clock) -> None:
    budget = Budget(None, clock)
    with budget.taking("a"):
        clock.now += 1e9
    assert budget.fits("a", reserved=1e9)


# ---- Check ---------------------------------------------------------------------------------------


def test_problems_that_there_is_no_time_for(
    twin: Twin, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: Any) -> None:
        clock.now += 10

    monkeypatch.setattr(command, "solve_on_device", slow)
    lines: list[str] = []
    written: list[Any] = []
    budget = Budget(35, clock)
    assert command.check_all(twin, SOME, lines.append, budget=budget, write=written.append) == 0
    n = len(SOME)
    assert lines == [
        f"3 of {n} problems are right on the host, {n - 3} were not tried, for lack of time"
    ]
    assert [found["right"] for found in written] == [1, 2, 3]
    assert written[-1]["left_out"] == [str(problem) for problem in SOME[3:]]


def test_after_an_error_of_the_driver_nothing_is_tried(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Twin, problem: Any) -> None:
        if problem == SOME[1]:
            raise DeviceError("cuCtxSynchronize: 700")

    monkeypatch.setattr(command, "solve_on_device", broken)
    lines: list[str] = []
    written: list[Any] = []
    assert command.check_all(twin, SOME, lines.append, write=written.append) == 1
    assert lines[0] == f"{SOME[1]}: cuCtxSynchronize: 700"
    assert lines[1].endswith(f"{len(SOME) - 2} were not tried, after an error of the driver")
    assert written[-1]["wrong"] == {str(SOME[1]): "cuCtxSynchronize: 700"}
    assert written[-1]["left_out"] == [str(problem) for problem in SOME[2:]]


# ---- Bandwidth -----------------------------------------------------------------------------------

SMALL = Case("batch", "forward", "channels last", "float32", 3, 8, 8)


def test_torch_is_left_out_for_the_shaders_of_later_cases(
    twin: Twin, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(seconds: float) -> Any:
        def take(*_: Any) -> float:
            clock.now += seconds
            return 1.0

        return take

    def broken() -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(bandwidth, "copies", slow(2))
    implementations = {"torch": lambda: slow(10), "torch.compile": broken}
    monkeypatch.setattr(bandwidth, "torch_steps", lambda *_: implementations)
    monkeypatch.setattr(Device, "median_time", lambda self, step, *_: step() or 1.0)
    budget = Budget(40, clock)

    def measure(cases_to_come: int) -> tuple[list[str], list[str]]:
        rows, left_out = bandwidth.measure(
            twin,
            SMALL,
            torch=SimpleNamespace(cuda=SimpleNamespace(empty_cache=lambda: None)),
            repetitions=1,
            flush=Memory(twin.device, 64),
            tuning={},
            budget=budget,
            cases_to_come=cases_to_come,
        )
        return [row.implementation for row in rows], left_out

    no_compiler = f"{SMALL}: torch.compile, RuntimeError: no compiler"
    names, left_out = measure(9)  # 38 s are left, 18 of which the others need
    assert names == ["copy", "shaders", "torch"]
    assert left_out == [no_compiler]
    names, left_out = measure(8)  # 26 s are left, 16 of which the others need: torch takes 10
    assert names == ["copy", "shaders"]
    assert left_out == [f"{SMALL}: torch, no time left", no_compiler]
    clock.now += 25
    assert measure(0) == ([], [f"{SMALL}: no time left"])


def on_host(monkeypatch: pytest.MonkeyPatch, twin: Twin) -> None:
    """Commands in this process find the host's driver."""
    driver = twin.device._driver
    monkeypatch.setattr("cuda_twin.device._driver", lambda: driver)


SHORT = ["--sizes", "1", "--dtypes", "float32", "--kinds", "batch", "--modes", "evaluation"]
SHORT += ["--repetitions", "1", "--without-torch"]


def test_bandwidth_that_is_stopped_leaves_what_it_found(
    twin: Twin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_host(monkeypatch, twin)
    measure = bandwidth.measure

    def stopped(twin: Twin, case: Case, **options: Any) -> Any:
        if case.layout == "channels first":
            raise KeyboardInterrupt
        return measure(twin, case, **options)

    monkeypatch.setattr(bandwidth, "measure", stopped)
    path = tmp_path / "bandwidth.json"
    with pytest.raises(KeyboardInterrupt):
        bandwidth.main([*SHORT, "--json", str(path)])
    found = read_json(path)
    assert [row["implementation"] for row in found["rows"]] == ["copy", "shaders"]
    assert (found["cases"], found["cases_tried"]) == (2, 1)
    assert found["environment"]["gpu"] == "the host"


def test_without_matplotlib_there_is_no_plot(
    twin: Twin,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on_host(monkeypatch, twin)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert bandwidth.main([*SHORT, "--plot", str(tmp_path / "plot.png")]) == 0
    assert "Without a plot: import of matplotlib.figure" in capsys.readouterr().err


def test_bandwidth_without_time_says_so(
    twin: Twin,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on_host(monkeypatch, twin)
    paths = [tmp_path / name for name in ("a.json", "a.md", "a.png")]
    options = ["--json", str(paths[0]), "--markdown", str(paths[1]), "--plot", str(paths[2])]
    assert bandwidth.main([*SHORT, "--seconds", "0", *options]) == 0
    cases = ["batch evaluation, channels last, float32, 1 MB: no time left"]
    cases.append(cases[0].replace("last", "first", 1))
    assert read_json(paths[0])["left_out"] == cases
    assert read_json(paths[0])["rows"] == []
    assert "\n  ".join(["Left out:", *cases]) in capsys.readouterr().out


# ---- Steps ---------------------------------------------------------------------------------------


def test_a_step_that_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    log, started = tmp_path / "log", tmp_path / "started"
    script = f"echo begun; sleep 600 & echo $! > {started}; wait"
    assert command.run_step(["sh", "-c", script], log, 1.0) is None
    assert log.read_text() == "begun\n"
    wait_for(lambda: not is_running(int(started.read_text())))


def test_steps_that_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert command.run_step(["sh", "-c", "echo out; echo err >&2"], log, None) == 0
    assert log.read_text() == "out\nerr\n"
    assert command.run_step(["sh", "-c", "exit 3"], log, 60) == 3


def test_what_a_reader_finds_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "found.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """For the whole command: the host's driver, and a sanitizer that finds a race or hangs."""
    executable(
        tmp_path / "compute-sanitizer",
        f"""
        tool=$2; shift 4
        case $tool in
          memcheck) exec "$@" ;;
          racecheck) echo 'a race'; exit 9 ;;
          synccheck) echo $$ > {tmp_path}/waiting
            while test -e {tmp_path}/hang; do sleep 0.1; done ;;
        esac
        """,
    )
    paths = [str(tmp_path), os.environ.get("PATH", "")]
    return {
        **os.environ,
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": "tests:tests/support",
        "CUDA_TWIN_DRIVER": "cuda_twin.on_host",
    }


def whole_command(output: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "cuda_twin", "all", "--output", str(output), *options, *SHORT]


@pytest.mark.slow
def test_after_a_step_that_fails_the_others_run(
    environment: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "results"
    output.mkdir()
    for name in ("bandwidth.json", "check.json", "steps.json"):
        (output / name).write_text("of an earlier run")
    done = subprocess.run(
        whole_command(output, "--seconds", "300"),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "Failed: racecheck"
    steps = read_json(output / "steps.json")
    outcomes = {name: step["outcome"] for name, step in steps.items()}
    assert list(outcomes) == ["check", *command.TOOLS, "bandwidth"]
    assert outcomes.pop("racecheck") == "failed with exit code 9"
    assert set(outcomes.values()) == {"passed"}, done.stdout
    checked = read_json(output / "check.json")
    assert checked["right"] > 0
    assert not checked["wrong"]
    assert [row["implementation"] for row in read_json(output / "bandwidth.json")["rows"]] == [
        "copy",
        "shaders",
    ] * 2
    assert (output / "bandwidth.png").exists()
    assert "a race" in (output / "racecheck.log").read_text()


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_what_it_found(
    environment: dict[str, str], tmp_path: Path
) -> None:
    output, waiting = tmp_path / "results", tmp_path / "waiting"
    (tmp_path / "hang").touch()
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            whole_command(output, "--seconds", "300"),
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
        )
    try:
        wait_for(lambda: waiting.exists() and waiting.read_text().strip(), 150)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        (tmp_path / "hang").unlink()
        process.kill()
        process.wait()
    wait_for(lambda: not is_running(int(waiting.read_text())))
    steps = read_json(output / "steps.json")
    assert steps["check"]["outcome"] == steps["memcheck"]["outcome"] == "passed"
    assert steps["racecheck"]["outcome"].startswith("failed")
    assert steps["synccheck"]["outcome"].startswith("begun")
    assert "bandwidth" not in steps
    assert read_json(output / "check.json")["right"] > 0


def codes(monkeypatch: pytest.MonkeyPatch, **of_steps: int | None) -> list[list[str]]:
    """Steps end at once, with 0 or what is given. Returns the commands, as they come."""
    called: list[list[str]] = []

    def run_step(arguments: list[str], log: Path, limit: float | None) -> int | None:
        log.write_text("what it says\n")
        called.append(arguments)
        return of_steps.get(log.stem, 0)

    monkeypatch.setattr(command, "run_step", run_step)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return called


def test_without_a_sanitizer_its_steps_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    called = codes(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    assert command.main(["all", "--output", str(tmp_path), "--dtypes", "float16"]) == 0
    out = capsys.readouterr().out
    assert out.count("skipped: compute-sanitizer, of NVIDIA's CUDA toolkit, is not on") == 4
    assert out.endswith("what it says\n==> bandwidth: passed\nNo step failed.\n")
    check, of_bandwidth = called
    assert "--seconds" not in check
    assert of_bandwidth[-2:] == ["--dtypes", "float16"]


def test_steps_that_are_stopped_or_crash_have_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes(monkeypatch, memcheck=None, initcheck=-11)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: name)
    assert command.main(["all", "--output", str(tmp_path), "--seconds", "600"]) == 1
    assert capsys.readouterr().out.endswith("\nFailed: memcheck, initcheck\n")
    steps = read_json(tmp_path / "steps.json")
    assert re.fullmatch(r"failed: stopped after (99|100) s", steps["memcheck"]["outcome"])
    assert steps["initcheck"]["outcome"] == "failed with exit code -11"
    assert steps["bandwidth"]["outcome"] == "passed"


def test_steps_share_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Clock
) -> None:
    """Each takes all that it may have, and is told to end a little before."""
    limits: dict[str, float] = {}
    told: dict[str, float] = {}

    def run_step(arguments: list[str], log: Path, limit: float) -> int:
        limits[log.stem] = limit
        told[log.stem] = float(arguments[arguments.index("--seconds") + 1])
        log.touch()
        clock.now += limit
        return 0

    codes(monkeypatch)
    monkeypatch.setattr(command, "run_step", run_step)
    monkeypatch.setattr(command, "Budget", lambda seconds: Budget(seconds, clock))
    monkeypatch.setattr(shutil, "which", lambda name, path=None: name)
    assert command.main(["all", "--output", str(tmp_path), "--seconds", "540"]) == 0
    assert sum(limits.values()) == pytest.approx(540)
    assert limits["check"] == 270
    assert told["check"] == 255
    assert limits["bandwidth"] > 540 / 5
    assert command.main(["all", "--output", str(tmp_path), "--seconds", "0"]) == 0
    steps = read_json(tmp_path / "steps.json")
    assert {step["outcome"] for step in steps.values()} == {"skipped: no time left"}


def test_without_a_gpu_the_first_step_is_the_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_TWIN_DRIVER", "cuda.bindings.not_there")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}/tests:{ROOT}/tests/support")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert command.main(["all", "--output", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "Not run: cuda-bindings is not installed." in out
    assert "bandwidth" not in out


# ---- make cuda -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, "/elsewhere:/and/there"])
def test_make_changes_nothing_in_the_interpreter_that_it_is_given(
    path: str | None, tmp_path: Path
) -> None:
    """One that has no pip and no torch, and notes how it is called."""
    calls = tmp_path / "calls"
    fake = executable(tmp_path / "python", f'echo "$PYTHONPATH $*" >> {calls}; exit 7')
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "MAKE"))}
    if path is not None:
        environment["PYTHONPATH"] = path
    done = subprocess.run(
        ["make", "cuda", f"CUDA_PY={fake}", "BENCH_ARGS=--seconds 540 --sizes 256"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0, "the step failed"
    expected = "tests:tests/support" + (f":{path}" if path else "")
    assert calls.read_text() == f"{expected} -m cuda_twin all --seconds 540 --sizes 256\n"
