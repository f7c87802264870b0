"""All implementations in the benchmark do the same work; the memcpy baseline copies all of x."""

import gc
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from bench_cases import (
    ALL_TINY,
    MEBIBYTE,
    TINY,
    TINY_3D,
    TINY_FIRST,
    TINY_GROUP,
    TINY_GROUP_FIRST,
    TINY_INSTANCE,
    TINY_INTERLEAVED,
    TINY_RELU,
    TINY_SUM,
)
from mlx_welford.bench import implementations, torch_implementations
from mlx_welford.bench.harness import measure
from mlx_welford.bench.implementations import (
    BASELINE,
    BOTH,
    COMPILED,
    COPY,
    EVALUATION,
    FORWARD,
    INSTANCE,
    OURS,
    OURS_COMPILED,
    PEERS,
    TORCH,
    TORCH_MPS,
    UNFUSED,
)
from mlx_welford.bench.memcpy_baseline import LEAST_SHARE, PAGE, ThreadedCopy
from mlx_welford.bench.workloads import (
    CASES,
    EPILOGUES,
    GROUPED,
    GROUPED_SOME,
    SOME,
    SWEEP,
    TARGETS,
    Case,
)

# ---- The memcpy baseline ----


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("size", [1, 4097, LEAST_SHARE, 3 * LEAST_SHARE + 5, 8 * LEAST_SHARE])
def test_memcpy_baseline_moves_every_byte_once(size: int, threads: int) -> None:
    copy = ThreadedCopy(size, threads)
    copy.source[:] = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    assert not np.array_equal(copy.target, copy.source)
    copy.run()
    copy.close()
    np.testing.assert_array_equal(copy.target, copy.source)
    assert not np.shares_memory(copy.target, copy.source)

    touched = np.zeros(size, np.uint8)
    for share in copy.shares:
        touched[share] += 1
    assert (touched == 1).all()
    assert len(copy.shares) == max(1, min(threads, size // LEAST_SHARE))
    lengths = [share.stop - share.start for share in copy.shares]
    assert max(lengths) - min(lengths) <= PAGE * len(lengths)


def test_memcpy_baseline_copies_as_much_as_x_has() -> None:
    for dtype, size in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
        step = implementations.steps(TINY, dtype, implementations=[])[COPY, COPY]
        copy = step.run.__self__  # type: ignore[attr-defined]
        assert copy.source.nbytes == size * TINY.elements


# ---- The implementations ----


def outputs(
    case: Case, dtype: str, mode: str, names: Sequence[str] = (BASELINE, OURS)
) -> dict[str, list[mx.array]]:
    steps = implementations.steps(case, dtype, implementations=names, modes=[mode])
    runs = {name: step.run() for (name, _), step in steps.items() if name != COPY}
    assert list(runs) == list(names)
    return {name: list(run) for name, run in runs.items()}  # type: ignore[call-overload]


def assert_same_results(found: list[mx.array], expected: list[mx.array]) -> None:
    for left, right in zip(found, expected, strict=True):
        assert left.shape == right.shape
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "mode"),
    [(case, mode) for case in ALL_TINY for mode in implementations.modes_of(case)],
    ids=lambda value: getattr(value, "name", value),
)
def test_implementations_do_the_same_work(case: Case, mode: str) -> None:
    channels = (case.channels,)
    expected = [case.shape]
    if mode == BOTH:
        expected += [case.shape] * (1 + case.residual) + [channels] * (2 * case.affine)
    if mode != EVALUATION and case.norm == "BatchNorm":
        expected += [channels, channels]

    ours = [name for name in (OURS, UNFUSED) if implementations.takes_part(case, name)]
    found = outputs(case, "float32", mode, [BASELINE, *ours])
    assert [array.shape for array in found[BASELINE]] == expected
    assert np.std(np.array(found[BASELINE][0])) > 0.5
    for name in ours:
        assert_same_results(found[name], found[BASELINE])


def test_groups_are_in_the_order_of_the_case() -> None:
    """Neighbouring channels share a group as in torch, or every num_groups-th as in mlx.nn."""
    for case, members in ((TINY_GROUP, (0, 1)), (TINY_INTERLEAVED, (0, 2, 4))):
        (y, *_) = outputs(case, "float32", FORWARD, [BASELINE])[BASELINE]
        of_first_group = np.array(y)[0, ..., list(members)]
        assert abs(of_first_group.mean()) < 1e-5
        assert abs(of_first_group.std() - 1) < 1e-4


def test_instance_norm_is_that_of_as_many_groups_as_channels() -> None:
    assert TINY_GROUP_FIRST.groups == TINY_GROUP_FIRST.channels
    found = outputs(TINY_GROUP_FIRST, "float32", BOTH, [BASELINE, INSTANCE])
    assert_same_results(found[INSTANCE], found[BASELINE])


def test_who_takes_part() -> None:
    def absent_from(case: Case) -> set[str]:
        return {name for name in PEERS if not implementations.takes_part(case, name)}

    assert absent_from(TINY_GROUP) == {UNFUSED}
    assert absent_from(TINY_INTERLEAVED) == {UNFUSED, TORCH, TORCH_MPS}
    assert absent_from(TINY_INSTANCE) == absent_from(TINY) == {UNFUSED, INSTANCE}
    assert absent_from(TINY_RELU) == absent_from(TINY_SUM) == {INSTANCE}


def test_compiled_implementations_do_the_same_work() -> None:
    reason = implementations.compiler_error()
    if reason is not None:
        pytest.skip(f"mx.compile does not work here: {reason}")
    found = outputs(TINY, "float32", BOTH, [BASELINE, COMPILED, OURS_COMPILED])
    assert_same_results(found[COMPILED], found[BASELINE])
    assert_same_results(found[OURS_COMPILED], found[BASELINE])


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        (case, mode)
        for case in ALL_TINY
        if implementations.takes_part(case, TORCH)
        for mode in implementations.modes_of(case)
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_torch_does_the_same_work(case: Case, mode: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    steps = implementations.steps(case, "float32", implementations=[OURS, TORCH], modes=[mode])
    ours = list(steps[OURS, mode].run())  # type: ignore[call-overload]
    found: Any = steps[TORCH, mode].run()
    y, gradients = found if mode == BOTH else (found, ())
    theirs = [y, *gradients]
    for left, right in zip(ours, theirs, strict=False):
        array = right.detach()
        if case.channels_last and array.ndim > 1:
            assert array.movedim(1, -1).is_contiguous() or array.is_contiguous()
            array = array.movedim(1, -1)
        np.testing.assert_allclose(left, array.numpy(), rtol=1e-4, atol=1e-4)
    gradients_of = 1 + case.residual + 2 * case.affine
    assert len(theirs) == (1 + gradients_of if mode == BOTH else 1)


def test_torch_gets_x_as_it_lies_in_memory() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    values = np.random.default_rng(0).standard_normal(TINY.shape, dtype=np.float32)
    implementation = torch_implementations.TorchImplementation(TINY, "float32", values, values)
    x = implementation._inputs[0].detach()
    assert x.movedim(1, -1).is_contiguous()
    np.testing.assert_array_equal(x.movedim(1, -1).numpy(), values)


def test_torch_peak_counts_what_is_alive_at_once() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.zeros(MEBIBYTE // 4)

    def run() -> object:
        first = x + 1.0
        second = first + 1.0
        del first
        return second + 1.0

    # Two at a time; a scalar operand takes some bytes.
    assert 2 * MEBIBYTE <= torch_implementations.peak_above_inputs(run) < 2.01 * MEBIBYTE


def test_absent_implementations_are_named_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it now raises
    assert implementations.absent([BASELINE, OURS, TORCH]) == {TORCH: "torch is not installed"}
    assert implementations.absent([OURS]) == {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_implementations_stay_in_their_dtype(dtype: str) -> None:
    for name, arrays in outputs(TINY, dtype, BOTH).items():
        for array in arrays[:4]:  # y and the gradients
            assert str(array.dtype).endswith(f".{dtype}"), name


def test_training_goes_on_from_the_last_statistics() -> None:
    steps = implementations.steps(TINY, "float32", implementations=[BASELINE, OURS], modes=[BOTH])
    for name in (BASELINE, OURS):
        run = steps[name, BOTH].run
        first, second = list(run()), list(run())  # type: ignore[call-overload]
        change = mx.max(mx.abs(first[-1] - second[-1])).item()
        assert isinstance(change, float)
        assert change > 1e-3, name
        # The weights stay: every run does the same work.
        np.testing.assert_array_equal(first[0], second[0], err_msg=name)


@pytest.mark.parametrize("case", [TINY, TINY_INSTANCE], ids=lambda case: case.name)
def test_nothing_stays_alive(case: Case) -> None:
    def run() -> None:
        measure(implementations.steps(case, "float32", implementations=[BASELINE, OURS]), seconds=0)

    run()
    gc.collect()
    before = mx.get_active_memory()
    run()
    gc.collect()
    mx.synchronize()
    assert mx.get_active_memory() == before


def test_large_inputs_repeat_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations, "BLOCK", 7)
    values = implementations._values(TINY, 0)
    assert values.shape == TINY.shape
    np.testing.assert_array_equal(values.ravel()[:7], values.ravel()[7:14])
    assert len(set(values.ravel())) == 7


def test_reshape_is_noted() -> None:
    assert implementations.note(TINY_3D, BASELINE) == implementations.RESHAPED
    assert implementations.note(TINY_3D, COMPILED) == implementations.RESHAPED
    assert implementations.note(TINY_3D, OURS) == ""
    assert implementations.note(TINY, BASELINE) == ""
    assert implementations.note(TINY_FIRST, BASELINE) == implementations.MOVED
    assert implementations.note(TINY_FIRST, OURS) == ""


def test_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for norm in ("BatchNorm", "InstanceNorm"):
        prescribed = [c for c in CASES if (c.norm, c.shape) == (norm, (8, 56, 56, 64))]
        assert [(case.affine, case.quick) for case in prescribed] == [(True, True)]


def test_targets_are_larger_than_caches_and_the_sweep_is_regular() -> None:
    assert all(4 * case.elements >= 32 * MEBIBYTE for case in TARGETS + GROUPED + EPILOGUES)
    assert set(SOME) <= {case.name for case in TARGETS}
    assert set(GROUPED_SOME) <= {case.name for case in GROUPED}
    sizes = [4 * case.elements for case in reversed(SWEEP)]
    assert sizes[0] == 64 * 1024
    assert sizes[-1] == 1024 * MEBIBYTE
    assert all(following == 4 * size for size, following in pairwise(sizes))
