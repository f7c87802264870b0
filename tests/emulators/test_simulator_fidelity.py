"""The simulator against Apple: MLX's shipped kernels from source and as Apple compiled them.

MLX's macOS wheel holds many kernels twice, as headers and as the bitcode (AIR) that Apple's Metal
compiler made of them. Each such kernel runs here on the same data both ways: its source through
the simulator's reader, compiler and stand-in for metal_stdlib, Apple's bitcode translated to this
machine; both on the simulator's executor. The outputs must be equal bit for bit.

Why this is fair: reading the language (address spaces, integer and half arithmetic, conversions,
built-ins, bindings, which expressions are contracted) is done twice by unrelated means, so a
mistake on our side shows. Kernels that have no header (layer and RMS norm, our nearest relatives)
run as Apple compiled them against float64, which shows that the oracle itself runs them rightly.

What it does not cover: the two sides share the executor, so a barrier or a reduction over lanes is
compared in its use, not in its meaning (the planted faults do that); they share the host's exp and
log, so these are compared in the types they are called with, not in their accuracy; and nothing
here says anything of Apple's GPU code generator, the order in which its hardware adds across
lanes, or its memory model.

Tolerance: none between source and bitcode, since contraction is that of Apple's bitcode and the
transcendentals are shared. Only a NaN equals any NaN: IEEE 754 leaves its payload open, and
compilers swap operands. The norms' tolerance against float64 is derived in `norm`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray
from problems import SEED
from simulator import Library, SimulatorError, compile_library
from simulator.loader import preprocess
from simulator.oracle.air import Translation, link, translate
from simulator.oracle.metallib import INCLUDE, METALLIB, MetalLibrary, fetch_wheel, pinned_version
from simulator.source import translate as read_source

pytestmark = pytest.mark.slow

Array = NDArray[Any]
Triple = tuple[int, int, int]

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "oracle"

# Stands in for what metal_stdlib lacks of what MLX's headers name.
SUPPORT = Path(__file__).parents[1] / "simulator" / "oracle" / "include"
HEADERS = """
#include "metal_internals.h"
using namespace metal;
#include "mlx/backend/metal/kernels/utils.h"
#include "mlx/backend/metal/kernels/softmax.h"
#include "mlx/backend/metal/kernels/logsumexp.h"
#include "mlx/backend/metal/kernels/atomic.h"
#include "mlx/backend/metal/kernels/reduction/ops.h"
#include "mlx/backend/metal/kernels/reduce.h"
#include "mlx/backend/metal/kernels/dot.h"
"""

# utils.h qualifies constructors with the address space of their object, which hides them from clang
# where it constructs a member.
ADAPTED = {"utils.h": (("(int dim) thread", "(int dim)"), ("(int) thread", "(int)"))}

# name in the metallib -> name in the source
FORMATS = {"float32": "float", "float16": "half", "bfloat16": "bfloat16_t"}
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
KINDS = ("ordinary", "large mean", "not finite", "subnormal")
SEEDS = (0, 1)

# --- Numbers --------------------------------------------------------------------------------------


def encode(x: Array, name: str) -> Array:
    """Round float64 to the format; bfloat16 is kept as the upper half of a float32."""
    if name == "float16":
        return x.astype(np.float16)
    single = x.astype(np.float32)
    if name == "float32":
        return single
    bits = single.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(single), 0x7FC0, rounded).astype(np.uint16)


def decode(x: Array) -> Array:
    """The values, in float64, of an array in any of the formats."""
    if x.dtype == np.uint16:
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


def sample(kind: str, shape: tuple[int, ...], name: str, seed: int) -> Array:
    """Random numbers of one of the KINDS."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if kind == "large mean":
        x += 1000
    elif kind == "subnormal":
        # float32 and bfloat16 flush these, float16 does not.
        x *= 2e-5 if name == "float16" else 3e-39
    elif kind == "not finite":
        # A few of each anywhere, and a last row of nothing else: what a padded tail looks like.
        flat = x.reshape(-1)
        places = rng.permutation(flat.size)
        few = 1 + flat.size // 300
        for i, value in enumerate((math.nan, math.inf, -math.inf)):
            flat[places[i * few : (i + 1) * few]] = value
        x[-1] = -math.inf
    return encode(x, name)


def unequal(a: Array, b: Array) -> int:
    """How many elements differ in any bit, NaNs apart."""
    bits = {2: np.uint16, 4: np.uint32}[a.itemsize]
    both_nan = np.isnan(decode(a)) & np.isnan(decode(b))
    return int(np.sum((a.view(bits) != b.view(bits)) & ~both_nan))


# --- Kernels, and launches such as MLX makes ------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One dispatch: arguments by their names in the source, and the grid."""

    arguments: Mapping[str, Array | int | float]
    threadgroups: Triple
    threads: Triple
    label: str


Launches = Callable[[str, int], Iterable[Launch]]  # of a kind and a seed


@dataclass(frozen=True)
class Kernel:
    """A kernel that is in the metallib and, as a template, in a header."""

    name: str
    function: str
    parameters: str
    launches: Launches


def simdgroups(threads: int) -> int:
    """`threads` rounded up to whole simdgroups."""
    return 32 * -(-threads // 32)


def whole_rows(
    name: str, sizes: Iterable[int], looped: bool, one_per_row: bool, kind: str, seed: int
) -> Iterator[Launch]:
    """softmax and logsumexp: one threadgroup for a row, four elements at a time for a thread."""
    rows = 3
    for n in sizes:
        x = sample(kind, (rows, n), name, seed)
        out = np.zeros((rows, 1 if one_per_row else n), x.dtype)
        threads = 1024 if looped else simdgroups(-(-n // 4))
        yield Launch(
            {"in": x, "out": out, "axis_size": n}, (rows, 1, 1), (threads, 1, 1), f"{x.shape}"
        )


def row_kernels() -> Iterator[Kernel]:
    block = (1, 3, 31, 33, 127, 128, 129, 1000, 1023, 4096)
    loop = (4097, 9001)
    for name, t in FORMATS.items():
        for family in ("softmax", "softmax_precise", "logsumexp"):
            if family == "softmax_precise" and name == "float32":
                continue
            function = family.removesuffix("_precise")
            parameters = f"{t}, float" if "precise" in family else t
            single = f"{function}_single_row" if function == "softmax" else function
            one = family == "logsumexp"
            yield Kernel(
                f"block_{family}_{name}", single, parameters,
                partial(whole_rows, name, block, False, one),
            )  # fmt: skip
            yield Kernel(
                f"looped_{family}_{name}", f"{function}_looped", parameters,
                partial(whole_rows, name, loop, True, one),
            )  # fmt: skip


def walk(
    kept: tuple[int, ...],
    kept_strides: tuple[int, ...],
    reduced: tuple[int, ...],
    reduced_strides: tuple[int, ...],
) -> dict[str, Array | int | float]:
    """How MLX describes the axes that a reduction keeps and those it walks; never empty."""
    return {
        "shape": np.array(kept or (0,)),
        "strides": np.array(kept_strides or (0,)),
        "ndim": len(kept),
        "reduce_shape": np.array(reduced or (0,)),
        "reduce_strides": np.array(reduced_strides or (0,)),
        "reduce_ndim": len(reduced),
    }


def row_threads(n: int) -> int:
    """MLX's threadgroup size for reducing rows of n."""
    if n <= 1024:
        return 32 if n <= 512 else 128
    return min(1024, simdgroups(-(-n // 4)))


def row_simple(name: str, kind: str, seed: int) -> Iterator[Launch]:
    """Rows one after the other, four for a threadgroup."""
    for rows, n in ((33, 65), (32, 127), (35, 513), (4, 1030), (5, 4099)):
        x = sample(kind, (rows, n), name, seed)
        yield Launch(
            {"in": x, "out": np.zeros(rows, x.dtype), "reduction_size": n, "out_size": rows},
            (1, -(-rows // 4), 1),
            (row_threads(n), 1, 1),
            f"{x.shape}",
        )


def row_looped(name: str, ndim: int, kind: str, seed: int) -> Iterator[Launch]:
    """(A, B, D, n) without all axes but B; D is there only if two axes besides n are reduced."""
    for a, b, d, n in ((1, 3, 2, 65), (3, 5, 3, 127), (2, 3, 2, 1025)):
        d = d if ndim == 2 else 1
        x = sample(kind, (a * b * d, n), name, seed)
        reduced = ((a, d), (b * d * n, n)) if ndim == 2 else ((a,), (b * n,))
        sizes = {"row_size": n, "non_row_reductions": a * d}
        yield Launch(
            walk((b,), (d * n,), *reduced) | {"in": x, "out": np.zeros(b, x.dtype)} | sizes,
            (1, b, 1),
            (row_threads(n), 1, 1),
            f"{(a, b, d, n)}",
        )


def row_small(name: str, kind: str, seed: int) -> Iterator[Launch]:
    """(A, B, n) without A and n, n small: a thread for an output or, A large, a simdgroup."""
    for a, b, n in ((1, 7, 1), (1, 65, 33), (3, 40, 5), (31, 9, 7), (33, 5, 8), (40, 3, 61)):
        x = sample(kind, (a * b, n), name, seed)
        by_thread = (a < 32 and n <= 8) or a <= 8
        sizes = {"row_size": n, "non_row_reductions": a}
        yield Launch(
            walk((b,), (n,), (a,), (b * n,)) | {"in": x, "out": np.zeros(b, x.dtype)} | sizes,
            (1, 1, 1) if by_thread else (1, b, 1),
            (b if by_thread else 32, 1, 1),
            f"{(a, b, n)}",
        )


def everything(name: str, kind: str, seed: int) -> Iterator[Launch]:
    """All elements to one, or to one for each of several rows, the last of them shorter."""
    for n, row in (
        (1, 1),
        (31, 31),
        (33, 33),
        (129, 129),
        (1001, 1001),
        (4096, 4096),
        (9999, 1250),
    ):
        x = sample(kind, (n, 1), name, seed)
        rows = -(-n // row)
        yield Launch(
            {"in": x, "out": np.zeros(rows, x.dtype), "in_size": n, "row_size": row},
            (1, rows, 1),
            (simdgroups(-(-row // 4)), 1, 1),
            f"{n} elements in {rows} rows",
        )


# variant -> (A, B, m, n) of inputs for it. In col_reduce_small threads beyond the last column
# return before a barrier that the others wait at; sizes up to 128 leave none of them.
COLUMNS = {
    "small": ((1, 1, 1, 5), (1, 1, 7, 1), (1, 1, 9, 33), (1, 1, 31, 127), (1, 3, 8, 128)),
    "longcolumn": ((1, 1, 1024, 1), (1, 1, 1100, 7), (1, 1, 1025, 31)),
    "looped": ((1, 1, 33, 1), (1, 1, 100, 31), (1, 1, 65, 33), (1, 2, 40, 97)),
    "2pass": ((1, 1, 300, 33), (1, 1, 1025, 65)),
}


def columns(name: str, variant: str, ndim: int, kind: str, seed: int) -> Iterator[Launch]:
    """(A, B, m, n) without m and, if two axes are reduced, A."""
    for a, b, m, n in COLUMNS[variant]:
        a = 3 if ndim == 2 else a
        x = sample(kind, (a * b * m, n), name, seed)
        reduced = ((a, m), (b * m * n, n)) if ndim == 2 else ((m,), (n,))
        kept = ((b,), (m * n,)) if b > 1 else ((), ())
        arguments = walk(*kept, *reduced)
        arguments |= {"in": x, "reduction_size": m, "reduction_stride": n, "non_col_reductions": a}
        passes = 1
        if variant == "small":
            width = min(-(-n // 4), 32)
            grid, threads = (-(-n // (4 * width)), b, 1), (width, min(8, a * m), 1)
        elif variant == "longcolumn":
            passes = 32
            grid, threads = (b, 1, passes), (n, min(32, -(-a * m // passes)), 1)
            arguments["out_size"] = b * n
        else:
            passes = 32 if variant == "2pass" else 1
            grid, threads = (-(-n // 32), b * passes, 1), (256, 1, 1)
            arguments["column_offset"] = 0
            if variant == "2pass":
                arguments["out_size"] = b
        arguments["out"] = np.zeros((passes, b, n), x.dtype)
        yield Launch(arguments, grid, threads, f"{(a, b, m, n)}")


def reduction_kernels() -> Iterator[Kernel]:
    for (name, t), (op, functor) in itertools.product(
        FORMATS.items(), (("sum", "Sum"), ("max", "Max"))
    ):
        types, tail = f"{t}, {t}, {functor}<{t}>", f"reduce_{op}{name}"
        yield Kernel(
            f"row_reduce_simple_{op}{name}", "row_reduce_simple", types, partial(row_simple, name)
        )
        yield Kernel(f"all_reduce_{op}{name}", "all_reduce", types, partial(everything, name))
        for size, index in (("", "int"), ("large_", "int64_t")):
            yield Kernel(
                f"row_reduce_small_{size}1_{tail}", "row_reduce_small", f"{types}, {index}, 1",
                partial(row_small, name),
            )  # fmt: skip
        for ndim in (1, 2):
            yield Kernel(
                f"row_reduce_looped_{ndim}_{tail}", "row_reduce_looped", f"{types}, int, {ndim}",
                partial(row_looped, name, ndim),
            )  # fmt: skip
            for variant in COLUMNS:
                tile = variant in ("looped", "2pass")
                yield Kernel(
                    f"col_reduce_{variant}_{ndim}{'_32_32' * tile}_{tail}",
                    f"col_reduce_{variant}",
                    f"{types}, int, {ndim}{', 32, 32' * tile}",
                    partial(columns, name, variant, ndim),
                )


def dot(name: str, kind: str, seed: int) -> Iterator[Launch]:
    """16-byte loads, products that are contracted, and lanes that have returned at a reduction."""
    for n in (1, 33, 1023, 16384, 20483):
        groups = -(-n // 16384)
        a, b = sample(kind, (n, 1), name, seed), sample("ordinary", (n, 1), name, seed + 100)
        yield Launch(
            {"a": a, "b": b, "output": np.zeros(groups, np.float32), "n": n},
            (groups, 1, 1),
            (512, 1, 1),
            f"{n} elements",
        )


def dot_kernels() -> Iterator[Kernel]:
    for name, t in FORMATS.items():
        yield Kernel(
            f"dot_product_{name}_it32_tg512_sg16", "dot_product", f"{t}, 32, 512, 16",
            partial(dot, name),
        )  # fmt: skip


SHIPPED = {k.name: k for k in (*row_kernels(), *reduction_kernels(), *dot_kernels())}

# --- Norms: no header in the wheel, so Apple's compilation of them is held to float64 -------------

NORMS = tuple(
    a + b for a in ("", "vjp_") for b in ("layer_norm", "layer_norm_looped", "rms", "rms_looped")
)
EPS = 1e-5


@dataclass(frozen=True)
class NormCase:
    """A dispatch of a norm, what it should write, and by how much it may miss."""

    launch: Launch
    truth: Mapping[str, Array]
    bound: Mapping[str, Array]


@np.errstate(invalid="ignore")
def norm(family: str, name: str, n: int, kind: str, seed: int) -> NormCase:
    layer, vjp, looped = "layer" in family, "vjp" in family, "looped" in family
    rows = 4
    x, g = (sample(k, (rows, n), name, seed + i) for i, k in enumerate((kind, "ordinary")))
    w, b = (sample("ordinary", (1, n), name, seed + i) for i in (2, 3))
    arguments: dict[str, Array | int | float] = {
        "x": x,
        "w": w,
        "eps": EPS,
        "axis_size": n,
        "w_stride": 1,
    }
    if vjp:
        arguments |= {"g": g, "gx": np.zeros_like(x), "gw": np.zeros_like(x)}
        if family == "vjp_rms":
            arguments |= {"n_rows": rows, "rows_per_group": 1}
    else:
        arguments |= {"out": np.zeros_like(x)} | ({"b": b, "b_stride": 1} if layer else {})
    threads = 1024 if looped else simdgroups(-(-n // (8 if layer else 4)))

    # The definition, in float64.
    x, w, b, g = decode(x), decode(w), decode(b) if layer else np.zeros((1, n)), decode(g)
    mean = x.mean(1, keepdims=True) if layer else np.zeros((rows, 1))
    r = 1 / np.sqrt(((x - mean) ** 2).mean(1, keepdims=True) + EPS)
    xh, wg = (x - mean) * r, w * g
    truth = {"out": xh * w + b}
    if vjp:
        gx = wg - xh * (wg * xh).mean(1, keepdims=True)
        truth = {"gx": r * (gx - wg.mean(1, keepdims=True) * layer), "gw": xh * g}

    # Inside, float32: sums of eight or so, then trees over lanes and simdgroups, and a mean whose
    # error in units of its own last place grows by mean / deviation when it is taken off. Outside,
    # three roundings to the format: of xh, of its product with w, and of the sum with b.
    relative = 8 * UNIT_ROUNDOFF["float32"] * (1 + np.abs(mean) * r) + 3 * UNIT_ROUNDOFF[name]

    def largest(a: Array) -> Array:
        return np.asarray(np.where(np.isfinite(a), np.abs(a), 0).max(1, keepdims=True))

    scale = {"out": largest(xh * w) + largest(b), "gw": largest(xh * g)}
    scale["gx"] = r * largest(wg) * (1 + largest(xh))
    return NormCase(
        Launch(arguments, (rows, 1, 1), (threads, 1, 1), f"{kind}, seed {seed}, {rows} x {n}"),
        truth,
        {key: relative * scale[key] for key in truth},
    )


def norm_sizes(family: str) -> tuple[int, ...]:
    if "looped" in family:
        return (1, 33, 4097, 7013)
    # In MLX's layer norm a thread whose elements all lie beyond the row fills its private array
    # from a negative index on, up to 247 floats before its start, and what that overwrites no two
    # machines agree on. These sizes leave every thread an element, or end exactly before it.
    return (249, 250, 255, 256, 1023, 1024) if "layer" in family else (1, 31, 33, 127, 1025)


# --- Running both ---------------------------------------------------------------------------------

SCALARS = {
    "float": np.float32,
    "int": np.int32,
    "uint": np.uint32,
    "long": np.int64,
    "ulong": np.uint64,
}


def run(library: Library, kernel: Translation, launch: Launch, **options: Any) -> dict[str, Array]:
    """Dispatch with every argument where Apple's metadata says it goes; returns what it wrote."""
    bound = [argument for argument in kernel.arguments if argument.kind == "buffer"]
    assert {argument.name for argument in bound} == launch.arguments.keys()
    buffers: dict[int, Array] = {}
    constants: dict[int, Array] = {}
    for argument in bound:
        value = launch.arguments[argument.name]
        if argument.address_space == 2:
            constants[argument.location] = np.asarray(value, SCALARS[argument.type_name])
        else:
            buffers[argument.location] = np.array(value)
    outputs = [argument for argument in bound if argument.writable]
    library.dispatch(
        kernel.name,
        buffers,
        writable={argument.location for argument in outputs},
        constants=constants,
        grid=launch.threadgroups,
        group=launch.threads,
        **options,
    )
    return {argument.name: buffers[argument.location] for argument in outputs}


@dataclass(frozen=True)
class Oracle:
    """MLX's headers, and its kernels as Apple compiled them."""

    headers: Path
    include: tuple[Path, ...]  # where the simulator's compiler finds MLX's headers
    kernels: Mapping[str, Translation]
    library: Library

    def run(self, kernel: str, launch: Launch) -> dict[str, Array]:
        return run(self.library, self.kernels[kernel], launch, seed=0, flush_denormals=True)

    def compile(
        self, kernels: Iterable[Kernel], *, altered: Path | None = None, **options: Any
    ) -> Library:
        """The headers, those in `altered` first, through the simulator's compiler."""
        include = [*([altered] if altered else []), *self.include]
        return compile_library(
            HEADERS, instantiations(kernels), include=include, cache=CACHE, **options
        )

    def differences(self, library: Library, kernel: str, launch: Launch, **options: Any) -> str:
        """What the simulator's outputs differ in from Apple's; empty if in nothing."""
        simulated = run(library, self.kernels[kernel], launch, flush_denormals=True, **options)
        counts = {k: unequal(simulated[k], v) for k, v in self.run(kernel, launch).items()}
        return ", ".join(f"{count} elements of {k}" for k, count in counts.items() if count)


def write_altered(
    folder: Path, headers: Path, name: str, replacements: Iterable[tuple[str, str]]
) -> Path:
    """Make `folder` an include directory with MLX's header `name`, altered; returns it."""
    relative = Path("mlx/backend/metal/kernels") / name
    text = (headers / relative).read_text()
    for old, new in replacements:
        assert old in text, f"{name} does not contain {old!r}"
        text = text.replace(old, new)
    (folder / relative).parent.mkdir(parents=True, exist_ok=True)
    (folder / relative).write_text(text)
    return folder


def instantiations(kernels: Iterable[Kernel]) -> list[str]:
    return [f'instantiate_kernel("{k.name}", {k.function}, {k.parameters})' for k in kernels]


def variant(family: str, name: str, has_w: bool | None = None) -> str:
    """What the oracle calls a norm kernel, of which function constants make several."""
    return family + name + ("" if has_w is None else f"_{has_w}")


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    root = fetch_wheel(pinned_version(ROOT / "pyproject.toml"), CACHE)
    metallib = MetalLibrary(root / METALLIB)
    kernels = [translate(metallib.bitcode(name), name, {}) for name in SHIPPED]
    for family, name in itertools.product(NORMS, FORMATS):
        bitcode = metallib.bitcode(family + name)
        values: list[dict[str, bool]] = [{"has_w": False}, {"has_w": True}]
        if "vjp" not in family:
            values = [{}]
        kernels += [translate(bitcode, variant(family, name, **v), v) for v in values]
    headers, adapted = root / INCLUDE, CACHE / "adapted"
    for header, replacements in ADAPTED.items():
        write_altered(adapted, headers, header, replacements)
    return Oracle(
        headers,
        (SUPPORT, adapted, headers),
        {kernel.name: kernel for kernel in kernels},
        link(kernels, CACHE),
    )


@pytest.fixture(scope="module")
def libraries(oracle: Oracle) -> dict[bool, Library]:
    """The headers' kernels with contraction (True) and without: each as Apple compiled it."""
    return {
        contracted: oracle.compile(
            [k for k in SHIPPED.values() if oracle.kernels[k.name].contracted == contracted],
            contract=contracted,
        )
        for contracted in (False, True)
    }


@pytest.mark.quick
@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_encoded_as_mlx_does(name: str) -> None:
    """To nearest and ties to even: what both sides of every comparison here begin with."""
    rng = np.random.default_rng(SEED)
    halfway = 1 + np.arange(64) * 2.0**-12  # between two of float16, and of bfloat16
    x = np.concatenate([rng.standard_normal(1000), halfway, -halfway, [0.0, math.inf, 7e4, 3e38]])
    x = x.astype(np.float32)
    expected = mx.array(x).astype(getattr(mx, name)).astype(mx.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(decode(encode(x, name)), np.array(expected))


@pytest.mark.parametrize("name", SHIPPED)
def test_source_and_apples_compilation_agree(
    name: str, oracle: Oracle, libraries: dict[bool, Library]
) -> None:
    library = libraries[oracle.kernels[name].contracted]
    for kind, seed in itertools.product(KINDS, SEEDS):
        for launch in SHIPPED[name].launches(kind, seed):
            found = oracle.differences(library, name, launch, seed=seed)
            assert not found, f"{kind}, seed {seed}, {launch.label}: {found} differ"


def test_kernels_that_apple_runs_pass_every_check(oracle: Oracle) -> None:
    """The executor's checks (bounds, races, uninitialised memory) have nothing to object to."""
    # An instrumented library does not contract everything that an ordinary one does.
    kernels = [k for k in SHIPPED.values() if not oracle.kernels[k.name].contracted]
    library = oracle.compile(kernels, contract=False, instrumented=True)
    for kernel in kernels:
        for launch in kernel.launches("ordinary", 0):
            if kernel.function == "row_reduce_simple" and launch.arguments["out_size"] % 4:
                # Its last threadgroup steps back to have four rows: two write the same values.
                with pytest.raises(SimulatorError, match="which another threadgroup wrote"):
                    oracle.differences(library, kernel.name, launch, seed=0)
                continue
            found = oracle.differences(library, kernel.name, launch, seed=0)
            assert not found, f"{kernel.name}, {launch.label}: {found} differ"


def test_parameters_are_read_as_apples_compiler_reads_them(oracle: Oracle) -> None:
    text = preprocess(HEADERS, instantiations(SHIPPED.values()), include=oracle.include)
    spaces = {1: "device", 2: "constant"}
    read = read_source(text, instrumented=False).kernels
    assert {kernel.host_name for kernel in read} == SHIPPED.keys()
    for kernel in read:
        apple = [
            (a.name, "", spaces[a.address_space], a.location, not a.writable)
            if a.kind == "buffer"
            else (a.name, a.kind, "", -1, False)
            for a in oracle.kernels[kernel.host_name].arguments
        ]
        ours = [
            (a.name, a.built_in, a.space, int(a.index or -1), a.read_only) for a in kernel.arguments
        ]
        assert ours == apple, kernel.host_name


@pytest.mark.parametrize("family", NORMS)
@pytest.mark.parametrize("name", FORMATS)
def test_apples_norms_agree_with_float64(family: str, name: str, oracle: Oracle) -> None:
    for kind, seed, n in itertools.product(KINDS[:3], SEEDS, norm_sizes(family)):
        case = norm(family, name, n, kind, seed)
        for has_w in (False, True) if "vjp" in family else (None,):
            outputs = oracle.run(variant(family, name, has_w), case.launch)
            if has_w is False:  # the kernel was told that there is no weight to differentiate
                assert not outputs.pop("gw").any()
            for key, value in outputs.items():
                result, truth = decode(value), case.truth[key]
                close = np.abs(result - truth) <= case.bound[key]
                wrong = ~(close | (np.isnan(result) & np.isnan(truth)))
                assert not wrong.any(), f"{case.launch.label}, {key}: {wrong.sum()} wrong"


# --- The comparison is able to fail ---------------------------------------------------------------


def test_a_tail_padded_with_zero_is_noticed(oracle: Oracle, tmp_path: Path) -> None:
    name = "block_softmax_float32"
    change = ("? AccT(in[i]) : Limits<AccT>::min", "? AccT(in[i]) : AccT(0)")
    altered = write_altered(tmp_path, oracle.headers, "softmax.h", [change])
    library = oracle.compile([SHIPPED[name]], altered=altered, contract=False)
    launches = list(SHIPPED[name].launches("ordinary", 0))
    for launch in launches:
        n = launch.arguments["axis_size"]
        has_tail = n != 4 * launch.threads[0]
        assert bool(oracle.differences(library, name, launch)) == has_tail, launch.label


def test_a_wrong_stride_is_noticed(oracle: Oracle, tmp_path: Path) -> None:
    name = "col_reduce_looped_1_32_32_reduce_sumfloat32"
    change = ("offset.y * BN + offset.x + i", "offset.y * BN + offset.x")
    altered = write_altered(tmp_path, oracle.headers, "reduction/reduce_col.h", [change])
    library = oracle.compile([SHIPPED[name]], altered=altered, contract=False)
    for launch in SHIPPED[name].launches("ordinary", 0):
        assert oracle.differences(library, name, launch), launch.label


def test_a_missing_barrier_is_noticed(oracle: Oracle, tmp_path: Path) -> None:
    name = "row_reduce_simple_sumfloat32"
    change = ("threadgroup_barrier(mem_flags::mem_threadgroup);", "")
    altered = write_altered(tmp_path, oracle.headers, "reduction/reduce_row.h", [change])
    library = oracle.compile([SHIPPED[name]], altered=altered, contract=False)
    several = [launch for launch in SHIPPED[name].launches("ordinary", 0) if launch.threads[0] > 32]
    for launch in several:
        assert oracle.differences(library, name, launch, seed=0), launch.label


def test_contraction_is_noticed(oracle: Oracle) -> None:
    name = "dot_product_float32_it32_tg512_sg16"
    assert oracle.kernels[name].contracted
    library = oracle.compile([SHIPPED[name]], contract=False)
    # With fewer elements every thread has one product, added to zero.
    *_, penultimate, last = SHIPPED[name].launches("ordinary", 0)
    for launch in (penultimate, last):
        assert oracle.differences(library, name, launch), launch.label
