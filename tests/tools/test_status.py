"""mw.status(), the plans that the command line prints, and the traffic that follows from them."""

import contextlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_welford as mw
import pytest
from conftest import has_metal
from mlx_welford import _ext, _machine, _status
from mlx_welford.__main__ import main
from mlx_welford._plans import (
    DTYPES,
    Layer,
    Plan,
    kernels,
    moments_plans,
    normalization_plans,
    traffic,
)
from mlx_welford._status import describe_plans, strict_shaders
from plans import BUFFER_NAMES

NAMES = {"cpu": "cpu", "sim": "simulator", "gpu": "metal"}

ALL = (True, False, True, True)


def launch_plan(*arguments: Any, **options: Any) -> tuple[Any, ...]:
    """The extension's, whose types are a matter of its own."""
    result: tuple[Any, ...] = _ext.launch_plan(*arguments, **options)
    return result


@pytest.mark.every_backend
def test_status_agrees_with_the_extension(backend: str) -> None:
    facts = mw.status()
    assert facts["backend"] == _ext.backend() == NAMES[backend]
    assert facts["simulator"] is (backend == "sim")
    assert facts["device"] == ("gpu" if backend == "gpu" else "cpu")
    assert facts["mlx_welford"] == mw.__version__ == importlib.metadata.version("mlx-welford")
    assert facts["mlx"] == facts["mlx_built_against"] == importlib.metadata.version("mlx")
    assert facts["python"] == sys.version.split()[0]
    assert facts["machine"] == os.uname().machine
    assert facts["threads"] == _ext.num_threads()
    assert facts["instruction_set"] == _ext.instruction_set()
    assert facts["shader_hash"] == _ext.shader_hash
    assert facts["shader_kernels"] == len(_ext.shader_kernels())
    if has_metal():
        assert facts["shaders_compile"] is True
    else:
        assert facts["shaders_compile"] is None
        assert "no Metal" in facts["shaders"]
    assert json.loads(json.dumps(facts)) == facts


# What the commands print on a Mac, in the form that Apple documents: no Mac printed this.
ON_A_MAC = {
    ("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"): "Apple M2 Pro\n",
    ("/usr/sbin/sysctl", "-n", "hw.model"): "Mac14,9\n",
    ("/usr/sbin/sysctl", "-n", "hw.memsize"): "34359738368\n",
    ("/usr/bin/sw_vers", "-buildVersion"): "24G90\n",
    ("/usr/sbin/ioreg", "-r", "-d", "1", "-c", "AGXAccelerator"): (
        "+-o AGXAcceleratorG14X  <class AGXAcceleratorG14X, id 0x100000480>\n"
        '    {\n      "IOClass" = "AGXAcceleratorG14X"\n      "gpu-core-count" = 19\n    }\n'
    ),
}


def test_what_a_mac_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: tuple[str, ...], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, ON_A_MAC[tuple(command)], "")

    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.mac_ver", lambda: ("15.6.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(subprocess, "run", run)
    facts = mw.status()
    assert facts["chip"] == "Apple M2 Pro"
    assert facts["model"] == "Mac14,9"
    assert facts["gpu_cores"] == 19
    assert facts["memory_gib"] == 32
    assert (facts["system"], facts["system_build"]) == ("macOS 15.6.1", "24G90")


@pytest.mark.parametrize(
    "fails", [FileNotFoundError("ioreg"), subprocess.CalledProcessError(1, "ioreg")]
)
def test_a_mac_that_says_nothing(monkeypatch: pytest.MonkeyPatch, fails: Exception) -> None:
    def run(*a: Any, **k: Any) -> Any:
        raise fails

    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr(subprocess, "run", run)
    facts = mw.status()
    assert facts["chip"] == facts["machine"]
    assert facts["model"] is facts["gpu_cores"] is None
    assert facts["system_build"] == "unknown"
    assert facts["memory_gib"] > 0


def test_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = mw.status()
    assert facts["cpu_cores"] == os.cpu_count()
    assert facts["architecture"] == mx.device_info(mx.default_device())["architecture"]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert facts["memory_gib"] == pytest.approx(pages / 2**30, abs=0.1)
    if sys.platform == "linux":
        assert facts["chip"] in Path("/proc/cpuinfo").read_text()


def test_metals_version_is_asked_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_metal() or mw.status()["metal_language"] is None
    asked: list[dict[str, Any]] = []

    def metal_kernel(**description: Any) -> Any:
        asked.append(description)

        def run(*, inputs: list[mx.array], stream: Any, **shapes: Any) -> list[mx.array]:
            assert shapes["output_shapes"] == [(1,)]
            return [inputs[0] + 320]

        return run

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "is_available", lambda device: True)
    monkeypatch.setattr(mx, "gpu", mx.cpu)
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    assert _machine.metal_language() == "3.2"
    assert "__METAL_VERSION__" in asked[0]["source"]

    def fails(**description: Any) -> Any:
        raise RuntimeError("Unable to build metal library from source\nprogram_source:1")

    monkeypatch.setattr(mx.fast, "metal_kernel", fails)
    assert _machine.metal_language() == "unknown: Unable to build metal library from source"


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ({"url": "file:///Users/someone/mlx-welford", "dir_info": {}}, "built from a checkout"),
        ({"url": "file:///Users/someone/x", "dir_info": {"editable": True}}, "editable"),
        (
            {"url": "https://example.org/x.git", "vcs_info": {"vcs": "git", "commit_id": "0123ab"}},
            "built from commit 0123ab",
        ),
        ({"url": "file:///Users/someone/a-1.whl", "archive_info": {}}, "a wheel file"),
        ({"url": "file:///Users/someone/a-1.tar.gz", "archive_info": {}}, "built from an archive"),
        (None, "a wheel from an index, or built from its sdist"),
    ],
)
def test_how_the_package_came_here(
    monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None, words: str
) -> None:
    class Distribution:
        version = "1"

        def read_text(self, name: str) -> str | None:
            if name == "WHEEL":
                return "Wheel-Version: 1.0\nTag: cp312-cp312-macosx_14_0_arm64\n"
            return None if origin is None else json.dumps(origin)

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    build = _machine.build()
    assert build == f"{words} (cp312-cp312-macosx_14_0_arm64)"
    assert "someone" not in build
    assert _machine.wheels().startswith("mlx 1 (cp312-cp312-macosx_14_0_arm64), mlx-metal 1 (")


def test_wheels_of_mlx() -> None:
    wheels = mw.status()["wheels"]
    version = importlib.metadata.version("mlx")
    assert wheels.startswith(f"mlx {version} (cp{sys.version_info[0]}{sys.version_info[1]}-")
    library = "mlx-metal" if sys.platform == "darwin" else "mlx-cpu"
    assert f", {library} {version} (" in wheels


def test_variables_of_mlx_and_metal_without_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in list(os.environ):
        if name.startswith(("MLX_", "MTL_", "METAL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("MTL_DEBUG_LAYER", "1")
    monkeypatch.setenv("MLX_METAL_PATH", "/home/someone/mlx")
    monkeypatch.setenv("UNRELATED", "secret")
    expected = {"MLX_METAL_PATH": "~/mlx", "MTL_DEBUG_LAYER": "1"}
    assert mw.status()["variables"] == expected
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "MLX_METAL_PATH=~/mlx MTL_DEBUG_LAYER=1" in out
    assert "secret" not in out


def pretend_metal(monkeypatch: pytest.MonkeyPatch, batch_norm: Any) -> None:
    """As if there were a GPU, with this in place of the operation."""
    monkeypatch.setattr(mx, "is_available", lambda device: True)
    monkeypatch.setattr(mx, "stream", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(_ext, "backend", lambda stream=None: "metal")
    monkeypatch.setattr(_status, "batch_norm", batch_norm)


def test_shaders_that_do_not_compile_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def batch_norm(x: mx.array) -> mx.array:
        if os.environ.get("MLX_WELFORD_STRICT") == "1" and x.dtype == mx.bfloat16:
            raise RuntimeError("program_source:3: error: unknown type name 'bfloat'")
        return x

    monkeypatch.delenv("MLX_WELFORD_STRICT", raising=False)
    pretend_metal(monkeypatch, batch_norm)
    facts = mw.status()
    assert facts["shaders_compile"] is False
    assert "unknown type name 'bfloat'" in facts["shaders"]
    assert "MLX_WELFORD_STRICT" not in os.environ


def test_shaders_are_tried_with_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def batch_norm(x: mx.array) -> mx.array:
        tried.append(x.dtype)
        return x

    pretend_metal(monkeypatch, batch_norm)
    facts = mw.status()
    assert facts["shaders_compile"] is True
    assert tried == list(DTYPES.values())
    assert all(name in facts["shaders"] for name in DTYPES)


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_strictness_ends(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    if before is None:
        monkeypatch.delenv("MLX_WELFORD_STRICT", raising=False)
    else:
        monkeypatch.setenv("MLX_WELFORD_STRICT", before)
    with contextlib.suppress(KeyError), strict_shaders():
        assert os.environ["MLX_WELFORD_STRICT"] == "1"
        raise KeyError
    assert os.environ.get("MLX_WELFORD_STRICT") == before


def assert_same_plan(plan: Plan, expected: tuple[Any, ...]) -> None:
    """The plan is of the problem that the extension is asked for here."""
    dispatches, temporaries = expected
    assert plan["temporary_bytes"] == sum(temporaries.values())
    found = [(d["kernel"], d["threadgroups"], d["threads"]) for d in plan["dispatches"]]
    assert found == [(d["host_name"], d["groups"], d["threads"]) for d in dispatches]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape", "axis", "axes"),
    [
        ("batch", (8, 56, 56, 64), -1, [0, 1, 2]),
        ("batch", (8, 64, 56, 56), 1, [0, 2, 3]),
        ("batch", (7, 5), 1, [0]),
        ("instance", (2, 37, 64), 2, [1]),
        ("instance", (2, 64, 4097), -2, [2]),
        ("instance", (2, 40, 50, 60, 32), 4, [1, 2, 3]),
    ],
)
def test_a_plan_is_the_launch_plan(
    layer: Layer, shape: tuple[int, ...], axis: int, axes: list[int], aligned: bool, dtype: str
) -> None:
    plans = normalization_plans(layer, shape, axis=axis, dtype=dtype, aligned=aligned)
    common = {"channels": shape[axis], "weight": True, "aligned": aligned}
    forward = launch_plan("normalize", shape, axes, dtype, bias=True, **common)
    backward = launch_plan("normalize_gradient", shape, axes, dtype, wanted=ALL, **common)
    assert_same_plan(plans["forward"], forward)
    assert_same_plan(plans["backward"], backward)
    named = [d["host_name"] for d in [*forward[0], *backward[0]]]
    assert kernels(plans) == list(dict.fromkeys(named))


@pytest.mark.skipif(sys.platform != "linux", reason="the simulator is written for Linux")
@pytest.mark.parametrize("backend", ["sim"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        ("batch", (3, 19, 7, 16), -1),
        ("batch", (3, 16, 19, 7), 1),
        ("batch", (7, 5), 1),
        ("instance", (2, 37, 24), 2),
        ("instance", (2, 3, 4097), -2),
        ("instance", (2, 1500, 5), -1),
    ],
)
def test_a_plan_is_what_runs(
    layer: Layer,
    shape: tuple[int, ...],
    axis: int,
    dtype: str,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The same kernels over as many threadgroups of as many threads, with the same buffers."""
    log = tmp_path / "dispatches"
    monkeypatch.setenv("MLX_WELFORD_SIM_LOG", str(log))
    weight = mx.ones((shape[axis],), DTYPES[dtype])

    def norm(x: mx.array, w: mx.array, b: mx.array) -> mx.array:
        if layer == "batch":
            return mw.batch_norm(x, w, b, axis=axis)[0]
        return mw.instance_norm(x, w, b, axis=axis)

    x = mx.random.normal(shape).astype(DTYPES[dtype])
    mx.eval(x, weight)
    outputs, gradients = mx.vjp(norm, [x, weight, weight], [x])
    plans = normalization_plans(layer, shape, axis=axis, dtype=dtype)
    for plan, arrays in ((plans["forward"], outputs), (plans["backward"], gradients)):
        log.write_text("")
        mx.eval(arrays)
        ran = [json.loads(line) for line in log.read_text().splitlines()]
        planned = plan["dispatches"]
        assert [d["kernel"] for d in ran] == [d["kernel"] for d in planned]
        for d, expected in zip(ran, planned, strict=True):
            assert d["grid"] == [expected["threadgroups"], 1, 1]
            assert d["group"] == [expected["threads"], 1, 1]
            names = {BUFFER_NAMES[b["index"]] for b in d["buffers"]}
            assert names == {b["name"] for b in expected["buffers"]}


def test_absent_arguments_and_gradients() -> None:
    shape = (2, 9, 8)
    plans = normalization_plans("batch", shape, weight=False, bias=False)
    assert_same_plan(
        plans["forward"], launch_plan("normalize", shape, [0, 1], "float32", channels=8)
    )
    assert_same_plan(
        plans["backward"],
        launch_plan(
            *("normalize_gradient", shape, [0, 1], "float32"),
            channels=8,
            wanted=(True, False, False, False),
        ),
    )
    assert "weight=var" in describe_plans(plans)
    assert "backward" not in normalization_plans("batch", shape, wanted=())
    assert "backward" not in normalization_plans("batch", shape, bias=False, wanted=("bias",))


def test_given_statistics_are_those_of_a_batch() -> None:
    shape = (2, 9, 8)
    for layer in ("batch", "instance"):
        plans = normalization_plans(layer, shape, given=True, wanted=("statistics",))
        common = {"channels": 8, "given": True, "weight": True}
        assert_same_plan(
            plans["forward"],
            launch_plan("normalize", shape, [0, 1], "float32", bias=True, **common),
        )
        assert_same_plan(
            plans["backward"],
            launch_plan(
                *("normalize_gradient", shape, [0, 1], "float32"),
                wanted=(False, True, False, False),
                **common,
            ),
        )


def test_axes_move_where_kernels_cannot_walk_over_them() -> None:
    moved = normalization_plans("instance", (2, 3, 5, 7), axis=2)
    assert moved == normalization_plans("instance", (2, 3, 7, 5), axis=3)
    moved = moments_plans((3, 4, 5, 6), (1, 3))
    assert_same_plan(moved["forward"], launch_plan("moments", (3, 5, 4, 6), [2, 3], "float32"))
    assert_same_plan(
        moved["backward"], launch_plan("moments_gradient", (3, 5, 4, 6), [2, 3], "float32")
    )


@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [
        ((2, 100_000, 64), 2 + 1, 4 + 1),  # too large for a threadgroup
        ((2, 200, 64), 1 + 1, 2 + 1),  # fits one
    ],
)
def test_traffic_is_what_the_mathematics_allows(
    shape: tuple[int, ...], forward: int, backward: int
) -> None:
    x_bytes = 4 * math.prod(shape)
    plans = normalization_plans("instance", shape, wanted=())
    assert traffic(plans, x_bytes) == forward * x_bytes
    plans = normalization_plans("instance", shape)
    assert traffic(plans, x_bytes) == (forward + backward) * x_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("batch", (2, 3, 4), 3), r"\[batch_norm\] 'axis' must be in \[-3, 2\] but got 3\."),
        (("instance", (2, 4), -1), r"\[instance_norm\] expected an input of at least 3 dimensions"),
        (("instance", (2, 3, 4), 0), r"\[instance_norm\] 'axis' must not be the batch axis 0\."),
        (("batch", (0, 4), -1), r"nothing to dispatch for an empty array of shape \(0, 4\)"),
    ],
)
def test_problems_that_there_is_no_plan_for(
    arguments: tuple[Layer, tuple[int, ...], int], message: str
) -> None:
    layer, shape, axis = arguments
    with pytest.raises(ValueError, match=message):
        normalization_plans(layer, shape, axis=axis)


def test_there_are_no_shaders_for_float64() -> None:
    with pytest.raises(ValueError, match="no shaders for float64"):
        normalization_plans("batch", (2, 4), dtype="float64")
    with pytest.raises(ValueError, match="no shaders for float64"):
        moments_plans((2, 4), (0,), dtype="float64")


# ---- The command line ----


def test_the_command_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "mlx_welford", "status", "--json"]
    problem = ["--shape", "2,64,33,31", "--layer", "instance", "--axis", "1", "--dtype", "float16"]
    done = subprocess.run(
        [*command, *problem, "--no-affine"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["plans"] == normalization_plans(
        "instance", (2, 64, 33, 31), axis=1, dtype="float16", weight=False, bias=False
    )
    assert printed["status"].keys() == mw.status().keys()
    assert printed["status"]["shader_hash"] == _ext.shader_hash


@pytest.mark.parametrize("arguments", [[], ["status"]])
def test_the_status_as_a_table(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = mw.status()
    assert [line[: len(name)] for line, name in zip(lines, facts, strict=True)] == [
        name.replace("_", " ") for name in facts
    ]
    assert any(line.split() == ["threads", str(facts["threads"])] for line in lines)
    assert any(line.split() == ["simulator", "no"] for line in lines)


def test_the_status_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == mw.status()


def test_the_plan_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--shape", "8,56,56,64", "--evaluation"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    plans = normalization_plans("batch", (8, 56, 56, 64), given=True)
    for d in plans["forward"]["dispatches"] + plans["backward"]["dispatches"]:
        start = [d["pipeline"], str(d["threadgroups"]), str(d["threads"])]
        assert any(line[:3] == start for line in lines), start


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ("--activation gelu", {"activation": "gelu"}),
        ("--residual", {"residual": True}),
        ("--activation relu --residual", {"activation": "relu", "residual": True}),
        (
            "--activation leaky_relu --negative-slope -0.5 --residual",
            {"activation": "leaky_relu", "negative_slope": -0.5, "residual": True},
        ),
    ],
)
def test_the_plan_of_a_layer_and_what_follows(
    capsys: pytest.CaptureFixture[str], arguments: str, options: dict[str, Any]
) -> None:
    assert main(["status", "--json", "--shape", "8,56,56,64", *arguments.split()]) == 0
    printed = json.loads(capsys.readouterr().out)["plans"]
    assert printed == normalization_plans("batch", (8, 56, 56, 64), **options)
    assert printed != normalization_plans("batch", (8, 56, 56, 64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "2,4", "--activation", "tanh"], "invalid choice: 'tanh'"),
        (["--shape", "2,4", "--negative-slope", "nan"], "'negative_slope' must be finite"),
        (["--shape", "2,3,4", "--axis", "7"], "'axis' must be in [-3, 2] but got 7"),
        (["--shape", "2,x"], "invalid _shape value"),
        (["--shape", "2,4", "--dtype", "float64"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["status", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
