"""Problems whose plans hold every kernel, in every way that a plan has: for whatever runs plans."""

from __future__ import annotations

from dataclasses import replace

from plans import DTYPES, Problem

# A core with registers for any fused group leaves the numbers of threads as the only limit.
FIXED = {
    "sweep_threads": 256,
    "core_registers": 1 << 20,
    "fused_groups": 1,
    "fused_forward_threads": 1024,
    "fused_backward_threads": 512,
    "enough_groups": 512,
    "least_vectors": 16,
    "apply_vectors": 16,
    "least_run": 64,
}

# Geometries that a threadgroup holds, that it does not, and of several parts; and their alignment.
ACCESSES: dict[str, tuple[list[tuple[int, int, int, int]], bool]] = {
    "columns of vectors": ([(1, 2, 19, 16), (1, 1, 403, 16), (2, 2, 19, 8)], True),
    "columns of elements": ([(1, 2, 19, 5), (1, 1, 403, 16), (2, 2, 19, 3)], False),
    "rows of vectors": ([(1, 6, 45, 1), (1, 2, 4101, 1), (2, 3, 45, 1)], True),
    "rows of elements": ([(1, 6, 45, 1), (1, 2, 4101, 1), (2, 3, 45, 1)], False),
}


# Activation, negative slope, and what the forward and the backward pass read for it.
EPILOGUES = (
    ("relu", 0.0, "residual", "output"),
    ("silu", 0.0, "residual", "residual"),
    ("gelu", 0.0, "", ""),
    ("leaky_relu", 0.1, "residual", "output"),
    ("", 0.0, "residual", ""),
)


def with_epilogue(problem: Problem, number: int) -> list[Problem]:
    """The problem with one of EPILOGUES; none if its backward pass has none."""
    activation, slope, forward, backward = EPILOGUES[number % len(EPILOGUES)]
    is_forward = problem.operation == "normalize"
    if not is_forward and not activation:
        return []
    found = replace(
        problem,
        activation=activation,
        negative_slope=slope,
        auxiliary=forward if is_forward else backward,
    )
    return [replace(found, bias=is_forward or found.needs_y)]


def table(dtype: str, access: str, *, longer: int = 1, max_threads: int = 32) -> list[Problem]:
    """Threadgroups of 32, so that few elements are too many; or reductions so much longer."""
    geometries, aligned = ACCESSES[access]
    found = []
    for i, (merge, outer, reduce, inner) in enumerate(geometries):
        p = Problem(
            "",
            (merge, outer, longer * reduce, inner),
            dtype,
            outer * inner,
            aligned=aligned,
            max_threads=max_threads,
        )
        forward = replace(p, operation="normalize", weight=True, bias=True)
        backward = replace(p, operation="normalize_gradient", weight=True, wanted="x weight bias")
        found += [
            replace(p, operation="moments"),
            replace(p, operation="moments_gradient"),
            replace(p, operation="partial_moments"),
            replace(p, operation="input_gradient", weight=True),
            forward,
            backward,
            replace(forward, given=True),
            replace(backward, given=True, wanted="x statistics weight bias"),
            replace(backward, given=True, wanted="x"),
        ]
        found += [replace(p, operation="input_gradient", bias=True, activation="silu")]
        own = found[-6:-1]
        # Of each pattern, every geometry meets every epilogue in some type or alignment.
        number = 2 * DTYPES.index(dtype) + aligned + i
        own += [made for problem in own for made in with_epilogue(problem, number)]
        found += own[5:]
        if merge == 1:
            # A row of each member takes a simdgroup.
            threads = min(1024, 4 * max_threads)
            own += [replace(p, operation=name) for name in ("moments", "moments_gradient")]
            found += [of_groups(replace(problem, max_threads=threads)) for problem in own]
            found.append(of_channels(replace(p, operation="moments")))
    found.append(replace(running_statistics(dtype), max_threads=max_threads))
    return found


def of_channels(problem: Problem) -> Problem:
    """The same over groups of one channel each."""
    _, outer, _, inner = problem.geometry
    channels = inner if inner > 1 else outer
    return replace(problem, channels=channels, groups=channels)


def of_groups(problem: Problem) -> Problem:
    """The same over as many groups of channels as can be; several in columns are interleaved."""
    channels = of_channels(problem).channels
    members = next(d for d in range(2, channels + 1) if channels % d == 0)
    groups = channels // members
    interleaved = problem.geometry[3] > 1 and groups > 1
    return replace(problem, channels=channels, groups=groups, interleaved=interleaved)


def running_statistics(dtype: str = "float32", instances: int = 5, channels: int = 37) -> Problem:
    return Problem("running_statistics", (1, instances, 1, channels), dtype, channels)


def whole_table(*, longer: int = 1, max_threads: int = 32) -> list[Problem]:
    """Every kernel at least once."""
    return [
        p
        for dtype in DTYPES
        for access in ACCESSES
        for p in table(dtype, access, longer=longer, max_threads=max_threads)
    ]


def full_groups() -> list[Problem]:
    """The same with as many threads as there can be, for whom threadgroup memory matters."""
    return whole_table(longer=37, max_threads=1024)


SOME = [
    Problem("normalize", (1, 2, 61, 24), channels=24, weight=True, bias=True),
    Problem("normalize", (1, 6, 1100, 1), "float16", channels=3, weight=True, bias=True),
    Problem("normalize", (1, 1, 1201, 16), channels=16, max_threads=64),
    Problem("normalize", (3, 5, 77, 1), "bfloat16", channels=5, bias=True),
    Problem("normalize_gradient", (1, 2, 61, 5), channels=5, weight=True, wanted="x weight bias"),
    Problem("normalize_gradient", (1, 1, 1201, 16), "float16", 16, weight=True, wanted="x weight"),
    Problem("normalize_gradient", (3, 5, 77, 1), channels=5, weight=True, wanted="x bias"),
    Problem(
        "normalize_gradient",
        (1, 1, 1201, 8),
        channels=8,
        given=True,
        weight=True,
        wanted="x statistics weight bias",
        max_threads=64,
    ),
    Problem("moments", (3, 4, 29, 9)),
    Problem("moments", (1, 3, 5003, 1), max_threads=32),
    Problem("moments_gradient", (1, 4, 50, 6), "bfloat16"),
    Problem("partial_moments", (3, 4, 29, 9)),
    Problem("partial_moments", (1, 3, 503, 1), "float16", max_threads=32),
    Problem("input_gradient", (3, 5, 77, 1), "bfloat16", channels=5, weight=True),
    of_groups(Problem("normalize", (1, 2, 61, 24), "float16", weight=True, per_instance=True)),
    Problem("normalize", (1, 12, 1100, 1), channels=6, bias=True, groups=3),
    of_groups(Problem("normalize_gradient", (1, 2, 61, 24), weight=True, wanted="x weight bias")),
    *with_epilogue(Problem("normalize", (1, 2, 61, 24), channels=24, weight=True), 0),
    *with_epilogue(Problem("normalize", (1, 6, 1100, 1), "float16", channels=3), 2),
    *with_epilogue(Problem("normalize", (1, 1, 1201, 16), "bfloat16", 16, max_threads=64), 4),
    *with_epilogue(Problem("normalize_gradient", (1, 2, 61, 24), channels=24, wanted="x"), 0),
    *with_epilogue(
        Problem("normalize_gradient", (1, 1, 1201, 16), "float16", 16, wanted="x bias"), 1
    ),
    *with_epilogue(
        Problem("normalize_gradient", (3, 5, 77, 1), channels=5, weight=True, wanted="x weight"), 2
    ),
    *with_epilogue(
        Problem("normalize_gradient", (3, 5, 77, 1), channels=5, given=True, wanted="x bias"), 3
    ),
    Problem(
        "normalize_gradient",
        (1, 12, 501, 1),
        channels=6,
        given=True,
        weight=True,
        wanted="x statistics weight bias",
        groups=2,
        per_instance=True,
    ),
    running_statistics(instances=1),
    running_statistics("float16", instances=300),
]
