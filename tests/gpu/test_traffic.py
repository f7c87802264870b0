"""What every path reads and writes, counted byte by byte while the shaders run in the simulator.

With R one reading and W one writing of an array the size of x: in a batch or a large instance,
forward 2R + 1W and backward 4R + 1W (x and g, twice each); where a threadgroup holds all of a
statistic's elements, forward 1R + 1W and backward 2R + 1W. Every result is compared with float64.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from plan_cases import running_statistics
from plans import (
    DTYPES,
    ITEM_BYTES,
    MOMENTS_BYTES,
    OF_CHANNELS,
    SUMS_BYTES,
    Dispatch,
    Example,
    Plan,
    Problem,
    dtype_of,
    problems,
    run_example,
    run_plan,
    shaders,
)
from simulator import SimulatorError, Traffic
from walks import SECOND_PASS

AT_Y = {"mean", "var", "weight"}
LARGE = {"x", "g", "residual", "grad_residual", "out"}


def layout(
    geometry: tuple[int, int, int, int], channels: int, *, aligned: bool = True, threads: int = 128
) -> Problem:
    return Problem("", geometry, channels=channels, aligned=aligned, max_threads=threads)


# With small threadgroups, so that few elements are too many for one.
TOO_LARGE = {
    "batch, channels last": layout((1, 1, 521, 16), 16),
    "batch, channels last, unaligned": layout((1, 1, 521, 16), 16, aligned=False),
    "batch, channels last, odd": layout((1, 1, 1031, 5), 5),
    "batch, channels last, split": layout((1, 1, 3001, 8), 8, threads=32),
    "batch, channels last, 1024 threads": layout((1, 1, 2101, 16), 16, threads=1024),
    "batch, channels last, many channels": layout((1, 1, 257, 331), 331),
    "batch, channels first": layout((3, 4, 131, 1), 4),
    "batch, channels first, whole vectors": layout((3, 4, 128, 1), 4),
    "batch, channels first, unaligned": layout((3, 4, 131, 1), 4, aligned=False),
    "batch, channels first, short": layout((17, 5, 3, 1), 5),
    "batch, channels first, split": layout((2, 3, 9001, 1), 3, threads=32),
    "batch, channels in the middle of vectors": layout((3, 2, 37, 8), 16),
    "instances, channels last": layout((1, 3, 521, 24), 24),
    "instances, channels last, odd": layout((1, 3, 521, 7), 7),
    "instances, channels first": layout((1, 6, 4613, 1), 3),
    "instances, channels first, unaligned": layout((1, 6, 4613, 1), 3, aligned=False),
    "instances, channels first, 1024 threads": layout((1, 1, 33001, 1), 1, threads=1024),
    "instances, channels first, split": layout((1, 2, 17003, 1), 1, threads=32),
}

HELD = {
    "batch, channels last": layout((1, 1, 61, 16), 16),
    "batch, channels last, odd": layout((1, 1, 61, 13), 13),
    "instances, channels last": layout((1, 3, 61, 16), 16),
    "instances, channels last, odd": layout((1, 3, 61, 5), 5),
    "instances, channels last, unaligned": layout((1, 3, 61, 16), 16, aligned=False),
    "instances, channels last, short": layout((1, 9, 2, 40), 40),
    "instances, channels first": layout((1, 7, 197, 1), 7),
    "instances, channels first, whole vectors": layout((1, 6, 256, 1), 3),
    "instances, channels first, unaligned": layout((1, 6, 197, 1), 3, aligned=False),
    "instances, channels first, short": layout((1, 300, 3, 1), 100),
    "instances, channels first, one value": layout((1, 33, 1, 2), 2),
}

large = pytest.mark.parametrize("problem", TOO_LARGE.values(), ids=TOO_LARGE.keys())
held = pytest.mark.parametrize("problem", HELD.values(), ids=HELD.keys())
every_layout = pytest.mark.parametrize(
    "problem",
    [*TOO_LARGE.values(), *HELD.values()],
    ids=[*(f"large {name}" for name in TOO_LARGE), *(f"held {name}" for name in HELD)],
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def small_traffic(problem: Problem, plan: Plan, d: Dispatch) -> dict[str, Traffic]:
    """Of all buffers but the LARGE ones: the most that may be read, and exactly what is written.

    A thread of a sweep reads what it needs of each of its statistics once; a merge reads each part
    once.
    """
    of_each = d.groups * d.threads * (d.vector if d.sweeps and d.columns else 1)
    bounds = {}
    for b in d.buffers:
        if b.buffer in LARGE:
            continue
        if b.buffer == "partials":
            # Moments or Sums; a single part is written to the array that would merge the parts
            sizes = {"moments": problem.slots * MOMENTS_BYTES, **plan.temporaries}
            size = read = sizes[b.array]
        elif b.buffer == "sums":
            size = plan.temporaries.get(b.array, 0)
            read = of_each * SUMS_BYTES if d.sweeps else size
            if b.array == "var":
                read = 0  # there are none
        elif b.buffer == "group_sums":
            size = plan.temporaries[b.buffer]
            read = 0
        elif b.buffer == "moments":
            size = read = problem.statistics * MOMENTS_BYTES
        elif b.buffer == "update":
            size = read = 3 * problem.channels * ITEM_BYTES["float32"]  # the same for all of them
        else:
            item = ITEM_BYTES[dtype_of(b.buffer, problem.dtype)]
            of_channels = b.buffer in OF_CHANNELS
            size = (problem.weights if of_channels else problem.statistics) * item
            read = of_each * item if d.sweeps else size
            if d.grouped and d.kernel == "fused_gradient" and b.buffer == "weight":
                read *= 2  # for the sums of groups, and for grad x
            if d.kernel == "fused_gradient" and problem.activation and b.buffer in AT_Y:
                read += of_each * item  # for y, at which the derivative is taken
            if d.kernel in ("merge_group_sums", "parameter_gradients") and not b.written:
                read = problem.slots * item  # of each slot
            if b.array != b.buffer:
                read = size = 0  # it stands in for an absent one
        bounds[b.buffer] = Traffic(0, size) if b.written else Traffic(read, 0)
    return bounds


def passes(problem: Problem) -> tuple[list[str], dict[str, tuple[float, float]]]:
    """Runs a problem. Its kernels, and how often LARGE buffers were read and written, in arrays."""
    library = shaders(instrumented=True)
    assert library.instrumented
    plan = problem.plan()
    traffic = run_example(library, problem)
    for d, counted in zip(plan.dispatches, traffic, strict=True):
        bounds = small_traffic(problem, plan, d)
        for name, bound in bounds.items():
            assert counted[name].read <= bound.read, (d.kernel, name)
            assert counted[name].written == bound.written, (d.kernel, name)
        assert counted.keys() - bounds.keys() <= LARGE
    whole = {}
    for name in LARGE:
        read = sum(counted[name].read for counted in traffic if name in counted)
        written = sum(counted[name].written for counted in traffic if name in counted)
        if read or written:
            whole[name] = read / problem.nbytes, written / problem.nbytes
    return plan.kernels, whole


def kinds(kernels: list[str]) -> list[str]:
    """Kernels without those that merge."""
    return [k for k in kernels if not k.startswith("merge_") and k != "parameter_gradients"]


@every_dtype
@large
def test_forward_reads_twice(problem: Problem, dtype: str) -> None:
    problem = replace(problem, operation="normalize", dtype=dtype, weight=True, bias=True)
    kernels, whole = passes(problem)
    assert kinds(kernels) in (
        ["moments", "normalize_input"],
        ["partial_moments", "normalize_input"],
    )
    assert whole == {"x": (2, 0), "out": (0, 1)}


@every_dtype
@large
def test_backward_reads_four_times(problem: Problem, dtype: str) -> None:
    problem = replace(
        problem,
        operation="normalize_gradient",
        dtype=dtype,
        weight=True,
        wanted="x weight bias",
    )
    kernels, whole = passes(problem)
    assert kinds(kernels) == ["partial_sums", "input_gradient"]
    assert whole == {"x": (2, 0), "g": (2, 0), "out": (0, 1)}


@every_dtype
@held
def test_forward_of_what_a_threadgroup_holds_reads_once(problem: Problem, dtype: str) -> None:
    problem = replace(problem, operation="normalize", dtype=dtype, weight=True, bias=True)
    kernels, whole = passes(problem)
    assert kernels == ["fused_normalize"]
    assert whole == {"x": (1, 0), "out": (0, 1)}


@every_dtype
@held
def test_backward_of_what_a_threadgroup_holds_reads_twice(problem: Problem, dtype: str) -> None:
    problem = replace(problem, operation="normalize_gradient", dtype=dtype, weight=True, wanted="x")
    kernels, whole = passes(problem)
    assert kernels == ["fused_gradient"]
    assert whole == {"x": (1, 0), "g": (1, 0), "out": (0, 1)}


@held
def test_gradients_of_parameters_add_no_pass(problem: Problem) -> None:
    problem = replace(problem, operation="normalize_gradient", weight=True, wanted="x weight bias")
    kernels, whole = passes(problem)
    assert kernels == ["fused_gradient", "parameter_gradients"]
    assert whole == {"x": (1, 0), "g": (1, 0), "out": (0, 1)}


@every_layout
def test_gradients_of_parameters_alone_read_once_and_write_nothing(problem: Problem) -> None:
    problem = replace(problem, operation="normalize_gradient", weight=True, wanted="weight bias")
    _, whole = passes(problem)
    assert whole == {"x": (1, 0), "g": (1, 0)}


@every_dtype
@every_layout
def test_moments_read_once(problem: Problem, dtype: str) -> None:
    _, whole = passes(replace(problem, operation="moments", dtype=dtype))
    assert whole == {"x": (1, 0)}


@every_layout
def test_gradient_of_moments_reads_once(problem: Problem) -> None:
    _, whole = passes(replace(problem, operation="moments_gradient"))
    assert whole == {"x": (1, 0), "out": (0, 1)}


def of_batch(problem: Problem, dtype: str, operation: str, wanted: str = "") -> Problem:
    """With given statistics, of which each channel has one."""
    return replace(
        problem,
        operation=operation,
        dtype=dtype,
        channels=problem.statistics,
        given=True,
        weight=True,
        bias=operation == "normalize",
        wanted=wanted,
    )


@every_dtype
@every_layout
def test_evaluation_reads_once(problem: Problem, dtype: str) -> None:
    kernels, whole = passes(of_batch(problem, dtype, "normalize"))
    assert kernels == ["normalize_input"]
    assert whole == {"x": (1, 0), "out": (0, 1)}


@every_dtype
@every_layout
def test_gradient_of_evaluation_reads_g_once(problem: Problem, dtype: str) -> None:
    kernels, whole = passes(of_batch(problem, dtype, "normalize_gradient", "x"))
    assert kernels == ["given_input_gradient"]
    assert whole == {"g": (1, 0), "out": (0, 1)}


@every_layout
def test_all_gradients_of_evaluation(problem: Problem) -> None:
    _, whole = passes(
        of_batch(problem, "float32", "normalize_gradient", "x statistics weight bias")
    )
    assert whole == {"x": (1, 0), "g": (1, 0), "out": (0, 1)}


@every_dtype
@pytest.mark.parametrize("instances", [1, 70])
def test_running_statistics_are_read_and_written_once(instances: int, dtype: str) -> None:
    problem = running_statistics(dtype, instances)
    plan = problem.plan()
    (counted,) = run_example(shaders(instrumented=True), problem)
    channels = problem.channels * ITEM_BYTES[dtype]
    for name in ("mean", "var"):
        assert counted[name] == Traffic(problem.statistics * ITEM_BYTES["float32"], 0)
        assert counted[f"running_{name}"] == Traffic(channels, 0)
        assert counted[f"next_{name}"] == Traffic(0, channels)
    assert not plan.temporaries


@given(problems(most_elements=20_000))
def test_nothing_is_read_or_written_in_part_or_twice_in_a_pass(problem: Problem) -> None:
    library = shaders(instrumented=True)
    plan = problem.plan()
    traffic = run_example(library, problem)
    for d, counted in zip(plan.dispatches, traffic, strict=True):
        for b in d.buffers:
            if b.array in LARGE:  # and not one that stands in for an absent one
                whole = Traffic(0, problem.nbytes) if b.written else Traffic(problem.nbytes, 0)
                assert counted[b.buffer] == whole, (d.kernel, b.buffer)
        for name, bound in small_traffic(problem, plan, d).items():
            assert counted[name].read <= bound.read, (d.kernel, name)
            assert counted[name].written == bound.written, (d.kernel, name)


# ---- The order of a pass -------------------------------------------------------------------------

TWO_PASSES = {
    "columns": Problem("", (1, 1, 1201, 16), channels=16, weight=True, max_threads=64),
    "rows": Problem("", (1, 2, 17003, 1), channels=2, weight=True, max_threads=32),
}
OPERATIONS = ("moments", "moments_gradient", "normalize", "normalize_gradient", "input_gradient")


@pytest.mark.parametrize("problem", TWO_PASSES.values(), ids=TWO_PASSES.keys())
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_second_pass_begins_where_the_first_ends(problem: Problem, operation: str) -> None:
    """What the first pass read last is still in caches: threadgroup 0 then has the last elements.

    Without them a dispatch fails in the threadgroup that would read them.
    """
    wanted = "x" if operation == "normalize_gradient" else ""
    problem = replace(problem, operation=operation, wanted=wanted)
    library, arrays = shaders(), Example(problem).arrays()
    plan = problem.plan()
    seen = set()
    for d in plan.dispatches:
        one = replace(plan, dispatches=(d,))
        if d.sweeps:
            assert d.groups > 1
            seen.add(d.kernel)
            read = {name for name in ("x", "g") if any(b.array == name for b in d.buffers)}
            short = {name: arrays[name].ravel()[:-64].copy() for name in read}
            with pytest.raises(SimulatorError, match="out of bounds") as caught:
                run_plan(library, one, {**arrays, **short}, seed=0)
            where = re.search(r"threadgroup \((\d+), 0, 0\)", str(caught.value))
            assert where is not None
            last = 0 if d.kernel in SECOND_PASS else d.groups - 1
            assert int(where[1]) == last, d.kernel
    assert seen


# ---- A batch that several processes share: 2R + 1W and 4R + 1W, as with one's own ----------------


@every_dtype
@every_layout
def test_moments_of_a_share_read_once(problem: Problem, dtype: str) -> None:
    kernels, whole = passes(replace(problem, operation="partial_moments", dtype=dtype))
    assert kinds(kernels) == ["partial_moments"]
    assert whole == {"x": (1, 0)}


@every_dtype
@every_layout
def test_gradients_of_statistics_and_parameters_of_a_share_read_once(
    problem: Problem, dtype: str
) -> None:
    wanted = "statistics weight bias"
    kernels, whole = passes(of_batch(problem, dtype, "normalize_gradient", wanted))
    assert kinds(kernels) == ["partial_sums", "given_gradients"]
    assert whole == {"x": (1, 0), "g": (1, 0)}


@every_dtype
@every_layout
def test_gradient_of_a_share_reads_once(problem: Problem, dtype: str) -> None:
    kernels, whole = passes(replace(problem, operation="input_gradient", dtype=dtype, weight=True))
    assert kernels == ["input_gradient"]
    assert whole == {"x": (1, 0), "g": (1, 0), "out": (0, 1)}


# ---- Groups of channels --------------------------------------------------------------------------


def of_groups(
    geometry: tuple[int, int, int, int], channels: int, groups: int, **options: Any
) -> Problem:
    return replace(layout(geometry, channels), groups=groups, weight=True, **options)


GROUPS = {
    "channels last": of_groups((1, 2, 521, 24), 24, 6, bias=True),
    "channels last, interleaved": of_groups((1, 2, 521, 24), 24, 8, interleaved=True, bias=True),
    "channels last, one group": of_groups((1, 3, 531, 20), 20, 1),
    "channels last, a group each": of_groups((1, 3, 521, 20), 20, 20, per_instance=True),
    "channels last, split": of_groups((1, 1, 3001, 8), 8, 4, max_threads=32, per_instance=True),
    "channels last, odd": of_groups((1, 2, 531, 15), 15, 5, interleaved=True),
    "channels last, unaligned": of_groups((1, 2, 531, 16), 16, 2, aligned=False),
    "channels last, interleaved across vectors": of_groups((1, 2, 61, 24), 24, 6, interleaved=True),
    "channels first": of_groups((1, 24, 4613, 1), 12, 3, bias=True),
    "channels first, interleaved": of_groups((1, 24, 4613, 1), 12, 3, interleaved=True, bias=True),
    "channels first, split": of_groups((1, 6, 9001, 1), 6, 2, max_threads=32, per_instance=True),
    "channels first, many members": of_groups((1, 320, 3, 1), 160, 32, aligned=False),
    "many members": of_groups((1, 1, 3, 2048), 2048, 2),
    "many members, interleaved": of_groups((1, 1, 3, 2048), 2048, 2, interleaved=True),
}

HELD_GROUPS = {
    "channels last": of_groups((1, 2, 61, 24), 24, 6, bias=True),
    "channels last, interleaved": of_groups((1, 2, 61, 24), 24, 8, interleaved=True, bias=True),
    "channels last, one group": of_groups((1, 3, 13, 40), 40, 1, per_instance=True),
    "channels last, several strips": of_groups((1, 2, 5, 480), 480, 32),
    "channels last, several interleaved strips": of_groups(
        (1, 2, 5, 480), 480, 160, interleaved=True
    ),
    "channels last, a group each": of_groups((1, 3, 61, 16), 16, 16, per_instance=True),
    "channels last, odd": of_groups((1, 2, 61, 15), 15, 5, interleaved=True, aligned=False),
    "channels last, one position": of_groups((1, 9, 1, 48), 48, 8, interleaved=True),
    "channels first": of_groups((1, 24, 197, 1), 12, 4, bias=True),
    "channels first, short": of_groups((1, 64, 3, 1), 32, 16, aligned=False),
    "channels first, interleaved": of_groups((1, 24, 197, 1), 12, 3, interleaved=True),
    "channels first, several interleaved": of_groups(
        (1, 64, 3, 1), 32, 8, interleaved=True, aligned=False, per_instance=True
    ),
}

large_groups = pytest.mark.parametrize("problem", GROUPS.values(), ids=GROUPS.keys())
held_groups = pytest.mark.parametrize("problem", HELD_GROUPS.values(), ids=HELD_GROUPS.keys())
every_group = pytest.mark.parametrize(
    "problem",
    [*GROUPS.values(), *HELD_GROUPS.values()],
    ids=[*(f"large {name}" for name in GROUPS), *(f"held {name}" for name in HELD_GROUPS)],
)


@every_dtype
@large_groups
def test_groups_are_read_as_often_as_instances(problem: Problem, dtype: str) -> None:
    p = replace(problem, operation="normalize", dtype=dtype)
    kernels, whole = passes(p)
    if p.members > 1:
        assert kernels == ["partial_moments", "merge_group_moments", "normalize_input"]
    assert whole == {"x": (2, 0), "out": (0, 1)}
    p = replace(p, operation="normalize_gradient", bias=False, wanted="x weight bias")
    kernels, whole = passes(p)
    if p.members > 1:
        assert kinds(kernels) == ["partial_sums", "input_gradient"]
        assert kernels.count("merge_group_sums") == 1
    assert whole == {"x": (2, 0), "g": (2, 0), "out": (0, 1)}


@every_dtype
@every_group
def test_groups_of_given_statistics_are_read_once(problem: Problem, dtype: str) -> None:
    p = replace(problem, operation="normalize", dtype=dtype, given=True)
    kernels, whole = passes(p)
    assert kernels == ["normalize_input"]
    assert whole == {"x": (1, 0), "out": (0, 1)}
    p = replace(p, operation="normalize_gradient", bias=False, wanted="x")
    assert passes(p) == (["given_input_gradient"], {"g": (1, 0), "out": (0, 1)})
    _, whole = passes(replace(p, wanted="x statistics weight bias"))
    assert whole == {"x": (1, 0), "g": (1, 0), "out": (0, 1)}


@every_dtype
@held_groups
def test_groups_that_a_threadgroup_holds_are_read_once(problem: Problem, dtype: str) -> None:
    p = replace(problem, operation="normalize", dtype=dtype, max_threads=512)
    assert passes(p) == (["fused_normalize"], {"x": (1, 0), "out": (0, 1)})
    p = replace(p, operation="normalize_gradient", bias=False, wanted="x weight bias")
    kernels, whole = passes(p)
    assert kernels == ["fused_gradient", "parameter_gradients"]
    assert whole == {"x": (1, 0), "g": (1, 0), "out": (0, 1)}


@every_dtype
@every_group
def test_moments_of_groups_read_once(problem: Problem, dtype: str) -> None:
    """x as it is: no copy in the order of the groups."""
    p = replace(problem, operation="moments", dtype=dtype, weight=False, bias=False)
    assert passes(p)[1] == {"x": (1, 0)}
    p = replace(p, operation="moments_gradient")
    assert passes(p) == (["moments_gradient"], {"x": (1, 0), "out": (0, 1)})


def test_few_groups_are_merged_by_many_threadgroups() -> None:
    """For 64 x 64 positions of 320 channels, in 32 groups: 10 members in each piece."""
    for interleaved, groups in ((False, 32), (True, 8)):
        p = Problem(
            "normalize", (1, 1, 4096, 320), channels=320, groups=32, interleaved=interleaved
        )
        _, merging, _ = p.plan().dispatches
        assert (merging.groups, merging.threads) == (groups, 256)


# ---- What follows a normalisation ----------------------------------------------------------------
#
# An activation adds nothing. A residual is read once in each direction, and its gradient is written
# and read: it is the g of the second pass. relu is told by z, in the place of the residual.

EPILOGUES = [("relu", ""), ("silu", ""), ("", "residual"), ("silu", "residual")]
BACKWARD_EPILOGUES = [("silu", ""), ("silu", "residual"), ("relu", "output")]

epilogues = pytest.mark.parametrize(("activation", "auxiliary"), EPILOGUES)
backward_epilogues = pytest.mark.parametrize(("activation", "auxiliary"), BACKWARD_EPILOGUES)


def followed(problem: Problem, operation: str, activation: str, auxiliary: str) -> Problem:
    """Gradients of all arguments, if the operation is a gradient."""
    gradient = operation == "normalize_gradient"
    statistics = "statistics " if problem.given else ""
    return replace(
        problem,
        operation=operation,
        weight=True,
        bias=auxiliary != "output",
        wanted=f"x {statistics}weight bias" if gradient else "",
        activation=activation,
        auxiliary=auxiliary,
    )


def expected_forward(auxiliary: str, reads: int) -> dict[str, tuple[int, int]]:
    return {"x": (reads, 0), "out": (0, 1)} | ({"residual": (1, 0)} if auxiliary else {})


def expected_backward(auxiliary: str, reads: int) -> dict[str, tuple[int, int]]:
    """With g and x read so often. Once of g that is the cotangent of z, then what is written."""
    found = {"x": (reads, 0), "g": (reads, 0), "out": (0, 1)}
    return found | ({"residual": (1, 0), "grad_residual": (0, 1)} if auxiliary else {})


single_and_half = pytest.mark.parametrize("dtype", ["float32", "float16"])


@epilogues
@pytest.mark.parametrize(
    "problem",
    [*TOO_LARGE.values(), *GROUPS.values()],
    ids=[*TOO_LARGE, *(f"{n}, groups" for n in GROUPS)],
)
def test_forward_with_an_epilogue(problem: Problem, activation: str, auxiliary: str) -> None:
    problem = followed(problem, "normalize", activation, auxiliary)
    assert passes(problem)[1] == expected_forward(auxiliary, 2)


@single_and_half
@backward_epilogues
@pytest.mark.parametrize(
    "problem",
    [*TOO_LARGE.values(), *GROUPS.values()],
    ids=[*TOO_LARGE, *(f"{n}, groups" for n in GROUPS)],
)
def test_backward_with_an_epilogue(
    problem: Problem, activation: str, auxiliary: str, dtype: str
) -> None:
    problem = replace(followed(problem, "normalize_gradient", activation, auxiliary), dtype=dtype)
    assert passes(problem)[1] == expected_backward(auxiliary, 2)


@single_and_half
@pytest.mark.parametrize(
    "problem",
    [*HELD.values(), *HELD_GROUPS.values()],
    ids=[*HELD, *(f"{n}, groups" for n in HELD_GROUPS)],
)
def test_epilogues_of_what_a_threadgroup_holds(problem: Problem, dtype: str) -> None:
    for epilogue in EPILOGUES:
        p = replace(followed(problem, "normalize", *epilogue), dtype=dtype, max_threads=512)
        assert passes(p) == (["fused_normalize"], expected_forward(epilogue[1], 1))
    for epilogue in BACKWARD_EPILOGUES:
        p = followed(problem, "normalize_gradient", *epilogue)
        kernels, whole = passes(replace(p, dtype=dtype, max_threads=512))
        assert kernels == ["fused_gradient", "parameter_gradients"]
        assert whole == expected_backward(epilogue[1], 1)


@single_and_half
@every_layout
def test_epilogues_of_given_statistics(problem: Problem, dtype: str) -> None:
    """One sweep in each direction, whichever gradients are asked for."""
    problem = of_batch(problem, dtype, "normalize")
    for activation, auxiliary in EPILOGUES:
        kernels, whole = passes(followed(problem, "normalize", activation, auxiliary))
        assert kernels == ["normalize_input"]
        assert whole == expected_forward(auxiliary, 1)
    for activation, auxiliary in BACKWARD_EPILOGUES:
        p = followed(problem, "normalize_gradient", activation, auxiliary)
        assert passes(p)[1] == expected_backward(auxiliary, 1)
        kernels, whole = passes(replace(p, wanted="x"))
        assert kernels == ["given_input_gradient"]
        expected = expected_backward(auxiliary, 1)
        if auxiliary == "output":
            del expected["x"]
        assert whole == expected


@single_and_half
@every_layout
def test_gradient_of_a_share_with_an_activation_reads_once(problem: Problem, dtype: str) -> None:
    p = replace(problem, operation="input_gradient", dtype=dtype, weight=True, bias=True)
    kernels, whole = passes(replace(p, activation="silu"))
    assert kernels == ["input_gradient"]
    assert whole == {"x": (1, 0), "g": (1, 0), "out": (0, 1)}


# ---- What the plan adds to that ------------------------------------------------------------------

TYPICAL = {
    "batch, channels last": Problem("", (1, 1, 32 * 56 * 56, 64), channels=64),
    "batch, channels first": Problem("", (32, 64, 56 * 56, 1), channels=64),
    "instances, channels last": Problem("", (1, 8, 256 * 256, 64), channels=64),
    "instances, channels first": Problem("", (1, 8 * 64, 256 * 256, 1), channels=64),
    "segmentation, channels first": Problem("", (1, 2 * 32, 128**3, 1), channels=32),
    "segmentation, channels last": Problem("", (1, 2, 128**3, 32), channels=32),
}


@pytest.mark.parametrize("problem", TYPICAL.values(), ids=TYPICAL.keys())
@every_dtype
def test_partial_results_are_small_beside_x(problem: Problem, dtype: str) -> None:
    """Less than a twentieth of one reading. They are written once and read once."""
    for operation in ("normalize", "normalize_gradient"):
        plan = replace(problem, operation=operation, dtype=dtype, wanted="x").plan()
        partials, sums = (plan.temporaries.get(name, 0) for name in ("partials", "sums"))
        assert partials > 0 or plan.kernels[0] in ("moments", "partial_sums")
        assert 2 * partials < replace(problem, dtype=dtype).nbytes / 20
        assert sums in (0, SUMS_BYTES * problem.statistics)
