"""Planted faults: the simulator finds each one and says where it is.

Every kernel of kernels/faults.metal has one mistake. What a plain library finds, an instrumented
one must find as well, under every seed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from simulator import Library, SimulatorError, compile_library

pytestmark = pytest.mark.usefixtures("own_settings")

FAULTS = (Path(__file__).parents[1] / "simulator" / "kernels" / "faults.metal").read_text()
SEEDS = [0, 1, 2, 3]


def instantiate(host_name: str, kernel: str) -> str:
    return f'template [[host_name("{host_name}")]] [[kernel]] decltype({kernel}) {kernel};'


TYPES = {"float32": "float", "float16": "half", "bfloat16": "bfloat"}
INSTANTIATIONS = [
    *(instantiate(f"neighbour_{order}", f"neighbour<{order}>") for order in range(4)),
    *(
        instantiate(f"{kernel}_{name}", f"{kernel}<{type_name}>")
        for kernel in ("read_beyond", "write_beyond")
        for name, type_name in TYPES.items()
    ),
]


@pytest.fixture(scope="module")
def plain() -> Library:
    return compile_library(FAULTS, INSTANTIATIONS)


@pytest.fixture(scope="module")
def instrumented() -> Library:
    return compile_library(FAULTS, INSTANTIATIONS, instrumented=True)


@pytest.fixture(params=["plain", "instrumented"])
def library(request: pytest.FixtureRequest, plain: Library, instrumented: Library) -> Library:
    return plain if request.param == "plain" else instrumented


def dispatch(
    library: Library,
    kernel: str,
    *,
    threads: int = 64,
    groups: int = 1,
    dtype: type[Any] = np.float32,
    **options: Any,
) -> NDArray[Any]:
    """Runs a kernel of an input and an output with an element per thread; returns the output."""
    x = np.arange(1, groups * threads + 1).astype(dtype)
    out = np.zeros_like(x)
    options = {
        "grid": (groups, 1, 1),
        "group": (threads, 1, 1),
        "buffers": {0: x, 1: out},
        "writable": {1},
        **options,
    }
    library.dispatch(kernel, **options)
    return out


def check(library: Library, kernel: str, *messages: str, **options: Any) -> None:
    """The kernel must fail with a text that holds all `messages` (regular expressions)."""
    with pytest.raises(SimulatorError) as caught:
        dispatch(library, kernel, **options)
    text = str(caught.value)
    for message in (f"^kernel '{kernel}'", *messages):
        assert re.search(message, text), text
    # The process lives on, and so does the library.
    dispatch(library, "neighbour_3", constants={2: np.uint32(1)})


# ---- Out of bounds ---------------------------------------------------------------------------

ONE = {2: np.int32(1)}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_read_one_element_beyond(library: Library, dtype: type[Any], seed: int) -> None:
    size = 32 * np.dtype(dtype).itemsize
    check(
        library,
        f"read_beyond_{np.dtype(dtype).name}",
        r"threadgroup \(0, 0, 0\), thread \(31, 0, 0\): reads",
        f"at offset {size} of buffer 0 'in' of {size} bytes: out of bounds by",
        threads=32,
        constants=ONE,
        dtype=dtype,
        seed=seed,
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_write_one_element_beyond(library: Library, dtype: type[Any], seed: int) -> None:
    size = 2 * 32 * np.dtype(dtype).itemsize
    check(
        library,
        f"write_beyond_{np.dtype(dtype).name}",
        r"threadgroup \(1, 0, 0\), thread \(31, 0, 0\): writes",
        f"at offset {size} of buffer 1 'out' of {size} bytes: out of bounds by",
        threads=32,
        groups=2,
        constants=ONE,
        dtype=dtype,
        seed=seed,
    )


@pytest.mark.parametrize("kernel", ["read_beyond", "write_beyond"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 31, 33])
@pytest.mark.parametrize("by", [1, -1])
def test_instrumented_bounds_are_exact(
    instrumented: Library, kernel: str, dtype: str, threads: int, by: int
) -> None:
    """Whatever the size, at either end; and by how many bytes."""
    array = np.float32 if dtype == "float32" else np.uint16
    width = np.dtype(array).itemsize
    offset = threads * width if by > 0 else -width
    check(
        instrumented,
        f"{kernel}_{dtype}",
        f"{kernel[:-7]}s {width} bytes at offset {offset} of buffer [01]",
        f"out of bounds by {width} bytes" + ("" if by > 0 else " before its start"),
        threads=threads,
        constants={2: np.int32(by)},
        dtype=array,
    )


@pytest.mark.parametrize("by", [1, -1])
def test_plain_finds_writes_between_buffer_and_guard(plain: Library, by: int) -> None:
    """After the dispatch, so that it cannot say which thread it was."""
    check(
        plain,
        "write_beyond_float32",
        f"some thread writes at offset {4 * 31 if by > 0 else -4} of buffer 1 'out' of 124 bytes",
        threads=31,
        constants={2: np.int32(by)},
    )


def test_far_beyond(library: Library) -> None:
    check(
        library,
        "read_beyond_float32",
        "of buffer 0 'in' of 256 bytes: out of bounds",
        constants={2: np.int32(100_000)},
    )


def test_threadgroup_memory_one_element_beyond(library: Library) -> None:
    check(
        library,
        "threadgroup_beyond",
        r"thread \(63, 0, 0\): writes",
        "at offset 256 of threadgroup variable 'shared' of 256 bytes: out of bounds by",
    )


def test_misaligned_vector_load(library: Library, instrumented: Library) -> None:
    check(
        library,
        "misaligned",
        r"thread \(0, 0, 0\): accesses memory",
        "not aligned to 16 bytes at offset 4 of buffer 0 'in'"
        if library is instrumented
        else "misaligned",
        buffers={0: np.zeros(8, np.float32), 1: np.zeros(8, np.float32)},
        threads=1,
    )


def test_wild_pointer(library: Library) -> None:
    for address, message in ((16, "address 0x10, which is in no buffer"), (1 << 62, "wild")):
        check(
            library,
            "wild_pointer",
            message,
            threads=1,
            buffers={0: np.zeros(1, np.float32)},
            writable={0},
            constants={1: np.uint64(address)},
        )


# ---- Barriers and races ----------------------------------------------------------------------


def shifted(threads: int, distance: int) -> NDArray[np.float32]:
    """What `neighbour` is to return."""
    return (1 + (np.arange(threads) + distance) % threads).astype(np.float32)


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_barrier_shows_in_the_result(plain: Library, seed: int) -> None:
    """Poison, or what is left of the last barrier, where the neighbour has not written yet."""
    out = dispatch(plain, "neighbour_0", constants={2: np.uint32(32)}, seed=seed)
    expected = shifted(64, 32)
    assert np.isnan(out[out != expected]).all()
    assert (out != expected).any()
    right = dispatch(plain, "neighbour_3", constants={2: np.uint32(32)}, seed=seed)
    np.testing.assert_array_equal(right, expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_missing_barrier(instrumented: Library, order: int, seed: int) -> None:
    """No barrier, one for device memory only, one within simdgroups only."""
    check(
        instrumented,
        f"neighbour_{order}",
        r"threadgroup \(0, 0, 0\), thread \(\d+, 0, 0\): reads 4 bytes",
        r"at offset \d+ of threadgroup variable 'shared' of 4096 bytes",
        r"uninitialised|, which thread \(\d+, 0, 0\) wrote with no barrier between",
        constants={2: np.uint32(32)},
        seed=seed,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_the_right_barrier(instrumented: Library, seed: int) -> None:
    for order, distance in ((3, 32), (3, 1), (2, 0)):
        out = dispatch(
            instrumented, f"neighbour_{order}", constants={2: np.uint32(distance)}, seed=seed
        )
        np.testing.assert_array_equal(out, shifted(64, distance))
    # One simdgroup needs no more than its own barrier.
    out = dispatch(instrumented, "neighbour_2", threads=32, constants={2: np.uint32(1)}, seed=seed)
    np.testing.assert_array_equal(out, shifted(32, 1))


@pytest.mark.parametrize("seed", SEEDS)
def test_write_without_waiting_for_readers(instrumented: Library, seed: int) -> None:
    check(
        instrumented,
        "overwrite",
        r"(reads|writes) 4 bytes at offset \d+ of threadgroup variable 'shared'",
        r"which thread \(\d+, 0, 0\) (read|wrote) with no barrier between",
        seed=seed,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_race_between_threadgroups(instrumented: Library, seed: int) -> None:
    check(
        instrumented,
        "race_between_threadgroups",
        "at offset 0 of buffer 1 'out'",
        "which another threadgroup wrote with no barrier between",
        threads=1,
        groups=3,
        seed=seed,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_uninitialised_threadgroup_memory(plain: Library, instrumented: Library, seed: int) -> None:
    check(
        instrumented,
        "uninitialised",
        r"thread \(5, 0, 0\): reads 4 bytes of uninitialised memory at offset 20 of",
        "threadgroup variable 'shared'",
        seed=seed,
    )
    out = dispatch(plain, "uninitialised", groups=3, seed=seed)
    assert list(np.flatnonzero(np.isnan(out))) == [5]  # every threadgroup's is poisoned afresh


# ---- Divergence ------------------------------------------------------------------------------

HERE = r"\(source:\d+\)"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kernel", "message", "options"),
    [
        (
            "half_at_barrier",
            rf"waits in divergent flow at threadgroup_barrier {HERE}",
            {},
        ),
        (
            "two_barriers",
            rf"in divergent flow at threadgroup_barrier {HERE} while .* threadgroup_barrier {HERE}",
            {},
        ),
        (
            "return_early",
            rf"waits in divergent flow at threadgroup_barrier {HERE}",
            {"constants": {2: np.uint32(40)}},
        ),
        ("diverged_sum", rf"in divergent flow at .*simd_sum {HERE}", {}),
        ("two_sums", rf"in divergent flow at simd_(sum|max) {HERE} while .* at simd_(max|sum)", {}),
    ],
)
def test_divergence(
    library: Library, kernel: str, message: str, options: dict[str, Any], seed: int
) -> None:
    place = r"threadgroup \(0, 0, 0\), thread \(\d+, 0, 0\): "
    check(library, kernel, place, message, seed=seed, **options)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threads", [64, 512])
def test_a_barrier_may_go_on_without_returned_threads(
    library: Library, threads: int, seed: int
) -> None:
    """If asked for: the others pass, whichever order the threads come and return in."""
    x = np.arange(threads, dtype=np.float32) + 1
    out = np.zeros(threads, np.float32)
    library.dispatch(
        "return_early", {0: x, 1: out}, writable={1}, constants={2: np.uint32(40)}, grid=(1, 1, 1),
        group=(threads, 1, 1), returned_threads_pass=True, seed=seed,
    )  # fmt: skip
    np.testing.assert_array_equal(out, np.where(np.arange(threads) < 40, x, 0))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("threads", "size"), [(64, 40), (40, 64)])
def test_shuffle_from_an_inactive_lane(
    library: Library, threads: int, size: int, seed: int
) -> None:
    """One that has returned; one that a short simdgroup never had."""
    check(
        library,
        "shuffle_from_inactive",
        rf"thread \(3\d, 0, 0\): simd_shuffle_xor {HERE} reads lane (1[6-9]|2[0-3]), which is",
        threads=threads,
        constants={2: np.uint32(size)},
        seed=seed,
    )


# ---- Bindings --------------------------------------------------------------------------------


def test_write_to_an_input(library: Library) -> None:
    check(
        library,
        "write_input",
        r"thread \(0, 0, 0\): writes .*read-only memory at offset 0 of buffer 0 'in'",
    )


def test_output_bound_as_an_input(library: Library) -> None:
    check(
        library,
        "neighbour_3",
        "writes .*read-only memory .* of buffer 1 'out'",
        writable=(),
        constants={2: np.uint32(1)},
    )


@pytest.mark.parametrize(
    ("buffers", "constants", "message"),
    [
        ([0], [2], "buffer 1 'out' is not bound"),
        ([0, 1], [], "buffer 2 'distance' is not bound"),
        ([0, 2], [1], "buffer 1 'out' may be written but is bound by value"),
        ([0, 1, 3], [2], "takes no buffer 3 but one is bound"),
        ([0, 1], [2, 3], "takes no buffer 3 but one is bound"),
        ([0, 1, 2], [2], "buffer 2 'distance' is bound more than once"),
        ([0, 1, 31], [2], "takes no buffer 31"),
    ],
)
def test_wrong_buffer_index(
    library: Library, buffers: list[int], constants: list[int], message: str
) -> None:
    check(
        library,
        "neighbour_3",
        message,
        buffers={index: np.ones(64, np.float32) for index in buffers},
        constants={index: np.uint32(1) for index in constants},
    )


def test_constant_smaller_than_its_type(library: Library) -> None:
    check(
        library,
        "neighbour_3",
        "a constant is smaller than its parameter's type",
        constants={2: np.uint16(1)},
    )


def test_constant_too_large_for_setbytes(library: Library) -> None:
    check(
        library,
        "neighbour_3",
        "constant 2 'distance' has 4096 bytes, but setBytes takes less than 4096",
        constants={2: np.zeros(1024, np.float32)},
    )


def test_overlapping_buffers(library: Library) -> None:
    x = np.zeros(65, np.float32)
    check(
        library,
        "neighbour_3",
        "buffers 0 and 1 overlap without being the same, and one is writable",
        buffers={0: x[1:], 1: x[:-1]},
        constants={2: np.uint32(1)},
    )


def test_unknown_kernel(library: Library) -> None:
    with pytest.raises(SimulatorError, match="there is no kernel 'nothing'"):
        dispatch(library, "nothing")


@pytest.mark.parametrize("group", [(0, 1, 1), (1025, 1, 1), (32, 32, 2)])
def test_threadgroup_size(library: Library, group: tuple[int, int, int]) -> None:
    check(library, "uninitialised", "threads is not between 1 and 1024", group=group)


def test_empty_grid(library: Library) -> None:
    check(library, "uninitialised", "grid of 0 x 1 x 1 threadgroups is empty", grid=(0, 1, 1))


def test_too_much_threadgroup_memory(library: Library) -> None:
    check(
        library,
        "too_much_memory",
        "more than 32 KB of threadgroup memory",
        buffers={0: np.zeros(64, np.float32)},
        writable={0},
    )
