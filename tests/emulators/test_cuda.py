"""The shaders, unmodified, for an NVIDIA GPU: a proxy for Apple's.

Without a GPU: they compile, what they take of registers and memory is bounded, and all of the
runner but the GPU is tried on a driver on the host, where the simulator runs the kernels. With one,
every kernel is compared with float64 on it.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_twin.__main__
import numpy as np
import pytest
from cuda_twin import bandwidth, compiler
from cuda_twin.__main__ import check_all, resources_table
from cuda_twin.bandwidth import KINDS, MODES, Case, Row
from cuda_twin.cases import solve, solve_on_device
from cuda_twin.compiler import (
    CompileError,
    Program,
    Resources,
    compile_program,
    read_resources,
)
from cuda_twin.device import Device, DeviceError, Memory, Twin, plan_within
from cuda_twin.host_driver import Function, HostDriver, struct_bytes
from cuda_twin.progress import Budget
from cuda_twin.shaders import shader_program, shader_programs
from cuda_twin.source import enumerators, translate
from hypothesis import given
from mlx_welford import _ext
from plan_cases import (
    EPILOGUES,
    SOME,
    full_groups,
    of_channels,
    of_groups,
    running_statistics,
    whole_table,
    with_epilogue,
)
from plans import (
    DTYPES,
    LIKE_X,
    LIMITS,
    MOMENTS_BYTES,
    SUMS_BYTES,
    Array,
    Example,
    Problem,
    problems,
    run_example,
    run_plan,
    scalar,
    shaders,
)
from simulator import compile_library
from simulator.source import SourceError
from walks import SECOND_PASS

ALL = dict(_ext.shader_kernels())
STANDIN = "tests/cuda_twin/standin.metal"

needs_nvrtc = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("cuda") is None,
    reason="NVIDIA's compiler (nvidia-cuda-nvrtc, cuda-bindings) is not installed; it has no macOS",
)

# Apple's core, of which no number is published, is said to have 208 KB of registers, of which a
# thread may have 128.
APPLE_REGISTERS = 208 * 1024 // 4
APPLE_MOST_REGISTERS = 128


@pytest.fixture(scope="module")
def program() -> Program:
    return shader_program()


# ---- What the compiler says ----------------------------------------------------------------------


@needs_nvrtc
def test_every_instantiation_compiles(program: Program) -> None:
    assert program.resources.keys() == ALL.keys()
    assert program.kernels.keys() == ALL.keys()


@needs_nvrtc
def test_nothing_is_kept_in_memory_that_belongs_in_registers() -> None:
    """No spills; and no array of a thread's own that the code indexes."""
    for program in shader_programs():
        for name, r in program.resources.items():
            assert r.spill_bytes == r.stack_bytes == 0, (name, program.constants)


@needs_nvrtc
def test_threadgroup_memory(program: Program) -> None:
    """Entries for what the simdgroups merge, and none where nothing is merged."""
    moments, sums = (LIMITS["kEntries"] * n for n in (MOMENTS_BYTES, SUMS_BYTES))
    expected = {
        "moments": moments,
        "partial_moments": moments,
        "merge_moments": moments,
        "merge_partial_moments": moments,
        "fused_moments": moments,
        "fused_normalize": moments,
        "partial_sums": sums,
        "merge_sums": sums,
        "merge_group_moments": moments,
        "merge_group_sums": sums,
        "parameter_gradients": sums,
        "update_running_statistics": sums,
        "fused_gradient": sums,
    }
    for name, resources in program.resources.items():
        assert resources.shared_bytes == expected.get(function_of(name), 0), name


@needs_nvrtc
def test_vectors_move_as_vectors(program: Program) -> None:
    """In the second pass every store is one of 16 bytes, but for the edge of a row."""
    seen = set()
    # Of given_input_gradient it is a function constant that there is a gradient of x
    (given,) = Problem("normalize_gradient", (1, 1, 8, 8), given=True, wanted="x").plan().dispatches
    text = program.ptx + program.of(given.constants).ptx
    for match in re.finditer(r"\.entry (\w+)\((.*?)(?=\.entry|\Z)", text, re.S):
        name, body = match.groups()
        whole, single = (
            len(re.findall(rf"st\.global\.(?:wb\.)?{k}", body)) for k in ("v4", "[ubf]")
        )
        if function_of(name) in SECOND_PASS and "st.global" in body:
            seen.add(name)
            vectors = not re.search("_1_(Grouped)?(Columns|Rows)$", name)
            assert (whole > 0) == vectors, name
            assert ("ld.global.v4" in body) == vectors, name
            if vectors:
                assert single == name.endswith("Rows"), name
    assert seen == {name for name in ALL if function_of(name) in SECOND_PASS}


def function_of(host_name: str) -> str:
    """The kernel's name in metal/."""
    return re.split(r"_(?:float|half|bfloat)(?:_|$)", host_name)[0]


def without_type(host_name: str) -> str:
    return re.sub("_(half|bfloat|float)_", "_", host_name)


def largest_groups(epilogue: int | None = None) -> dict[str, int]:
    """The most threads that a group of each kernel is planned to have, or with an epilogue."""
    largest: dict[str, int] = {}

    def note(problems: Iterable[Problem]) -> None:
        for p in problems:
            for d in p.plan().dispatches:
                largest[d.host_name] = max(largest.get(d.host_name, 0), d.threads)

    def note_all(problems: Iterable[Problem]) -> None:
        if epilogue is None:
            note(problems)
        else:
            normalizing = (p for p in problems if p.operation.startswith("normalize"))
            note(made for p in normalizing for made in with_epilogue(p, epilogue))

    for dtype in DTYPES:
        for vector in (1, {"float32": 4}.get(dtype, 8)):
            for threads in range(LIMITS["kSimd"], 1025, LIMITS["kSimd"]):
                kept = LIMITS["kKept"] * threads
                for geometry in ((1, 2, kept // 4, 4 * vector), (1, 2, kept * vector, 1)):
                    p = Problem("", geometry, dtype, geometry[3], aligned=vector > 1)
                    # Twice: what fits a group, and what does not
                    for problem in (p, replace(p, geometry=(2, *geometry[1:]))):
                        note_all(problems_of(problem))
                members = threads // LIMITS["kSimd"]  # rows of a simdgroup each
                geometry = (1, members, 4 * LIMITS["kSimd"] * vector, 1)
                p = Problem("", geometry, dtype, members, aligned=vector > 1, groups=1)
                note_all(
                    replace(p, operation=operation, wanted=wanted)
                    for operation, wanted in (("normalize", ""), ("normalize_gradient", "x"))
                )
    return largest


def problems_of(p: Problem) -> Iterator[Problem]:
    forward = replace(p, operation="normalize", weight=True)
    backward = replace(p, operation="normalize_gradient", weight=True, wanted="x weight")
    yield from (
        replace(p, operation="moments"),
        replace(p, operation="moments_gradient"),
        forward,
        backward,
        replace(forward, given=True),
        replace(backward, given=True, wanted="x statistics weight"),
        replace(backward, given=True, wanted="x"),
        replace(p, operation="moments", geometry=(1, *p.geometry[1:])),
        replace(p, operation="partial_moments"),
        running_statistics(p.dtype, instances=1000),
        *(
            of_groups(replace(problem, geometry=(1, *p.geometry[1:])))
            for own in (forward, backward, replace(backward, wanted="x"))
            for problem in (own, replace(own, given=True))
        ),
        *(
            made(replace(p, operation=operation, geometry=(1, *p.geometry[1:])))
            for operation in ("moments", "moments_gradient")
            for made in (of_groups, of_channels)
        ),
    )


@needs_nvrtc
def test_two_groups_of_every_kernel_fit_one_of_apples_cores(program: Program) -> None:
    """By the registers that NVRTC takes when it is free to; Apple's compiler decides for itself.

    csrc/gpu/tuning.cpp has a table of those of fused kernels, which are to be as large as they can.
    """
    largest = largest_groups()
    assert largest.keys() == ALL.keys()
    most = APPLE_REGISTERS // 2
    for name, r in program.resources.items():
        assert r.registers <= APPLE_MOST_REGISTERS, name
        assert r.registers * largest[name] <= most, name
    # Groups have the plan that they have with a residual, which the next test is about
    for name in (name for name in ALL if re.match("fused_(normalize(?!.*Grouped)|gradient)", name)):
        # In the same row of the table: what differs only in the type of its elements
        alike = [other for other in ALL if without_type(other) == without_type(name)]
        registers = max(program.resources[n].registers for n in alike)
        slack = 4  # registers, by which the table may be rounded up
        assert (registers + slack) * (largest[name] + LIMITS["kSimd"]) > most, name


@needs_nvrtc
@pytest.mark.parametrize("epilogue", range(len(EPILOGUES)))
def test_two_groups_of_every_fused_kernel_with_an_epilogue_fit_a_core(epilogue: int) -> None:
    largest = largest_groups(epilogue)
    activation, _, forward, backward = EPILOGUES[epilogue]
    for operation, auxiliary in (("normalize", forward), ("normalize_gradient", backward)):
        p = Problem(operation, (1, 1, 8, 8), activation=activation, auxiliary=auxiliary)
        constants = p.plan().dispatches[0].constants
        for name, r in shader_program().of(constants).resources.items():
            if name.startswith("fused") and any(constants.values()):
                assert r.registers * largest[name] <= APPLE_REGISTERS // 2, name


@needs_nvrtc
def test_no_kernel_needs_more_registers_than_apple_has() -> None:
    """The one for which NVRTC takes 133 if it may spills nothing with 112."""
    p = Problem("normalize_gradient", (1, 2, 8, 16), "bfloat16", 16, wanted="x", groups=2)
    (d,) = replace(p, activation="gelu").plan().dispatches
    constants = tuple((index, value) for index, value in d.constants.items() if value)
    for registers in (None, 112):
        found = compile_program(
            _ext.shader_source, [d.instantiation], registers=registers, constants=constants
        ).resources[d.host_name]
        assert found.registers == registers or found.registers > APPLE_MOST_REGISTERS
        assert found.spill_bytes == found.stack_bytes == 0


@needs_nvrtc
def test_plans_are_for_as_many_threads_as_registers_allow(program: Program) -> None:
    """As csrc/gpu/compilation.cpp asks its pipelines, where a plan takes more for granted."""
    tuning = {"core_registers": 1 << 20, "fused_groups": 1}
    problem = Problem("normalize", (1, 2, 1024 * 4 * 8, 1), "float16")
    (fused,) = problem.plan(tuning).dispatches
    assert fused.threads == 1024
    allowed = program.resources[fused.host_name].most_threads
    assert 256 < allowed < 1024
    smaller = plan_within(program, problem, tuning)
    assert smaller.kernels != ["fused_normalize"]
    assert all(d.threads <= allowed for d in smaller.dispatches)
    fitting = replace(problem, geometry=(1, 2, allowed * 4 * 8, 1))
    (d,) = plan_within(program, fitting, tuning).dispatches
    assert (d.kernel, d.threads) == ("fused_normalize", allowed)


@pytest.mark.parametrize(
    ("registers", "threads"),
    [(16, 1024), (64, 1024), (65, 896), (72, 896), (80, 768), (96, 640), (128, 512), (255, 256)],
)
def test_threads_that_registers_allow(registers: int, threads: int) -> None:
    """The numbers of NVIDIA's occupancy tables for compute capability 9.0."""
    assert Resources(registers, 0, 0, 0).most_threads == threads


def test_messages_of_the_compiler() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'f' for 'sm_90'
ptxas info    : Function properties for f
    400 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 34 registers, used 1 barriers, 400 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compiling entry function 'g' for 'sm_90'
ptxas info    : Function properties for g
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    assert read_resources(log) == {"f": Resources(34, 400, 28, 4096), "g": Resources(8, 0, 0, 0)}


SPILLS = """
#include <metal_stdlib>
using namespace metal;
[[kernel]] void f(const device float* x [[buffer(0)]], device float* y [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {
  threadgroup float shared[64];
  float v[100];
  for (int k = 0; k < 100; ++k) v[k] = x[100 * i + k];
  for (int k = 0; k < 100; ++k) y[100 * i + k] = v[int(v[k])];
  shared[i] = v[3];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = shared[63 - i];
}
"""


@needs_nvrtc
def test_memory_of_a_thread_is_noticed() -> None:
    found = compile_program(SPILLS, []).resources["f"]
    assert (found.stack_bytes, found.shared_bytes) == (400, 256)
    found = compile_program(SPILLS.replace("v[int(v[k])]", "v[k]"), [], registers=24).resources["f"]
    assert found.registers <= 24


COPIES = """
#include <metal_stdlib>
using namespace metal;
[[kernel]] void f(const device float* x [[buffer(0)]], device float* y [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {
  y[i] = x[i];
}
"""


@needs_nvrtc
def test_a_program_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_text = compiler._compile

    def counting(text: str, options: Sequence[str]) -> Any:
        compiled.append(text)
        return compile_text(text, options)

    monkeypatch.setattr(compiler, "_compile", counting)
    monkeypatch.setattr(compiler, "CACHE", tmp_path)
    first = compile_program(COPIES, [])
    assert compile_program(COPIES, []) == first
    assert len(compiled) == 1
    compile_program(COPIES, [], flush_denormals=False)
    compile_program(COPIES.replace("= x[i]", "= -x[i]"), [])
    assert len(compiled) == 3
    # In another checkout, and without a compiler there
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in compiler.INCLUDE:
        shutil.copytree(folder, elsewhere / folder.parent.name)
    monkeypatch.setattr(
        compiler, "INCLUDE", [elsewhere / folder.parent.name for folder in compiler.INCLUDE]
    )
    monkeypatch.setattr(compiler, "_compiler_version", lambda: None)
    assert compile_program(COPIES, []) == first
    assert len(compiled) == 3
    # Another compiler makes another program.
    monkeypatch.setattr(compiler, "_compiler_version", lambda: (0, 0))
    compile_program(COPIES, [])
    assert len(compiled) == 4


@needs_nvrtc
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("bfloat b = 1.0f;", "no suitable constructor"),
        ("bfloat b = bfloat(1.0f); b = b * 2.0f;", "no operator|no suitable"),
        ("simd_sum(1l);", "this type"),
        ("undeclared();", "undeclared"),
    ],
)
def test_what_does_not_compile(body: str, message: str) -> None:
    source = f"""#include <metal_stdlib>
using namespace metal;
[[kernel]] void f(device float* y [[buffer(0)]]) {{ {body} }}
"""
    with pytest.raises(CompileError, match=message):
        compile_program(source, [])


# ---- The source ----------------------------------------------------------------------------------


def test_only_declarations_change() -> None:
    source = """enum Index { kA = 3, kB, kC = 7 };
constant float table[2] = {1.0f, 2.0f};
template <typename T>
[[kernel]] void f(constant uint& n [[buffer(kB)]], const device T* x [[buffer(kA)]],
                  device T* y [[buffer(kC)]], uint i [[thread_position_in_grid]]) {
  threadgroup T values[4], more;  // of all threads
  threadgroup T* here = values;
}
"""
    found = translate(
        source, ['template [[host_name("f_float")]] [[kernel]] decltype(f<float>) f<float>;']
    )
    assert "__constant__ float table[2]" in found.text
    assert "__shared__ T values[4], more;" in found.text
    assert "threadgroup T* here" in found.text
    assert "host_name" not in found.text
    assert [(p.name, p.index, p.by_value, p.read_only) for p in found.kernels["f_float"]] == [
        ("n", 4, True, True),
        ("x", 3, False, True),
        ("y", 7, False, False),
    ]
    assert "f<float>(n, x, y, cuda_twin::position_in_grid());" in found.text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("kernel void f(threadgroup float* s [[threadgroup(0)]]) {}", "only buffers"),
        ("kernel void f(device float& x [[buffer(0)]]) {}", "reference to device memory"),
    ],
)
def test_what_the_twin_does_not_have(source: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        translate(source, [])


SCALED = """
#include <metal_stdlib>
using namespace metal;
enum Constants { kFactor = 4, kNegative };
constant int factor [[function_constant(kFactor)]];
constant bool negative [[function_constant(kNegative)]];
[[kernel]] void f(const device float* x [[buffer(0)]], device float* y [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {
  y[i] = factor == 0 ? x[i] : (negative ? -factor : factor) * x[31 - i];
}
"""


def test_function_constants_are_constants_of_the_program() -> None:
    text = translate(SCALED, [], constants={4: 3}).text
    assert "constexpr int factor = 3;" in text
    assert "constexpr bool negative = 0;" in text


@needs_nvrtc
def test_kernels_run_with_their_function_constants() -> None:
    program = compile_program(SCALED, [])
    twin = Twin(Device(HostDriver(program, compile_library(SCALED), {})), program)
    x = np.arange(32, dtype=np.float32)
    cases: list[tuple[dict[int, int], Array, str]] = [
        ({}, x, "st.global"),
        ({4: 3}, 3 * x[::-1], "0f40400000"),
        ({4: 2, 5: True}, -2 * x[::-1], "0fC0000000"),
    ]
    for constants, expected, folded in cases:
        values = {index: scalar(value) for index, value in constants.items()}
        y = np.full(32, np.nan, np.float32)
        options = {"grid": (1, 1, 1), "group": (32, 1, 1), "writable": {1}, "constants": {}}
        twin.dispatch("f", {0: x, 1: y}, function_constants=values, **options)  # type: ignore[arg-type]
        np.testing.assert_array_equal(y, expected)
        ptx = program.of(values).ptx
        assert folded in ptx
        assert "setp" not in ptx, "an instruction asks for their values"
    assert len(program.specialized) == 2


def test_enumerators() -> None:
    assert enumerators("enum A { x = 2, y, z = 9, }; enum : uint { u }; enum { s = T::n };") == {
        "x": 2,
        "y": 3,
        "z": 9,
        "u": 0,
    }
    shared = enumerators(re.sub(r"//[^\n]*", "", _ext.shader_source))
    assert shared["kX"] == 1
    assert shared["kEntries"] == LIMITS["kEntries"]


# ---- Running, on the host or on a GPU ------------------------------------------------------------


@pytest.fixture(scope="module")
def host(program: Program) -> HostDriver:
    return HostDriver(program, shaders(), struct_bytes())


@pytest.fixture(scope="module")
def on_host(program: Program, host: HostDriver) -> Twin:
    return Twin(Device(host), program)


@pytest.fixture(scope="module")
def gpu() -> Device:
    try:
        return Device()
    except DeviceError as error:
        pytest.skip(f"no NVIDIA GPU: {error}")


@pytest.fixture(scope="module")
def on_gpu(gpu: Device) -> Twin:
    return Twin(gpu, shader_program(gpu.architecture))


@needs_nvrtc
def test_every_kernel_gets_its_arguments(on_host: Twin, host: HostDriver) -> None:
    host.calls.clear()
    for problem in whole_table():
        solve_on_device(on_host, problem)
    assert {call[1] for call in host.calls if call[0] == "cuLaunchKernel"} == ALL.keys()
    assert not host.memory, "memory that was not freed"


@needs_nvrtc
@pytest.mark.parametrize("problem", SOME, ids=str)
def test_plans_run_one_dispatch_at_a_time(on_host: Twin, problem: Problem) -> None:
    solve(on_host, problem)


@needs_nvrtc
def test_sums_beyond_float16_are_infinite(on_host: Twin) -> None:
    problem = Problem(
        "normalize_gradient", (1, 2, 151737, 1), "float16", 2, weight=True, wanted="weight bias"
    )
    example = Example(problem)
    assert example.truth["grad_bias"].min() > 65520
    arrays = example.arrays()
    run_plan(on_host, on_host.plan(problem), arrays)
    example.check(arrays)
    arrays["grad_bias"][:] = 65504
    with pytest.raises(AssertionError, match="inf location mismatch"):
        example.check(arrays)


@needs_nvrtc
def test_grid_and_group(on_host: Twin, host: HostDriver) -> None:
    problem = SOME[2]
    host.calls.clear()
    run_example(on_host, problem)
    launched = [call[1:] for call in host.calls if call[0] == "cuLaunchKernel"]
    assert launched == [
        (d.host_name, (d.groups, 1, 1), d.threads) for d in problem.plan().dispatches
    ]


@needs_nvrtc
@pytest.mark.parametrize("aligned", [True, False])
def test_arrays_begin_where_they_do_on_the_host(
    on_host: Twin, host: HostDriver, aligned: bool
) -> None:
    problem = replace(SOME[3], aligned=aligned)
    for solved in (solve, solve_on_device):
        host.offsets.clear()
        solved(on_host, problem)
        off = {name for name, offset in host.offsets if offset != 0}
        assert off == (set() if aligned else {"x", "z"})


@needs_nvrtc
def test_out_may_be_an_input(on_host: Twin) -> None:
    problem = SOME[0]
    example = Example(problem)
    apart, together = example.arrays(), example.arrays()
    together["out"] = together["x"]
    for arrays in (apart, together):
        run_plan(on_host, problem.plan(), arrays)
    np.testing.assert_array_equal(together["out"].ravel(), apart["out"].ravel())


@needs_nvrtc
@pytest.mark.parametrize("threads", [0, 33, 1024])
def test_groups_that_the_twin_does_not_run(program: Program, on_host: Twin, threads: int) -> None:
    (d,) = Problem("normalize", (1, 2, 256 * 4 * 8, 1), "float16").plan().dispatches
    most = program.resources[d.host_name].most_threads
    assert most < 1024
    with pytest.raises(DeviceError, match=f"multiple of 32 threads up to {most}"):
        on_host.launch(d.host_name, {}, {}, (d.groups, 1, 1), (threads, 1, 1))


@needs_nvrtc
def test_times_are_between_events_after_a_flush(on_host: Twin, host: HostDriver) -> None:
    device = on_host.device
    flush = Memory(device, 64)
    host.calls.clear()
    steps: list[int] = []
    times = device.times(lambda: steps.append(len(host.calls)), 3, flush)
    assert len(times) == 3
    assert len(steps) == 4, "one to warm up, three that are timed"
    names = [call[0] for call in host.calls]
    assert names[:3] == ["cuMemsetD8Async", "cuEventRecord", "cuEventRecord"]
    assert names.count("cuEventDestroy") == 6


@needs_nvrtc
def test_wrong_results_are_counted(program: Program, on_host: Twin) -> None:
    class Lazy(HostDriver):
        def cuLaunchKernel(self, function: Function, *more: Any) -> tuple[int]:  # noqa: N802
            if function.name.startswith("moments"):
                return (0,)
            return super().cuLaunchKernel(function, *more)

    lines: list[str] = []
    assert check_all(on_host, SOME, lines.append) == 0
    assert lines == [f"{len(SOME)} of {len(SOME)} problems are right on the host"]
    lazy = Twin(Device(Lazy(program, shaders(), struct_bytes())), program)
    wanting = [p for p in SOME if {"moments", "moments_gradient"} & set(p.plan().kernels)]
    assert check_all(lazy, SOME, lines.append) == len(wanting) > 0
    assert f"{len(SOME) - len(wanting)} of {len(SOME)} problems" in lines[-1]


@needs_nvrtc
def test_table_of_resources(program: Program) -> None:
    lines = resources_table(program).splitlines()
    assert len(lines) == 2 + len(ALL)
    r = program.resources["merge_sums"]
    assert f"| `merge_sums` | {r.registers} | 0 | 0 | 2048 | 1024 |" in lines


@needs_nvrtc
def test_the_check_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Device) -> None:
        raise DeviceError("no NVIDIA driver: none")

    monkeypatch.setattr(Device, "__init__", fail)
    assert cuda_twin.__main__.main(["check"]) == 2
    assert "Not run: no NVIDIA driver: none." in capsys.readouterr().err


@pytest.mark.parametrize("reason", ["no GPU", "an error"])
def test_without_a_gpu_the_reason_is_given(reason: str) -> None:
    class Broken(HostDriver):
        def cuDeviceGetCount(self) -> tuple[int, int]:  # noqa: N802
            return (0, 0) if reason == "no GPU" else (100, 0)

    with pytest.raises(DeviceError, match=r"has no GPU|cuDeviceGetCount: 100"):
        Device(Broken(None, None, {}))  # type: ignore[arg-type]


def test_tuning_changes_the_plan() -> None:
    problem = Problem("moments", (1, 1, 100_000, 64))
    (split, _) = problem.plan().dispatches
    (less, _) = problem.plan({"enough_groups": 8}).dispatches
    assert less.groups == 8 < split.groups
    assert problem.plan({"sweep_threads": 128}).dispatches[0].threads == 128


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"groups": 1}, "must name constants .* but got 'groups'"),
        ({"sweep_threads": 512}, "power of two from 32 to 256 but got 512"),
        ({"sweep_threads": 96}, "power of two from 32 to 256 but got 96"),
        ({"least_run": 8}, "power of two from 16 to 512 but got 8"),
        ({"least_vectors": 0}, "positive least_vectors but got 0"),
    ],
)
def test_tuning_that_no_plan_can_have(tuning: Mapping[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SOME[0].plan(tuning)


@given(problems(most_elements=3_000))
def test_tuned_plans_are_right(problem: Problem) -> None:
    tuning = {"sweep_threads": 64, "enough_groups": 8, "least_vectors": 2, "apply_vectors": 1}
    tuning |= {"least_run": 128, "fused_forward_threads": 96, "fused_backward_threads": 64}
    example = Example(problem)
    arrays = example.arrays()
    run_plan(shaders(), problem.plan(tuning), arrays)
    example.check(arrays)


# ---- On a GPU ------------------------------------------------------------------------------------


@needs_nvrtc
def test_every_kernel_is_right_on_a_gpu(on_gpu: Twin) -> None:
    for problem in whole_table() + full_groups():
        solve(on_gpu, problem)
        solve_on_device(on_gpu, problem)


@needs_nvrtc
def test_the_same_bits_again_on_a_gpu(on_gpu: Twin) -> None:
    """No result depends on the order in which threads come."""
    for problem in SOME:
        example = Example(problem)
        results = []
        for _ in range(10):
            arrays = example.arrays()
            run_plan(on_gpu, on_gpu.plan(problem), arrays)
            example.check(arrays)
            results.append({name: arrays[name].tobytes() for name in example.truth})
        assert all(result == results[0] for result in results), problem


@needs_nvrtc
def test_denormals_make_no_difference_on_a_gpu(gpu: Device) -> None:
    twin = Twin(gpu, shader_program(gpu.architecture, flush_denormals=False))
    for problem in SOME:
        solve(twin, problem)


# ---- Bandwidth -----------------------------------------------------------------------------------


def test_bytes_that_bandwidth_is_made_of() -> None:
    """Readings and writings of arrays the size of x, as the simulator counts them."""
    for case in small_cases():
        traffic = run_example(shaders(instrumented=True), case.problem)
        moved = sum(
            t.read + t.written
            for of_dispatch in traffic
            for name, t in of_dispatch.items()
            if name in LIKE_X
        )
        assert moved == bandwidth.passes(case.problem.plan()) * case.nbytes, case


def small_cases() -> list[Case]:
    """Of each plan that is measured, at a size for the simulator."""
    found = [
        replace(case, images=3, side=side, channels=8)
        for case in bandwidth.cases([1], DTYPES, MODES, KINDS)
        for side in (8, 72)
    ]
    assert {len(case.problem.plan().dispatches) for case in found} == {1, 2, 3, 4}
    return found


@needs_nvrtc
def test_measurement(on_host: Twin, host: HostDriver) -> None:
    """With the host's driver: the time between two of its events is the number of the second."""
    flush = Memory(on_host.device, 64)
    for case in small_cases():
        rows, left_out = bandwidth.measure(
            on_host, case, torch=None, repetitions=3, flush=flush, tuning={}, budget=Budget()
        )
        assert not left_out
        assert [row.implementation for row in rows] == ["copy", "shaders"]
        copy, ours = rows
        moved = bandwidth.passes(case.problem.plan()) / 2
        assert ours.share == pytest.approx(moved * copy.milliseconds / ours.milliseconds)
        assert ours.kernels.split() == case.problem.plan().kernels
    assert len(host.memory) == 1, "memory that was not freed"


def a_row(implementation: str, milliseconds: float, share: float, **of_case: Any) -> Row:
    case = Case("instance", "forward", "channels last", "float32", 256, **of_case)
    return Row(case, implementation, case.nbytes, milliseconds, share)


def test_targets_that_are_missed() -> None:
    reached = [a_row("shaders", 1.0, 0.86), a_row("torch", 1.4, 0.6)]
    assert bandwidth.missed(reached) == []
    slow = [a_row("shaders", 1.0, 0.84), a_row("torch", 1.2, 0.7)]
    assert [line.split(": ")[1] for line in bandwidth.missed(slow)] == [
        "84% of the copy, not 85%",
        "1.20 times as fast as torch, not 1.3",
    ]
    small = [a_row("shaders", 1.3, 0.1, side=4), a_row("torch", 1.0, 0.1, side=4)]
    assert len(bandwidth.missed(small)) == 1


def test_results_are_written(tmp_path: Path) -> None:
    rows = [a_row("copy", 0.5, 1.0), a_row("shaders", 1.0, 0.86), a_row("torch", 1.4, 0.6)]
    table = bandwidth.markdown(rows)
    assert (
        "| instance forward, channels last, float32 | 256 | 0.500 (100%) | 1.000 (86%) |" in table
    )
    bandwidth.plot(rows, "a GPU", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_measured_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Device) -> None:
        raise DeviceError("cuda-bindings is not installed")

    monkeypatch.setattr(Device, "__init__", fail)
    assert bandwidth.main(["--quick"]) == 1
    assert "Nothing to measure: cuda-bindings is not installed." in capsys.readouterr().err


# ---- The stand-in --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["on the host", "on a GPU"])
def standin(request: pytest.FixtureRequest) -> Twin:
    """The kernels of standin.metal: in the simulator by way of the host's driver, or on a GPU."""
    source = (request.config.rootpath / STANDIN).read_text()
    if request.param == "on a GPU":
        gpu = request.getfixturevalue("gpu")
        return Twin(gpu, compile_program(source, [], architecture=gpu.architecture))
    program = compile_program(source, [])
    sizes = {"narrow": 4, "reverse": 8}
    return Twin(Device(HostDriver(program, compile_library(source), sizes)), program)


def dispatch(twin: Twin, kernel: str, threads: int, groups: int, out: Array, **more: Any) -> Array:
    buffers = more.pop("buffers")
    indices = [p.index for p in twin.program.kernels[kernel] if not p.by_value]
    named = dict(zip(indices, [*buffers, out], strict=True))
    twin.dispatch(
        kernel,
        named,
        grid=(groups, 1, 1),
        group=(threads, 1, 1),
        writable={indices[-1]},
        constants=more.pop("constants", {}),
    )
    return out


@needs_nvrtc
def test_narrow_types(standin: Twin) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            rng.normal(size=96),
            2.0 ** rng.uniform(-14, 15, 64),
            [0.0, -0.0, 65504, 65520, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8],
        ]
    ).astype(np.float32)
    out = np.zeros((6, x.size), np.float32)
    size = np.uint32(x.size).tobytes()
    dispatch(standin, "narrow", 64, 3, out, buffers=[x], constants={2: size})

    def bfloat(v: Array) -> Array:
        bits = v.astype(np.float32).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
        return (rounded.astype(np.uint32) << np.uint32(16)).view(np.float32)

    with np.errstate(over="ignore"):
        h = x.astype(np.float16)
        b = bfloat(x)
        np.testing.assert_array_equal(out[0], h.astype(np.float32))
        np.testing.assert_array_equal(out[1], b)
        np.testing.assert_array_equal(out[4], -h.astype(np.float32))
        np.testing.assert_array_equal(out[5], h.astype(np.float32) + x)
        np.testing.assert_array_equal(out[2], (h * h).astype(np.float32))
    np.testing.assert_array_equal(out[3], bfloat(b * b))


@needs_nvrtc
def test_lanes(standin: Twin) -> None:
    x = np.arange(32, dtype=np.float32) - 3
    out = np.zeros((14, 32), np.float32)
    dispatch(standin, "lanes", 32, 1, out, buffers=[x])
    lane = np.arange(32)
    expected = [
        np.full(32, x.sum()),
        np.full(32, x.max()),
        np.full(32, x.min()),
        np.full(32, x[5]),
        np.full(32, x[0]),
        x[::-1],
        x[lane ^ 3],
        x[np.where(lane + 7 < 32, lane + 7, lane)],
        x[np.where(lane >= 7, lane - 7, lane)],
        x[(lane + 7) % 32],
        x[(lane - 7) % 32],
        x[lane ^ 3],
        np.ones(32),
        np.zeros(32),
    ]
    np.testing.assert_array_equal(out, np.array(expected, np.float32))


@needs_nvrtc
def test_threadgroup_memory_and_structs_by_value(standin: Twin) -> None:
    x = np.arange(3 * 256, dtype=np.float32)
    out = np.zeros_like(x)
    constants = {0: np.array([2, 0.5], np.float32).tobytes()}
    dispatch(standin, "reverse", 256, 3, out, buffers=[x], constants=constants)
    expected = 2 * x.reshape(3, 256)[:, ::-1] + 0.5 + 3
    np.testing.assert_array_equal(out, expected.ravel())


@needs_nvrtc
def test_vectors(standin: Twin) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(64, 4)).astype(np.float32)
    out = np.zeros_like(x)
    dispatch(standin, "vectors", 64, 1, out, buffers=[x])
    y = np.where(x < 0, -x, x * x + 1)
    pair = 2 * x[:, [0, 3, 0, 3]]
    expected = np.maximum(y, pair) + x.astype(np.float16).astype(np.float32) - np.sqrt(np.abs(x))
    expected = expected + (x * x).sum(1, keepdims=True) / np.sqrt(1 + np.abs(x[:, 1:2]))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
