"""The simulator computes what the kernels say, and counts what they read and write."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from simulator import CompileError, Library, SimulatorError, Traffic, compile_library
from simulator.loader import MIRRORED, check_system
from simulator.source import SourceError, translate

pytestmark = pytest.mark.usefixtures("own_settings")

KERNELS = Path(__file__).parents[1] / "simulator" / "kernels"
BASICS = (KERNELS / "basics.metal").read_text()
SEEDS = [0, 1, 2, 3]

Float = NDArray[np.float32]


def instantiate(host_name: str, kernel: str) -> str:
    """The line that a host appends to a library's source for one kernel."""
    return f'template [[host_name("{host_name}")]] [[kernel]] decltype({kernel}) {kernel};'


INSTANTIATIONS = [
    instantiate("sum_float32", "sum<float, 4>"),
    # As a host may also write it, and with the parameters' names and attributes
    'template [[host_name("sum_float16")]] [[kernel]] void sum<half, 8>('
    "const device half* in [[buffer(0)]], device float* out [[buffer(1)]], "
    "constant uint& size [[buffer(2)]], constant uint& per_group [[buffer(3)]], "
    "uint group [[threadgroup_position_in_grid]], uint i [[thread_index_in_threadgroup]], "
    "uint3 threads [[threads_per_threadgroup]], uint lane [[thread_index_in_simdgroup]], "
    "uint simdgroup [[simdgroup_index_in_threadgroup]], "
    "uint simdgroups [[simdgroups_per_threadgroup]]);",
    instantiate("sum_bfloat16", "sum<bfloat, (4 > 2 ? 8 : 4)>"),
    instantiate("copy16_float32", "copy16<float>"),
    instantiate("copy16_float16", "copy16<half>"),
    instantiate("widen8_float16", "widen8<half>"),
    instantiate("widen8_bfloat16", "widen8<bfloat>"),
    instantiate("float_to_half", "convert<float, half>"),
    instantiate("half_to_float", "convert<half, float>"),
    instantiate("float_to_bfloat", "convert<float, bfloat>"),
    instantiate("bfloat_to_float", "convert<bfloat, float>"),
]


def build(*, contract: bool = True, instrumented: bool = False) -> Library:
    return compile_library(BASICS, INSTANTIATIONS, contract=contract, instrumented=instrumented)


@pytest.fixture(scope="module")
def plain() -> Library:
    return build()


@pytest.fixture(scope="module")
def counting() -> Library:
    return build(instrumented=True)


@pytest.fixture(params=["plain", "instrumented"])
def library(request: pytest.FixtureRequest, plain: Library, counting: Library) -> Library:
    return plain if request.param == "plain" else counting


def normal(*shape: int) -> Float:
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


def to_bfloat(x: Float) -> NDArray[np.uint16]:
    """The bits of x rounded to bfloat16, to nearest and ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bfloat(bits: NDArray[np.uint16]) -> Float:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def elementwise(
    library: Library, kernel: str, x: NDArray[Any], out: NDArray[Any], **options: Any
) -> NDArray[Any]:
    """Runs a kernel of buffers 0 and 1 with one thread per element of x."""
    library.dispatch(
        kernel, {0: x, 1: out}, writable={1}, grid=(1, 1, 1), group=(len(x), 1, 1), **options
    )
    return out


# ---- Reductions ------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 31, 32, 33, 64, 257, 1024])
@pytest.mark.parametrize("size", [1, 31, 1025, 5000])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_sum_over_threads_and_tails(plain: Library, dtype: str, size: int, threads: int) -> None:
    x = normal(size)
    values: NDArray[Any] = x
    if dtype == "float16":
        values = x.astype(np.float16)
        x = values.astype(np.float32)
    elif dtype == "bfloat16":
        values = to_bfloat(x)
        x = from_bfloat(values)
    per_group = 1500
    groups = -(-size // per_group)
    out = np.full(groups, np.nan, np.float32)
    plain.dispatch(
        f"sum_{dtype}",
        {0: values, 1: out},
        writable={1},
        constants={2: np.uint32(size), 3: np.uint32(per_group)},
        grid=(groups, 1, 1),
        group=(threads, 1, 1),
        seed=threads,
    )
    expected = [x[i : i + per_group].sum(dtype=np.float64) for i in range(0, size, per_group)]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)


def test_a_million_elements_take_well_under_a_second(plain: Library) -> None:
    x = np.ones(1 << 20, np.float32)
    out = np.zeros(1024, np.float32)
    plain.dispatch(
        "sum_float32",
        {0: x, 1: out},
        writable={1},
        constants={2: np.uint32(x.size), 3: np.uint32(1024)},
        grid=(1024, 1, 1),
        group=(256, 1, 1),
    )
    assert (out == 1024).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_structs_in_every_address_space(library: Library, seed: int) -> None:
    x = normal(1003) + 3
    out = np.zeros(3, np.float32)
    begin, end = 10, 1000
    library.dispatch(
        "moments",
        {0: x, 1: out},
        writable={1},
        constants={2: np.array([begin, end], np.uint32)},
        grid=(1, 1, 1),
        group=(96, 1, 1),
        seed=seed,
    )
    part = x[begin:end].astype(np.float64)
    np.testing.assert_allclose(out, [part.size, part.mean(), part.var() * part.size], rtol=1e-5)


# ---- Types -----------------------------------------------------------------------------------

SPECIAL = np.array(
    [
        *(0.0, -0.0, 1.0, -2.5, 1e-3, np.inf, -np.inf, np.nan),
        *(65504.0, 65520.0, 1e-7, 6e-8, 3.3e-8, 1 + 2**-11, 1 + 3 * 2**-11),  # of half
        *(3.39e38, 1 + 2**-9, 1 + 2**-8, 1 + 3 * 2**-8),  # of bfloat
    ],
    np.float32,
)


def test_half_rounds_to_nearest_even(library: Library) -> None:
    with np.errstate(over="ignore"):
        expected = SPECIAL.astype(np.float16)
    half = elementwise(library, "float_to_half", SPECIAL, np.zeros(SPECIAL.size, np.float16))
    np.testing.assert_array_equal(half, expected)
    back = elementwise(library, "half_to_float", half, np.zeros(SPECIAL.size, np.float32))
    np.testing.assert_array_equal(back, expected.astype(np.float32))


def test_buffers_bound_at_an_offset(library: Library) -> None:
    """The kernel's pointers are inside their buffers, which stay whole: behind and in front."""
    x, out = normal(12), np.zeros(12, np.float16)
    library.dispatch(
        "float_to_half", {0: x, 1: out}, writable={1}, offsets={0: 16, 1: 4}, grid=(1, 1, 1),
        group=(8, 1, 1),
    )  # fmt: skip
    expected = np.zeros(12, np.float16)
    expected[2:10] = x[4:12].astype(np.float16)
    np.testing.assert_array_equal(out, expected)


def test_an_offset_leaves_less_of_the_buffer(counting: Library) -> None:
    with pytest.raises(SimulatorError, match="out of bounds by 4 bytes"):
        counting.dispatch(
            "float_to_half", {0: normal(8), 1: np.zeros(8, np.float16)}, writable={1},
            offsets={0: 4}, grid=(1, 1, 1), group=(8, 1, 1),
        )  # fmt: skip


def test_parameters_of_a_kernel(plain: Library) -> None:
    source, out = plain.parameters("float_to_half")
    assert (source.name, source.index, source.read_only, source.threadgroup) == (
        "in", 0, True, False,
    )  # fmt: skip
    assert (out.name, out.index, out.read_only, out.optional) == ("out", 1, False, False)
    with pytest.raises(KeyError):
        plain.parameters("no_such_kernel")


def test_bfloat_rounds_to_nearest_even(library: Library) -> None:
    bits = elementwise(library, "float_to_bfloat", SPECIAL, np.zeros(SPECIAL.size, np.uint16))
    np.testing.assert_array_equal(from_bfloat(bits), from_bfloat(to_bfloat(SPECIAL)))
    back = elementwise(library, "bfloat_to_float", bits, np.zeros(SPECIAL.size, np.float32))
    np.testing.assert_array_equal(back, from_bfloat(bits))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_vector_copies(library: Library, dtype: type[Any]) -> None:
    x = normal(256).astype(dtype)
    out = np.zeros_like(x)
    threads = x.nbytes // 16
    name = f"copy16_{np.dtype(dtype).name}"
    library.dispatch(name, {0: x, 1: out}, writable={1}, grid=(2, 1, 1), group=(threads // 2, 1, 1))
    np.testing.assert_array_equal(out, x)


def test_halves_out_of_words(library: Library) -> None:
    x = normal(64)
    half = x.astype(np.float16)
    out = np.zeros(64, np.float32)
    library.dispatch(
        "widen8_float16", {0: half, 1: out}, writable={1}, grid=(1, 1, 1), group=(8, 1, 1)
    )
    np.testing.assert_array_equal(out, half.astype(np.float32))
    bits = to_bfloat(x)
    library.dispatch(
        "widen8_bfloat16", {0: bits, 1: out}, writable={1}, grid=(1, 1, 1), group=(8, 1, 1)
    )
    np.testing.assert_array_equal(out, from_bfloat(bits))


def test_vector_arithmetic(library: Library) -> None:
    x = normal(8, 4)
    out = np.zeros_like(x)
    library.dispatch("vectors", {0: x, 1: out}, writable={1}, grid=(1, 1, 1), group=(8, 1, 1))
    y = np.where(x < 0, -x, x * x + 1)
    pair = 2 * x[:, [0, 3, 0, 3]]
    expected = np.maximum(y, pair) + x.astype(np.float16) - np.sqrt(abs(x))
    expected = expected + (x * x).sum(1, keepdims=True)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_simdgroup_operations(library: Library, seed: int) -> None:
    x = (normal(32) * 0.25 + 1).astype(np.float32)
    lane = np.arange(32)
    expected = np.array(
        [
            np.full(32, x.sum()),
            np.full(32, x.max()),
            np.full(32, x.min()),
            np.full(32, x.prod()),
            x.cumsum(),
            x.cumsum() - x,
            np.full(32, x[5]),
            np.full(32, x[0]),
            x[31 - lane],
            x[lane ^ 3],
            np.where(lane + 7 < 32, x[(lane + 7) % 32], x),
            np.where(lane >= 7, x[lane - 7], x),
            x[(lane + 7) % 32],
            x[lane - 7],
            np.where(lane + 7 < 32, x[(lane + 7) % 32], -1),
            np.where(lane >= 7, x[lane - 7], -1),
            np.ones(32),
            np.full(32, (x > 0).all()),
        ]
    )
    out = np.zeros(expected.shape, np.float32)
    library.dispatch(
        "simdgroup_operations",
        {0: x, 1: out},
        writable={1},
        grid=(1, 1, 1),
        group=(32, 1, 1),
        seed=seed,
    )
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


# ---- Arithmetic as on the GPU ----------------------------------------------------------------


def multiply_add(library: Library, a: Float, b: Float, c: Float, **options: Any) -> Float:
    """Buffer indices are enumerators in the source: the kernel's own 4 to 7."""
    out = np.zeros_like(a)
    library.dispatch(
        "multiply_add",
        {4: a, 5: b, 6: c, 7: out},
        writable={7},
        grid=(1, 1, 1),
        group=(a.size, 1, 1),
        **options,
    )
    return out


def test_contraction_rounds_once(plain: Library) -> None:
    a = np.array([1 + 2**-12], np.float32)
    c = np.array([-1 - 2**-11], np.float32)
    assert multiply_add(plain, a, a, c) == np.float32(2**-24)
    assert multiply_add(build(contract=False), a, a, c) == 0


def test_denormals_are_flushed_unless_kept(library: Library) -> None:
    tiny = np.array([1e-39, 1e-30], np.float32)  # denormal as an operand; as a product
    one = np.array([1.0, 1e-9], np.float32)
    zero = np.zeros(2, np.float32)
    np.testing.assert_array_equal(
        multiply_add(library, tiny, one, zero, flush_denormals=True), zero
    )
    kept = multiply_add(library, tiny, one, zero, flush_denormals=False)
    np.testing.assert_array_equal(kept, tiny * one)
    assert (kept != 0).all()


def test_flushing_ends_with_the_dispatch(plain: Library) -> None:
    one = np.ones(1, np.float32)
    multiply_add(plain, one, one, one, flush_denormals=True)
    assert np.float32(1e-39) * np.float32(0.5) > 0


# ---- Order -----------------------------------------------------------------------------------


def order(library: Library, seed: int) -> list[int]:
    """The threads of a grid of 8 threadgroups of 64, in the order in which they ran."""
    out = np.zeros(1 + 512, np.uint32)
    library.dispatch(
        "record_order", {0: out}, writable={0}, grid=(8, 1, 1), group=(64, 1, 1), seed=seed
    )
    assert out[0] == 512
    return [int(i) for i in out[1:]]


def test_seed_zero_is_the_natural_order(plain: Library) -> None:
    assert order(plain, 0) == list(range(512))


def test_seeds_give_different_orders(plain: Library) -> None:
    orders = [order(plain, seed) for seed in (1, 2, 3)]
    for one in orders:
        assert sorted(one) == list(range(512))
        groups = [i // 64 for i in one]
        assert groups != sorted(groups)  # of threadgroups
        assert one[:64] != sorted(one[:64])  # of threads within one
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_seed_always_gives_the_same_order(plain: Library) -> None:
    assert order(plain, 5) == order(plain, 5)


# ---- Arguments -------------------------------------------------------------------------------


def test_function_constants(library: Library) -> None:
    x, bias = normal(8), normal(8)
    out = np.zeros(8, np.float32)

    def scale(buffers: dict[int, Float], constants: dict[int, Any]) -> Float:
        library.dispatch(
            "scale",
            buffers,
            writable={2},
            function_constants=constants,
            grid=(1, 1, 1),
            group=(8, 1, 1),
        )
        return out

    with_bias = {0: x, 1: bias, 2: out}
    without = {0: x, 2: out}
    np.testing.assert_array_equal(scale(without, {0: np.bool_(False)}), x)
    np.testing.assert_allclose(scale(with_bias, {0: np.bool_(True)}), x + bias)
    np.testing.assert_allclose(
        scale(with_bias, {0: np.bool_(True), 7: np.float32(3)}), 3 * x + bias, rtol=1e-6
    )
    # The values of one dispatch do not outlive it.
    np.testing.assert_array_equal(scale(without, {}), x)
    with pytest.raises(SimulatorError, match="takes no buffer 1 but one is bound"):
        scale(with_bias, {0: np.bool_(False)})
    with pytest.raises(SimulatorError, match="function constant 7 'factor' has 4 bytes but got 8"):
        scale(without, {7: np.float64(3)})
    with pytest.raises(SimulatorError, match="no function constant has index 9"):
        scale(without, {9: np.float32(3)})


def test_threadgroup_memory_from_the_host(library: Library) -> None:
    x = np.arange(128, dtype=np.float32)
    out = np.zeros_like(x)
    library.dispatch(
        "reverse",
        {0: x, 1: out},
        writable={1},
        threadgroup_memory={0: 64 * 4},
        grid=(2, 1, 1),
        group=(64, 1, 1),
    )
    np.testing.assert_array_equal(out, x.reshape(2, 64)[:, ::-1].ravel())
    with pytest.raises(SimulatorError, match="threadgroup memory 0 'scratch' is not bound"):
        library.dispatch("reverse", {0: x, 1: out}, writable={1}, grid=(2, 1, 1), group=(64, 1, 1))
    with pytest.raises(SimulatorError, match="threadgroup memory 0 'scratch' of 252 bytes"):
        library.dispatch(
            "reverse",
            {0: x, 1: out},
            writable={1},
            threadgroup_memory={0: 63 * 4},
            grid=(2, 1, 1),
            group=(64, 1, 1),
        )


def test_dispatches_in_sequence(library: Library) -> None:
    """The second dispatch reads what the first wrote."""
    x, total = np.ones(2048, np.float32), np.zeros(1, np.float32)
    parts = np.zeros(8, np.float32)
    for source, target, size in ((x, parts, 256), (parts, total, 8)):
        library.dispatch(
            "sum_float32",
            {0: source, 1: target},
            writable={1},
            constants={2: np.uint32(source.size), 3: np.uint32(size)},
            grid=(target.size, 1, 1),
            group=(64, 1, 1),
        )
    assert (parts == 256).all()
    assert total == 2048


def test_an_output_may_be_an_input(library: Library) -> None:
    """Two bindings of the same bytes are one memory, also when one is read-only."""
    x = normal(64)
    expected = x * 3
    constants = {7: np.float32(3)}
    library.dispatch(
        "scale",
        {0: x, 2: x},
        writable={2},
        function_constants=constants,
        grid=(1, 1, 1),
        group=(64, 1, 1),
        seed=1,
    )
    np.testing.assert_allclose(x, expected)
    # One threadgroup's output is the next one's input.
    y = np.zeros(3, np.uint32)
    library.dispatch("record_order", {0: y}, writable={0}, grid=(2, 1, 1), group=(1, 1, 1))
    assert list(y) == [2, 0, 1]


def test_outputs_stay_as_they_were_after_an_error(library: Library) -> None:
    x, out = np.ones(64, np.float32), np.full(1, 5.0, np.float32)
    with pytest.raises(SimulatorError, match=r"reads .* of buffer 0 'in' of 256 bytes"):
        library.dispatch(
            "sum_float32",
            {0: x, 1: out},
            writable={1},
            constants={2: np.uint32(96), 3: np.uint32(96)},
            grid=(1, 1, 1),
            group=(32, 1, 1),
        )
    assert out == 5
    assert (x == 1).all()


def test_several_os_threads(plain: Library) -> None:
    results: dict[int, float] = {}

    def work(value: int) -> None:
        for _ in range(10):
            x, out = np.full(300, value, np.float32), np.zeros(1, np.float32)
            plain.dispatch(
                "sum_float32",
                {0: x, 1: out},
                writable={1},
                constants={2: np.uint32(300), 3: np.uint32(300)},
                grid=(1, 1, 1),
                group=(64, 1, 1),
            )
            results[value] = float(out[0])

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {value: 300.0 * value for value in range(4)}


# ---- Counting --------------------------------------------------------------------------------


def test_traffic_is_exact(counting: Library) -> None:
    size = 1001
    x, out = normal(size), np.zeros(3, np.float32)
    traffic = counting.dispatch(
        "sum_float32",
        {0: x, 1: out},
        writable={1},
        constants={2: np.uint32(size), 3: np.uint32(400)},
        grid=(3, 1, 1),
        group=(64, 1, 1),
    )
    assert traffic == {0: Traffic(4 * size, 0), 1: Traffic(0, 4 * 3)}


@pytest.mark.parametrize("threads", [8, 16])
def test_traffic_of_vectors(counting: Library, threads: int) -> None:
    x = normal(8 * threads).astype(np.float16)
    out = np.zeros(8 * threads, np.float32)
    traffic = counting.dispatch(
        "widen8_float16", {0: x, 1: out}, writable={1}, grid=(1, 1, 1), group=(threads, 1, 1)
    )
    assert traffic == {0: Traffic(16 * threads, 0), 1: Traffic(0, 32 * threads)}


def test_traffic_of_what_is_read_and_written(counting: Library) -> None:
    x = normal(8, 4)
    out = np.zeros_like(x)
    traffic = counting.dispatch(
        "vectors", {0: x, 1: out}, writable={1}, grid=(1, 1, 1), group=(8, 1, 1)
    )
    assert traffic == {0: Traffic(x.nbytes, 0), 1: Traffic(x.nbytes, 2 * x.nbytes)}


def test_traffic_of_structs_copied_whole(counting: Library) -> None:
    x = normal(64, 3)
    out = np.zeros_like(x)
    traffic = counting.dispatch(
        "copy_moments", {0: x, 1: out}, writable={1}, grid=(1, 1, 1), group=(64, 1, 1)
    )
    np.testing.assert_array_equal(out, x)
    assert traffic == {0: Traffic(x.nbytes, 0), 1: Traffic(0, x.nbytes)}


def test_log(counting: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("MLX_WELFORD_SIM_LOG", str(log))
    x, out = normal(32), np.zeros(32, np.float16)
    for _ in range(2):
        elementwise(counting, "float_to_half", x, out)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines == 2 * [
        {
            "kernel": "float_to_half",
            "grid": [1, 1, 1],
            "group": [32, 1, 1],
            "instrumented": True,
            "buffers": [
                {"index": 0, "bytes": 128, "read": 128, "written": 0},
                {"index": 1, "bytes": 64, "read": 0, "written": 64},
            ],
        }
    ]


# ---- Compiling -------------------------------------------------------------------------------


def test_several_processes_compile_the_same_library(tmp_path: Path) -> None:
    check_system()
    program = (
        "import pathlib, simulator, sys\n"
        "source = '[[kernel]] void f(device float* out [[buffer(0)]]) { out[0] = 1.0f; }'\n"
        "simulator.compile_library(source, cache=pathlib.Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    running = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".so"]


def test_every_part_of_a_library_is_in_its_name(tmp_path: Path) -> None:
    source = "[[kernel]] void f(device float* out [[buffer(0)]]) { out[0] = VALUE; }"

    def name(text: str = source, **options: Any) -> str:
        options = {"defines": {"VALUE": "1.0f"}, **options}
        return compile_library(text, cache=tmp_path, **options).path.name

    names = {
        name(),
        name(contract=False),
        name(instrumented=True),
        name(defines={"VALUE": "2.0f"}),
        name(source.replace("out[0]", "out[1]")),
    }
    assert len(names) == 5
    assert name() in names


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "[[kernel]] void f(device float* x [[buffer(0)]], float y) {}",
            "parameter 'y' is neither",
        ),
        ("[[kernel]] void f(device int* x) {} [[kernel]] void f(device half* x) {}", "two kernels"),
        ('template [[host_name("g")]] [[kernel]] decltype(f<1>) f<1>;', "which is no kernel"),
        ("template [[kernel]] decltype(f<1>) f<1>;", "without host_name"),
        ("[[kernel]] void f(device int* x [[buffer(0), function_constant(c)]]) {}", "'c' is no"),
    ],
)
def test_sources_that_cannot_be_read(source: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        translate(source, instrumented=False)


def test_lines_stay_where_they_are() -> None:
    source = """
constant float table[2] = {1.0f, 2.0f};
constant bool flag
    [[function_constant(0)]];
template <typename T> [[kernel]] void f(device T* x) {
  threadgroup float a[2][3],
      b;
}
template [[host_name("g")]] [[kernel]]
    void f<int>(device int* x);
int last;
"""
    translated = translate(source, instrumented=False)
    lines = translated.kernels_source.splitlines()
    assert lines.index("int last;") == source.splitlines().index("int last;")
    assert lines[1] == "__constant float table[2] = {1.0f, 2.0f};"


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("threadgroup float* p = x;", "changes address space of pointer|cannot initialize"),
        ("thread float* p = x;", "cannot initialize"),
        ("device float* p = c;", "cannot initialize"),
        ("device float* p = shared;", "cannot initialize"),
        ("constant float* p = x;", "cannot initialize"),
        ("*c = 1.0f;", "not assignable"),
        ("*in = 1.0f;", "not assignable"),
        ("float y = 0.0f; takes_device(&y);", "no matching function"),
        ("takes_device(shared);", "no matching function"),
        ("bfloat b = x[0];", "implicit conversion"),
        ("ulong y = simd_sum(ulong(x[0]));", "no simdgroup operations on 64-bit types"),
        ("float y = as_type<float>(ushort(1));", "different size"),
        ("double y = 1.0;", "double"),
    ],
)
def test_what_metal_forbids_does_not_compile(expression: str, error: str, tmp_path: Path) -> None:
    source = """
        using namespace metal;
        inline void takes_device(device float* p) { *p = 0.0f; }
        [[kernel]] void f(const device float* in, device float* x, constant float* c) {
          threadgroup float shared[4];
          threadgroup_barrier(mem_flags::mem_threadgroup);
          HERE
        }"""
    compile_library(source.replace("HERE", "shared[0] = in[0] + c[0];"), cache=tmp_path)
    with pytest.raises(CompileError, match=error):
        compile_library(source.replace("HERE", expression), cache=tmp_path)


def test_structs_lie_as_in_the_library() -> None:
    """Those that Python declares again lie as the C++ compiler has laid them out."""
    declared = {
        name: {field[0]: getattr(struct, field[0]).offset for field in struct._fields_}
        | {"": ctypes.sizeof(struct)}
        for name, struct in MIRRORED.items()
    }
    assert compile_library("").layouts() == declared
