"""The GPU of the macOS runtime: what orders dispatches, and what their arguments must be."""

import numpy as np
import pytest
from macos_runtime.gpu import Binding, CommandError, Dispatch, changed, check, whole_groups
from macos_runtime.hazards import Access, Hazards
from macos_runtime.kernels import Kernel, KernelError, compile_source
from mlx_welford import _ext


def access(*ranges: tuple[int, int], write: bool, buffer: int = 1, name: str = "k") -> Access:
    return Access(buffer, np.array(ranges, np.int64), write, name)


def write(*ranges: tuple[int, int], buffer: int = 1) -> list[Access]:
    return [access(*ranges, write=True, buffer=buffer, name="writer")]


def read(*ranges: tuple[int, int], buffer: int = 1) -> list[Access]:
    return [access(*ranges, write=False, buffer=buffer, name="reader")]


@pytest.fixture
def hazards() -> Hazards:
    """One command buffer, number 1, with encoders 10 and 11."""
    made = Hazards()
    made.begin(1, queue=1, completed=0, observed=0)
    made.begin_encoder(1, 10)
    made.begin_encoder(1, 11)
    return made


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        (write((0, 8)), read((4, 12)), True),
        (read((0, 8)), write((4, 12)), True),
        (write((0, 8)), write((7, 9)), True),
        (read((0, 8)), read((0, 8)), False),
        (write((0, 8)), read((8, 16)), False),
        (write((0, 8)), read((0, 8), buffer=2), False),
        (write((0, 4), (8, 12)), write((4, 8), (12, 16)), False),
        (write((0, 4), (8, 12)), read((5, 9)), True),
        (write((8, 12)), read((0, 4), (9, 10)), True),
    ],
)
def test_accesses_that_meet(
    hazards: Hazards, first: list[Access], second: list[Access], found: bool
) -> None:
    assert hazards.dispatch(10, first) is None
    message = hazards.dispatch(10, second)
    assert (message is not None) == found
    if message is not None:
        assert "nothing orders them" in message


def test_a_dispatch_does_not_conflict_with_itself(hazards: Hazards) -> None:
    assert hazards.dispatch(10, [*read((0, 8)), *write((0, 8))]) is None


def test_a_barrier_orders_its_encoder_alone(hazards: Hazards) -> None:
    hazards.dispatch(10, write((0, 8)))
    hazards.barrier(10)
    assert hazards.dispatch(10, read((0, 8))) is None
    hazards.barrier(11)
    assert hazards.dispatch(11, read((0, 8))) is not None


def test_the_order_of_execution_does_not_matter(hazards: Hazards) -> None:
    """What comes after a barrier may not be taken for what comes before it."""
    hazards.barrier(10)
    hazards.dispatch(10, read((0, 8)))
    assert hazards.dispatch(10, write((0, 8))) is not None


def test_a_fence_orders_encoders(hazards: Hazards) -> None:
    hazards.dispatch(10, write((0, 8)))
    hazards.update_fence(10, 5)
    hazards.wait_fence(11, 5)
    assert hazards.dispatch(11, read((0, 8))) is None


def test_another_fence_does_not(hazards: Hazards) -> None:
    hazards.dispatch(10, write((0, 8)))
    hazards.update_fence(10, 5)
    hazards.wait_fence(11, 6)
    assert hazards.dispatch(11, read((0, 8))) is not None


def test_fences_order_what_came_before_what_they_order(hazards: Hazards) -> None:
    hazards.begin_encoder(1, 12)
    hazards.dispatch(10, write((0, 8)))
    hazards.update_fence(10, 5)
    hazards.wait_fence(11, 5)
    hazards.update_fence(11, 6)
    hazards.wait_fence(12, 6)
    assert hazards.dispatch(12, read((0, 8))) is None


@pytest.mark.parametrize("waits", [True, False])
def test_an_event_orders_queues(hazards: Hazards, waits: bool) -> None:
    hazards.dispatch(10, write((0, 8)))
    hazards.signal_event(1, 7, 1)
    hazards.begin(2, queue=2, completed=0, observed=0)
    if waits:
        hazards.wait_event(2, 7, 1)
    hazards.begin_encoder(2, 20)
    assert (hazards.dispatch(20, read((0, 8))) is None) == waits


@pytest.mark.parametrize("queue", [1, 2])
def test_a_signal_comes_after_all_that_its_queue_was_given_before(
    hazards: Hazards, queue: int
) -> None:
    """In another command buffer than what it is to order."""
    hazards.dispatch(10, write((0, 8)))
    hazards.complete(1)
    hazards.begin(2, queue=queue, completed=0, observed=0)
    hazards.signal_event(2, 7, 1)
    hazards.begin(3, queue=3, completed=0, observed=0)
    hazards.wait_event(3, 7, 1)
    hazards.begin_encoder(3, 30)
    assert (hazards.dispatch(30, read((0, 8))) is None) == (queue == 1)


@pytest.mark.parametrize("seen", [True, False])
def test_completion_orders_what_is_committed_after_it_was_known(
    hazards: Hazards, seen: bool
) -> None:
    hazards.dispatch(10, write((0, 8)))
    hazards.complete(1)
    hazards.begin(2, queue=2, completed=1 if seen else 0, observed=0)
    hazards.begin_encoder(2, 20)
    assert (hazards.dispatch(20, read((0, 8))) is None) == seen


@pytest.mark.parametrize("seen", [True, False])
def test_an_event_that_the_program_has_seen_orders(hazards: Hazards, seen: bool) -> None:
    hazards.dispatch(10, write((0, 8)))
    hazards.signal_event(1, 7, 1)
    hazards.observe(7, 1)
    hazards.begin(2, queue=2, completed=0, observed=1 if seen else 0)
    hazards.begin_encoder(2, 20)
    assert (hazards.dispatch(20, read((0, 8))) is None) == seen


def test_what_is_past_is_forgotten() -> None:
    hazards = Hazards()
    for i in range(1000):
        hazards.begin(i, queue=1, completed=i, observed=0)
        hazards.begin_encoder(i, i)
        assert hazards.dispatch(i, write((0, 8))) is None
        hazards.complete(i)
    assert len(hazards._encoders) < 200
    assert sum(len(past) for past in hazards._past.values()) < 200


def test_ranges_that_have_changed() -> None:
    before = np.zeros(10, np.uint8)
    after = before.copy()
    after[[0, 3, 4, 9]] = 1
    assert changed(before, after).tolist() == [[0, 1], [3, 5], [9, 10]]
    assert changed(before, before).size == 0


@pytest.mark.parametrize(
    ("grid", "group", "expected"),
    [
        ((64, 6, 2), (32, 3, 1), ((2, 2, 2), (32, 3, 1))),
        ((7, 1, 1), (4, 1, 1), ((7, 1, 1), (1, 1, 1))),
        ((30, 7, 1), (8, 8, 1), ((1, 7, 1), (30, 1, 1))),
        ((6, 5, 1), (32, 2, 1), ((1, 1, 1), (6, 5, 1))),
    ],
)
def test_whole_groups(
    grid: tuple[int, int, int],
    group: tuple[int, int, int],
    expected: tuple[tuple[int, int, int], tuple[int, int, int]],
) -> None:
    groups, threads = whole_groups(grid, group)
    assert (groups, threads) == expected
    assert all(n * t == size for n, t, size in zip(groups, threads, grid, strict=True))


def shader(name: str) -> Kernel:
    """A kernel of this package, from the source that the extension would give to Metal.

    Its function constants are 0: neither an activation nor a residual.
    """
    library = compile_source(_ext.shader_source + dict(_ext.shader_kernels())[name])
    needed = library.needed.get(name, {})
    zeros = {i: bytes(1 if n == "writes_gradient" else 4) for n, i in needed.items()}
    return library.kernel(name, zeros)


def bound(kernel: Kernel, **offsets: int) -> Dispatch:
    """A dispatch with all that the kernel takes, buffers at these offsets."""
    places = {p.name: i for i, p in kernel.buffers.items()}
    buffers = {i: Binding(i + 1, 0, 4096, 0) for i in kernel.buffers}
    for name, offset in offsets.items():
        buffers[places[name]] = Binding(places[name] + 1, 0, 4096, offset)
    return Dispatch(kernel, (1, 1, 1), (32, 1, 1), buffers, {}, {})


@pytest.mark.parametrize(
    ("name", "offset", "right"),
    [
        ("normalize_input_half_8_Columns", 16, True),
        ("normalize_input_half_8_Columns", 8, False),
        ("normalize_input_float_4_Rows", 8, False),
        ("normalize_input_float_1_Rows", 8, True),
        ("normalize_input_bfloat_1_Rows", 2, True),
        ("normalize_input_bfloat_1_Rows", 1, False),
    ],
)
def test_vectors_are_aligned(name: str, offset: int, right: bool) -> None:
    dispatch = bound(shader(name), x=offset)
    if right:
        check(dispatch)
    else:
        with pytest.raises(CommandError, match="not aligned to"):
            check(dispatch)


CONSTANTS = """
#include <metal_stdlib>
using namespace metal;
constant int kind [[function_constant(0)]];
constant float factor [[function_constant(4)]];
constant bool has_bias [[function_constant(5)]];
inline float scaled(float a) {
  return kind == 1 ? a * (is_function_constant_defined(factor) ? factor : 2.0f) : a;
}
[[kernel]] void scale(device float* out [[buffer(0)]],
                      const device float* bias [[buffer(1), function_constant(has_bias)]],
                      uint i [[thread_position_in_grid]]) {
  out[i] = scaled(out[i]);
}
[[kernel]] void plain(device float* out [[buffer(0)]]) { out[0] = 1; }
"""


def test_function_constants_that_a_kernel_needs() -> None:
    """Those that it reads, in a function that it calls, or that switch an argument on."""
    library = compile_source(CONSTANTS)
    library.kernel("plain", {})
    library.kernel("scale", {0: b"\0\0\0\1", 5: b"\1"})
    with pytest.raises(KernelError, match="scale needs the function constants kind, has_bias"):
        library.kernel("scale", {4: b"\0\0\0\0"})


def test_another_source_than_this_checkouts_is_refused() -> None:
    with pytest.raises(Exception, match="not those of this checkout"):
        compile_source(_ext.shader_source.replace("mean", "average", 1) + "// mlx_welford")
