"""Every instantiation of every kernel runs, is right, and is one that a plan asks for."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from mlx_welford import _ext
from plan_cases import FIXED, SOME, of_groups, running_statistics, whole_table
from plans import (
    LIMITS,
    SPLITTING,
    Arrays,
    Example,
    Plan,
    Problem,
    declared_kernels,
    problems,
    remainders,
    run_example,
    run_plan,
    shaders,
)
from simulator import SimulatorError, compile_library

ALL = dict(_ext.shader_kernels())


def names(plan: Plan) -> list[str]:
    return [d.host_name for d in plan.dispatches]


def test_every_instantiation_runs_and_is_right() -> None:
    library = shaders()
    ran: Counter[str] = Counter()
    for problem in whole_table():
        run_example(library, problem)
        ran.update(names(problem.plan()))
    assert ran.keys() == ALL.keys()


@pytest.mark.parametrize(("longer", "max_threads", "seed"), [(1, 32, 0), (4, 128, 1)])
def test_every_instantiation_passes_every_check(longer: int, max_threads: int, seed: int) -> None:
    """Bounds, races, memory never written: in one simdgroup, and in several that need barriers."""
    library = shaders(instrumented=True)
    assert library.instrumented
    ran: Counter[str] = Counter()
    for problem in whole_table(longer=longer, max_threads=max_threads):
        run_example(library, problem, seed=seed)
        ran.update(names(problem.plan()))
    assert ran.keys() == ALL.keys()


BARRIER = "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);"


# By the barriers of its merge; a third is where all threads want the results, as in fused kernels,
# and three more are where the members of a group merge.
MERGES = {
    2: Problem("moments", (1, 2, 403, 16), channels=32, max_threads=128),
    3: Problem("normalize", (1, 2, 100, 16), channels=32, max_threads=128),
    6: of_groups(Problem("normalize", (1, 2, 100, 16), max_threads=128)),
}


def test_these_are_all_barriers() -> None:
    assert _ext.shader_source.count(BARRIER) == max(MERGES)
    for problem in MERGES.values():
        (d,) = problem.plan().dispatches
        assert d.threads > LIMITS["kSimd"]


@pytest.mark.parametrize(("barriers", "which"), [(n, i) for n in MERGES for i in range(n)])
def test_a_missing_barrier_is_noticed(barriers: int, which: int) -> None:
    """Also where the results are right without it, as they are in most orders of the threads."""
    parts = _ext.shader_source.split(BARRIER)
    source = BARRIER.join(parts[: which + 1]) + BARRIER.join(parts[which + 1 :])
    problem = MERGES[barriers]
    plan = problem.plan()
    needed = [d.instantiation for d in plan.dispatches]
    library = compile_library(source, needed, instrumented=True)
    with pytest.raises(SimulatorError, match="threadgroup variable"):
        run_plan(library, plan, Example(problem).arrays(), seed=0)


@given(remainders())
def test_the_last_elements_of_a_split_reduction_count(problem: Problem) -> None:
    run_example(shaders(), problem, SPLITTING)


def test_a_last_piece_of_one_position() -> None:
    """65533 = 508 * 129 + 1, of which the last is far off: alone it makes most of the variance."""
    problem = Problem("moments", (1, 1, 65533, 128))
    plan = problem.plan(FIXED)
    (split,) = (d for d in plan.dispatches if d.sweeps)
    assert (split["pieces"], split["piece"]) == (509, 129)
    x = np.zeros((65533, 128), np.float32)
    x[-1] = 1e3 + np.arange(128)
    found = {name: np.full(128, np.nan, np.float32) for name in ("mean", "var")}
    run_plan(shaders(), plan, {"x": x, **found})
    exact = x.astype(np.float64)
    np.testing.assert_allclose(found["mean"], exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["var"], exact.var(0), rtol=1e-6)


@given(problems())
def test_plans_contain_no_other_kernel(problem: Problem) -> None:
    for d in problem.plan().dispatches:
        assert ALL[d.host_name] == d.instantiation


def test_every_declared_kernel_is_instantiated() -> None:
    instantiated = set()
    for host_name, instantiation in ALL.items():
        template = re.search(r"decltype\((\w+)<", instantiation)
        instantiated.add(template[1] if template else host_name)
    assert instantiated == declared_kernels().keys()


# ---- However the shaders are run -----------------------------------------------------------------


@pytest.mark.parametrize("problem", SOME, ids=str)
@pytest.mark.parametrize("contract", [True, False])
@pytest.mark.parametrize("flush_denormals", [True, False])
def test_right_whatever_the_seed_denormals_and_contraction(
    problem: Problem, contract: bool, flush_denormals: bool
) -> None:
    """And the same to the last bit in whatever order threads run."""
    library = shaders(contract=contract)
    example = Example(problem)
    results: list[Arrays] = []
    for seed in (0, 1, 2):
        arrays = example.arrays()
        run_plan(library, problem.plan(), arrays, seed=seed, flush_denormals=flush_denormals)
        example.check(arrays)
        results.append(arrays)
    for other in results[1:]:
        for name, first in results[0].items():
            assert first.tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize(
    ("problem", "place"),
    [
        pytest.param(problem, place, id=f"{problem} in {place}")
        for problem in SOME
        for place in ("x", "g")
        if "out" in Example(problem).truth
        if place == "x" or problem.operation in ("normalize_gradient", "input_gradient")
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_out_may_be_an_input(problem: Problem, place: str, seed: int) -> None:
    """Whether memory is shared makes no difference to any bit."""
    example = Example(problem)
    apart = example.arrays()
    run_plan(shaders(), problem.plan(), apart, seed=seed)
    together = example.arrays()
    together["out"] = together[place]
    run_plan(shaders(), problem.plan(), together, seed=seed)
    np.testing.assert_array_equal(together["out"].ravel(), apart["out"].ravel())
    for name in example.truth:
        assert together[name].tobytes() == apart[name].tobytes(), name


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_next_running_statistics_may_be_the_ones_before(seed: int) -> None:
    problem = running_statistics(instances=70)
    example = Example(problem)
    apart, together = example.arrays(), example.arrays()
    run_plan(shaders(), problem.plan(), apart, seed=seed)
    for name in ("mean", "var"):
        together[f"next_{name}"] = together[f"running_{name}"]
    run_plan(shaders(), problem.plan(), together, seed=seed)
    for name in example.truth:
        assert together[name].tobytes() == apart[name].tobytes(), name


@given(problems(most_elements=30_000))
def test_random_problems_are_right(problem: Problem) -> None:
    run_example(shaders(), problem)


def test_the_comparison_notices_one_wrong_element() -> None:
    problem = SOME[0]
    example = Example(problem)
    arrays = example.arrays()
    run_plan(shaders(), problem.plan(), arrays)
    example.check(arrays)
    arrays["out"][7] += np.float32(1e-3)
    with pytest.raises(AssertionError, match="out"):
        example.check(arrays)


def test_the_comparison_notices_a_missing_pass() -> None:
    problem = SOME[2]
    example = Example(problem)
    arrays = example.arrays()
    plan = problem.plan()
    run_plan(shaders(), replace(plan, dispatches=plan.dispatches[:-1]), arrays)
    with pytest.raises(AssertionError, match="out"):
        example.check(arrays)
