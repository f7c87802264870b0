"""The benchmark's settings and command lines."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from bench_cases import TINY, TINY_3D, TINY_INSTANCE, not_counted
from mlx_welford.__main__ import main
from mlx_welford.bench import compare, implementations, plot, settings
from mlx_welford.bench.harness import Step
from mlx_welford.bench.implementations import (
    BACKWARD,
    BASELINE,
    BOTH,
    COMPILED,
    COPY,
    EVALUATION,
    FORWARD,
    MODES,
    OURS,
    OURS_COMPILED,
    TORCH,
)
from mlx_welford.bench.results import Report
from mlx_welford.bench.settings import AS_FOUND, TUNED
from mlx_welford.bench.workloads import Case

from bench import instructions

# ---- Settings ----


def test_settings_are_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*settings.MALLOC, *settings.THREADS):
        monkeypatch.delenv(name, raising=False)
    assert settings.is_entered(AS_FOUND, None)
    assert not settings.is_entered(TUNED, None)
    assert not settings.is_entered(AS_FOUND, 1)

    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")  # somebody tuned it already
    assert not settings.is_entered(AS_FOUND, None)
    for name, value in settings.MALLOC.items():
        monkeypatch.setenv(name, value)
    assert settings.is_entered(TUNED, None)
    for name in settings.THREADS:
        monkeypatch.setenv(name, "3")
    assert settings.is_entered(TUNED, 3)
    assert not settings.is_entered(TUNED, 2)


def test_a_child_gets_exactly_its_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*settings.MALLOC, *settings.THREADS, "OTHER"]
    (tmp_path / "mlx_welford.py").write_text(
        "import json, os, sys\n"
        f"json.dump({{n: os.environ.get(n) for n in {names}}}, open(sys.argv[1], 'w'))\n"
        "sys.exit(7)\n"
    )

    def child(setting: str, threads: int | None) -> dict[str, str | None]:
        seen = tmp_path / "seen.json"
        other = {"OTHER": "value"}
        status = settings.run_in_child([str(seen)], setting, threads, variables=other)
        assert status == 7
        found: dict[str, str | None] = json.loads(seen.read_text())
        assert found.pop("OTHER") == "value"
        return found

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "5")
    for name in settings.THREADS:
        monkeypatch.delenv(name, raising=False)
    nothing: dict[str, str | None] = dict.fromkeys(names[:-1])
    assert child(AS_FOUND, None) == nothing
    assert child(TUNED, None) == nothing | settings.MALLOC
    assert child(AS_FOUND, 3) == nothing | dict.fromkeys(settings.THREADS, "3")


# ---- The command lines ----


@pytest.fixture
def only_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (TINY, TINY_3D, TINY_INSTANCE)
    monkeypatch.setattr(compare, "CASES", cases)
    monkeypatch.setattr(compare, "MODELS", cases)
    reasons = dict.fromkeys((COMPILED, OURS_COMPILED), "left out of this test")
    reasons[TORCH] = "not here"
    monkeypatch.setattr(
        compare, "absent", lambda _: {**reasons, implementations.TORCH_MPS: "no Mac"}
    )
    for name in (*settings.MALLOC, *settings.THREADS):
        monkeypatch.delenv(name, raising=False)


def test_choice_of_cases() -> None:
    def names(patterns: list[str] | None, *, quick: bool) -> list[str]:
        return [case.name for case in compare.choose(cases, patterns, quick=quick)]

    large = Case("large", "Large", "BatchNorm", (2, 3), large=True)
    cases = (TINY, TINY_3D, TINY_INSTANCE, large)
    assert names(None, quick=True) == ["tiny", "tiny-3d"]
    assert names(None, quick=False) == ["tiny", "tiny-3d", "tiny-instance"]
    assert names(["*-instance", "large"], quick=True) == ["tiny-instance", "large"]
    assert names(["tiny"], quick=False) == ["tiny"]


@pytest.mark.usefixtures("only_tiny")
def test_comparison_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert compare.main(["--quick", "--seconds", "1e-3", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "Tiny: BatchNorm 2x5x3x4 (as found)" in printed
    assert "Tiny 3-D: BatchNorm 2x3x4x5x6 (as found)" in printed
    assert "Without torch: not here." in printed
    assert "mlx.nn *" in printed
    assert implementations.RESHAPED in printed
    assert "Tiny: InstanceNorm" not in printed  # not a quick case

    written = Report.read(path)
    assert [(row.case, row.mode, row.dtype, row.implementation) for row in written.rows] == [
        (case.name, *key)
        for case in (TINY, TINY_3D)
        for key in [
            *((mode, "float32", name) for mode in MODES for name in (BASELINE, OURS)),
            (COPY, "float32", COPY),
        ]
    ]
    assert written.environment["setting"] == AS_FOUND
    assert written.left_out == (
        *(f"{name}: left out of this test" for name in (COMPILED, OURS_COMPILED)),
        f"{TORCH}: not here",
    )
    for row in written.rows:
        assert f"{row.figures.milliseconds:.2f}" in printed
        if row.implementation == COPY:
            assert row.copies == 1


@pytest.mark.usefixtures("only_tiny")
def test_filters(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    options = ["--cases", "*-instance", "--dtypes", "float16", "--modes", BACKWARD]
    options += ["--implementations", OURS, "--seconds", "1e-3"]
    assert compare.main([*options, "--json", str(path)]) == 0
    chosen = [(row.case, row.dtype, row.mode, row.implementation) for row in Report.read(path).rows]
    assert chosen == [
        ("tiny-instance", "float16", BACKWARD, OURS),
        ("tiny-instance", "float16", COPY, COPY),
    ]


@pytest.mark.usefixtures("only_tiny")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cases", "resnet51"], "no case is called resnet51"),
        (["--threads", "0"], "--threads must be at least 1 but got 0"),
    ],
)
def test_errors_of_the_command_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("only_tiny")
def test_who_needs_too_much_memory_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--cases", "tiny", "--dtypes", "float32", "--modes", FORWARD, "--seconds", "1e-3"]
    enough_for_ours = 40 * TINY.elements / compare.USABLE_MEMORY
    monkeypatch.setattr(compare, "memory_bytes", lambda: enough_for_ours)
    assert compare.main(options) == 0
    printed = capsys.readouterr().out
    assert "Without mlx.nn in tiny: too large for this memory." in printed
    assert OURS in printed
    monkeypatch.setattr(compare, "memory_bytes", lambda: 1)
    assert compare.main(options) == 1
    assert "Nothing was measured" in capsys.readouterr().out


@pytest.mark.usefixtures("only_tiny")
def test_large_cases_are_not_compiled_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compare, "CASES", (replace(TINY, large=True),))
    monkeypatch.setattr(compare, "absent", lambda _: {})
    monkeypatch.setattr(compare, "PEERS", (BASELINE, COMPILED))
    path = tmp_path / "figures.json"
    options = ["--cases", "tiny", "--dtypes", "float32", "--modes", EVALUATION]
    assert compare.main([*options, "--seconds", "1e-3", "--json", str(path)]) == 0
    found = Report.read(path)
    assert [row.implementation for row in found.rows] == [BASELINE, COPY]
    assert found.left_out == (f"{COMPILED} in tiny: takes too long",)


@pytest.mark.parametrize(
    ("options", "title"),
    [
        ("--shape 4,30,5", "Yours: BatchNorm 4x30x5"),
        ("--shape 4,6,30 --axis 1 --layer group --groups 2", "Yours: GroupNorm(2) 4x6x30"),
        ("--shape 4,30,5 --no-affine --activation silu", "Yours + silu: BatchNorm 4x30x5"),
        (
            "--shape 4,30,5 --layer instance --activation gelu_approx --residual",
            "Yours + residual + gelu_approx: InstanceNorm 4x30x5",
        ),
    ],
)
@pytest.mark.usefixtures("only_tiny")
def test_a_layer_of_your_own(
    options: str,
    title: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, image = tmp_path / "figures.json", tmp_path / "times.svg"
    rest = ["--dtypes", "float32", "--seconds", "1e-3", "--json", str(path), "--plot", str(image)]
    assert main(["bench", *options.split(), *rest]) == 0
    assert title in capsys.readouterr().out
    written = Report.read(path)
    assert {row.case for row in written.rows} == {"yours"}
    assert ElementTree.parse(image).getroot().tag.endswith("svg")
    for panel, mode in zip(plot.cases({AS_FOUND: written}).axes, (FORWARD, BOTH), strict=True):
        rows = written.only(mode=mode).rows
        drawn = {float(x) for dots in panel.collections for x, _ in np.array(dots.get_offsets())}
        assert drawn == {*(row.copies for row in rows), rows[0].limit}


@pytest.mark.usefixtures("only_tiny")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--shape 4,6 --layer group --groups 4", "groups"),
        ("--shape 4", "2 dimensions"),
        ("--shape 4,5 --unknown", "unrecognized arguments: --unknown"),
    ],
)
def test_a_layer_that_cannot_be(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["bench", *options.split()])
    assert message in capsys.readouterr().err


def test_without_kernels() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_welford", "bench", "--quick"],
        env={**os.environ, "MLX_WELFORD_BACKEND": "fallback"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "there are no kernels to measure: MLX_WELFORD_BACKEND=fallback" in done.stderr


def test_without_what_the_extra_installs() -> None:
    program = (
        "import sys; sys.modules['rich'] = None\n"
        "from mlx_welford.__main__ import main; main(['bench', '--quick'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "bench needs rich: pip install 'mlx-welford[bench]'" in done.stderr


# ---- Instructions ----


def test_instructions_are_read_from_the_report() -> None:
    assert instructions.count("==1== \n==1== I   refs:      1,234,567\n") == 1234567
    with pytest.raises(ValueError, match="must report 'I refs' but reported:\nnothing"):
        instructions.count("nothing")


def test_instructions_are_of_the_calls_beyond_the_first_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(instructions, "CASES", (TINY,))
    monkeypatch.setattr(instructions, "CASE", TINY.name)
    monkeypatch.setattr(shutil, "which", lambda _: "valgrind")
    monkeypatch.setattr(
        instructions, "instructions", lambda *what: 10_000 + what[-1] * 7 * TINY.elements
    )
    assert instructions.main(["--modes", FORWARD]) == 0
    assert capsys.readouterr().out == f"tiny float32 forward {OURS}: 7.00 per element\n"


def test_instructions_without_valgrind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit):
        instructions.main([])
    assert "valgrind is not installed" in capsys.readouterr().err


def test_work_calls_the_step_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1

    step = Step(run, not_counted)
    monkeypatch.setattr(instructions, "CASES", (TINY,))
    monkeypatch.setattr(
        instructions, "steps", lambda *_, **__: {(OURS, FORWARD): step, (COPY, COPY): step}
    )
    instructions.work("tiny", "float32", FORWARD, OURS, calls=3)
    assert calls == 3
