"""The shaders' bandwidth on an NVIDIA GPU, a proxy for Apple's, beside a copy and torch.nn.

    PYTHONPATH=tests:tests/support python -m cuda_twin.bandwidth --json out.json --plot out.png

Every figure is a median of times between CUDA events. The implementations of a case take turns, and
before each repetition memory of several times the L2 cache is overwritten. The bandwidth of a plan
is the bytes that its kernels must move of arrays the size of x (docs/kernels.md), divided by the
time of all its dispatches. It is given as a share of the bandwidth of a device-to-device copy of an
array of that size. torch's share counts the same bytes: where it is higher, torch is faster.

The results are written after each case. With --seconds, what does not fit is left out: torch first,
so that the shaders come to be timed in every case, then cases. The report says what was.

It has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mlx_welford.bench.environment import environment
from plans import DTYPES, ITEM_BYTES, LIKE_X, Plan, Problem, dtype_of, rounded

from .device import Device, DeviceError, Memory, Step, Twin, run
from .progress import Budget, write_json
from .shaders import shader_program
from .tuning import tuning_of

Kind = Literal["batch", "instance"]
Mode = Literal["forward", "backward", "evaluation"]
Layout = Literal["channels last", "channels first"]

MEBIBYTE = 2**20
SIZES = tuple(MEBIBYTE << n for n in (0, 2, 4, 6, 8, 10, 11))
QUICK_SIZES = (MEBIBYTE, 256 * MEBIBYTE)
KINDS: tuple[Kind, ...] = ("batch", "instance")
MODES: tuple[Mode, ...] = ("forward", "backward", "evaluation")
LAYOUTS: tuple[Layout, ...] = ("channels last", "channels first")

CHANNELS = 64
SIDE = 64  # of an image

# Shares of the copy's bandwidth to be reached from 256 MB on.
TARGETS: Mapping[Mode, float] = {"forward": 0.85, "backward": 0.85, "evaluation": 0.92}
TARGET_BYTES = 256 * MEBIBYTE


@dataclass(frozen=True)
class Case:
    """One layer and its input: `images` of `side` squared positions and `channels`."""

    kind: Kind
    mode: Mode
    layout: Layout
    dtype: str
    images: int
    side: int = SIDE
    channels: int = CHANNELS

    def __str__(self) -> str:
        size = f"{self.nbytes / MEBIBYTE:g} MB"
        return f"{self.kind} {self.mode}, {self.layout}, {self.dtype}, {size}"

    @property
    def nbytes(self) -> int:
        return self.images * self.side**2 * self.channels * ITEM_BYTES[self.dtype]

    @property
    def problem(self) -> Problem:
        n, s, c = self.images, self.side**2, self.channels
        geometry = {
            ("batch", "channels last"): (1, 1, n * s, c),
            ("batch", "channels first"): (n, c, s, 1),
            ("instance", "channels last"): (1, n, s, c),
            ("instance", "channels first"): (1, n * c, s, 1),
        }[self.kind, self.layout]
        backward = self.mode == "backward"
        return Problem(
            "normalize_gradient" if backward else "normalize",
            geometry,
            self.dtype,
            channels=c,
            given=self.mode == "evaluation",
            weight=True,
            bias=not backward,
            wanted="x weight bias" if backward else "",
        )


@dataclass(frozen=True)
class Row:
    """An implementation in a case."""

    case: Case
    implementation: str
    nbytes: int  # of x
    milliseconds: float
    share: float  # of the copy's bandwidth, by the traffic of our plan
    kernels: str = ""


def cases(
    sizes: Sequence[int], dtypes: Sequence[str], modes: Sequence[Mode], kinds: Sequence[Kind]
) -> Iterator[Case]:
    for nbytes in sizes:
        for dtype in dtypes:
            images = nbytes // (SIDE**2 * CHANNELS * ITEM_BYTES[dtype])
            for kind in kinds:
                for mode in modes:
                    if kind == "instance" and mode == "evaluation":
                        continue  # it is training's forward
                    for layout in LAYOUTS:
                        yield Case(kind, mode, layout, dtype, max(images, 1))


def passes(plan: Plan) -> int:
    """How often a plan reads and writes arrays the size of x."""
    bound = [binding.array for dispatch in plan.dispatches for binding in dispatch.buffers]
    return sum(name in LIKE_X for name in bound)


def memory_for(device: Device, problem: Problem) -> dict[str, Memory]:
    """Arrays of a problem. Large ones repeat a block of random values."""
    rng = np.random.default_rng(0)
    statistics, channels = problem.statistics, problem.channels
    sizes = {"x": problem.size, "out": problem.size, "mean": statistics, "var": statistics}
    sizes |= {"weight": channels, "bias": channels, "grad_weight": channels, "grad_bias": channels}
    if problem.operation == "normalize_gradient":
        sizes |= {"g": problem.size, "grad_mean": statistics, "grad_var": statistics}
    memory = {}
    for name, size in sizes.items():
        dtype = dtype_of(name, problem.dtype)
        values = rng.normal(size=min(size, MEBIBYTE))
        block = rounded(np.abs(values) + 0.5 if name == "var" else values, dtype)
        memory[name] = Memory(device, size * block.itemsize)
        for start in range(0, size, block.size):
            part = block[: size - start]
            memory[name].write(part, start * block.itemsize)
    return memory


def copies(device: Device, nbytes: int, repetitions: int, flush: Memory) -> float:
    """Milliseconds of a copy from device to device."""
    source, destination = Memory(device, nbytes), Memory(device, nbytes)
    device.call("cuMemsetD8Async", source.address, 1, nbytes, 0)
    return device.median_time(partial(device.copy, source, destination), repetitions, flush)


def ours(twin: Twin, case: Case, tuning: Mapping[str, int]) -> tuple[Plan, Step]:
    plan = twin.plan(case.problem, tuning)
    launches = twin.prepare(plan, memory_for(twin.device, case.problem))
    return plan, partial(run, launches)


def torch_steps(torch: Any, case: Case) -> dict[str, Callable[[], Step]]:
    """What makes the same on torch, eager and compiled, in the memory format that the layout is."""
    f = torch.nn.functional
    shape = (case.images, case.channels, case.side, case.side)
    last = case.layout == "channels last"
    memory_format = torch.channels_last if last else torch.contiguous_format
    options = {"device": "cuda", "dtype": getattr(torch, case.dtype)}
    backward = case.mode == "backward"

    def random(*lengths: int) -> Any:
        return torch.randn(*lengths, **options)

    x, g = (random(*shape).contiguous(memory_format=memory_format) for _ in range(2))
    weight, bias = random(case.channels), random(case.channels)
    mean = torch.randn(case.channels, device="cuda")
    var = torch.rand(case.channels, device="cuda") + 0.5

    def layer(x: Any, weight: Any, bias: Any) -> Any:
        if case.kind == "instance":
            return f.instance_norm(x, weight=weight, bias=bias)
        if case.mode == "evaluation":
            return f.batch_norm(x, mean, var, weight, bias, training=False)
        return f.batch_norm(x, None, None, weight, bias, training=True)

    def step(function: Any) -> Step:
        if not backward:

            def forward() -> Any:
                with torch.no_grad():
                    return function(x, weight, bias)

            return forward
        inputs = [a.detach().requires_grad_() for a in (x, weight, bias)]
        y = function(*inputs)
        return lambda: torch.autograd.grad(y, inputs, g, retain_graph=True)

    # Forget other shapes: with more than a few, torch.compile would stop compiling.
    torch.compiler.reset()
    return {
        "torch": lambda: step(layer),
        "torch.compile": lambda: step(torch.compile(layer, dynamic=False)),
    }


def measure(
    twin: Twin,
    case: Case,
    *,
    torch: Any,
    repetitions: int,
    flush: Memory,
    tuning: Mapping[str, int],
    budget: Budget,
    cases_to_come: int = 0,
) -> tuple[list[Row], list[str]]:
    """The implementations of a case, and what was left out with the reason."""
    device = twin.device
    if not budget.fits("shaders"):
        return [], [f"{case}: no time left"]
    with budget.taking("shaders"):
        copy = copies(device, case.nbytes, repetitions, flush)
        plan, step = ours(twin, case, tuning)
        milliseconds = device.median_time(step, repetitions, flush)
        del step
    moved = passes(plan) / 2  # in copies, each of which moves two

    def row(name: str, milliseconds: float, kernels: str = "") -> Row:
        share = moved * copy / milliseconds
        return Row(case, name, case.nbytes, milliseconds, share, kernels)

    rows = [Row(case, "copy", case.nbytes, copy, 1.0)]
    rows.append(row("shaders", milliseconds, " ".join(plan.kernels)))
    left_out = []
    if torch is not None:
        reserved = cases_to_come * budget.expected("shaders")
        for name, make in torch_steps(torch, case).items():
            if not budget.fits(name, reserved):
                left_out.append(f"{case}: {name}, no time left")
                continue
            with budget.taking(name):
                try:
                    milliseconds = device.median_time(make(), repetitions, flush)
                except Exception as error:  # of its compiler, say: no reason to stop timing ours
                    left_out.append(f"{case}: {name}, {type(error).__name__}: {error}")
                else:
                    rows.append(row(name, milliseconds))
        torch.cuda.empty_cache()
    return rows, left_out


def torch_with_cuda() -> Any:
    """torch, or None where it is absent or has no GPU."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


# ---- Results -------------------------------------------------------------------------------------


def by_case(rows: Sequence[Row]) -> dict[Case, dict[str, Row]]:
    found: dict[Case, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.case, {})[row.implementation] = row
    return found


def missed(rows: Sequence[Row]) -> list[str]:
    """The targets that the shaders did not reach."""
    found = []
    for case, implementations in by_case(rows).items():
        shaders = implementations["shaders"]
        others = [r for name, r in implementations.items() if name.startswith("torch")]
        fastest = min((r.milliseconds for r in others), default=float("inf"))
        if case.nbytes >= TARGET_BYTES:
            target = TARGETS[case.mode]
            if shaders.share < target:
                found.append(f"{case}: {shaders.share:.0%} of the copy, not {target:.0%}")
            least = 1.3 if case.kind == "instance" else 1.0
            if fastest < least * shaders.milliseconds:
                ratio = fastest / shaders.milliseconds
                found.append(f"{case}: {ratio:.2f} times as fast as torch, not {least}")
        elif case.nbytes <= MEBIBYTE and shaders.milliseconds > 1.2 * fastest:
            ratio = shaders.milliseconds / fastest
            found.append(f"{case}: {ratio:.2f} times torch's time, not 1.2")
    return found


def markdown(rows: Sequence[Row]) -> str:
    """A table: milliseconds, and shares of the copy's bandwidth in brackets."""
    names = list(dict.fromkeys(row.implementation for row in rows))
    lines = [
        f"| | MB | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for case, implementations in by_case(rows).items():
        cells = [
            f"{row.milliseconds:.3f} ({row.share:.0%})" if row else "-"
            for row in map(implementations.get, names)
        ]
        label = f"{case.kind} {case.mode}, {case.layout}, {case.dtype}"
        lines.append(f"| {label} | {case.nbytes / MEBIBYTE:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Shares of the copy's bandwidth by size, a panel for each kind, mode and layout."""
    from matplotlib.figure import Figure

    panels: dict[tuple[Kind, Mode, Layout], list[Row]] = {}
    for row in rows:
        if row.implementation != "copy":
            key = (row.case.kind, row.case.mode, row.case.layout)
            panels.setdefault(key, []).append(row)
    columns = len(LAYOUTS)
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).ravel()
    styles = dict(zip(DTYPES, ("-", "--", ":"), strict=True))
    colours = {"shaders": "C0", "torch": "C1", "torch.compile": "C2"}
    for axis, (key, members) in zip(axes, panels.items(), strict=False):
        lines: dict[tuple[str, str], list[Row]] = {}
        for row in members:
            lines.setdefault((row.implementation, row.case.dtype), []).append(row)
        for (implementation, dtype), line in lines.items():
            axis.semilogx(
                [row.nbytes / MEBIBYTE for row in line],
                [row.share for row in line],
                styles[dtype],
                color=colours[implementation],
                label=f"{implementation}, {dtype}",
            )
        axis.axhline(1, color="grey", linewidth=0.5)
        axis.set(title=" ".join(key), xlabel="MB of x", ylabel="share of the copy", ylim=(0, None))
    axes[0].legend(fontsize=6)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def where(device: Device, torch: Any) -> dict[str, Any]:
    """Machine, GPU and versions."""
    return {
        **environment(),
        "gpu": device.name,
        "l2_bytes": device.attribute("L2_CACHE_SIZE"),
        "torch": None if torch is None else torch.__version__,
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 MB and 256 MB alone")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="MB")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--seconds", type=float, help="leave out what does not fit")
    parser.add_argument("--without-torch", action="store_true")
    parser.add_argument(
        "--tuning", type=json.loads, default={}, metavar="JSON", help="constants by their names"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    budget = Budget(options.seconds)
    try:
        device = Device()
    except DeviceError as error:
        print(f"Nothing to measure: {error}.", file=sys.stderr)
        return 1
    torch = None if options.without_torch else torch_with_cuda()
    if torch is None:
        print("Without torch: it is not asked for, not installed, or has no GPU.", file=sys.stderr)
    twin = Twin(device, shader_program(device.architecture))
    tuning = {**tuning_of(device.name), **options.tuning}
    flush = Memory(device, max(256 * MEBIBYTE, 4 * device.attribute("L2_CACHE_SIZE")))
    sizes = QUICK_SIZES if options.quick else SIZES
    if options.sizes:
        sizes = tuple(MEBIBYTE * size for size in options.sizes)
    here = where(device, torch)
    rows: list[Row] = []
    left_out: list[str] = []
    to_measure = list(cases(sizes, options.dtypes, options.modes, options.kinds))
    for done, case in enumerate(to_measure, start=1):
        found, missing = measure(
            twin,
            case,
            torch=torch,
            repetitions=options.repetitions,
            flush=flush,
            tuning=tuning,
            budget=budget,
            cases_to_come=len(to_measure) - done,
        )
        rows += found
        left_out += missing
        print(
            case,
            *(f"{r.implementation} {r.milliseconds:.4f} ms {r.share:.0%}" for r in found[1:]),
            *missing,
            sep=" | ",
            flush=True,
        )
        if options.json:
            results = {"environment": here, "cases": len(to_measure), "cases_tried": done}
            results |= {"left_out": left_out, "missed": missed(rows)}
            write_json(options.json, {**results, "rows": [asdict(row) for row in rows]})
        if options.markdown:
            options.markdown.write_text(markdown(rows))
    if options.plot and rows:
        try:
            plot(rows, f"{device.name}, a proxy for Apple's GPUs", options.plot)
        except ImportError as error:
            print(f"Without a plot: {error}.", file=sys.stderr)
    print("Targets missed:", *(missed(rows) or ["none"]), sep="\n  ")
    print("Left out:", *(left_out or ["nothing"]), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
