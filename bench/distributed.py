"""What synchronising BatchNorm costs: measured on 1 to 4 processes, modelled for many machines.

    python -m bench.distributed --json figures.json --plot figures.svg
    python -m bench.distributed --from figures.json --plot docs/distributed.svg

Starts itself with mlx.launch, ring over loopback, as 1 to 4 processes. Each times one layer,
forward and backward, with BatchNorm and with SyncBatchNorm, and bare collectives of several sizes.
From the latter follow a latency and a time per byte (least squares), and from these, with the
number of steps and the bytes that a ring takes, the cost on 64 to 1024 machines. That is a model:
with the network of this measurement, or of --latency and --bandwidth, and all links busy at once.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx_welford as mw
import numpy as np
from mlx_welford.bench.environment import Environment, environment
from mlx_welford.bench.harness import Run, milliseconds

CHANNELS = (16, 64, 256, 1024, 4096)
RANKS = (1, 2, 3, 4)
MODELLED_RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
ROWS = 256  # of x on each rank: little, so that what is sent shows
FLOATS = 4  # of a message for each channel, and of its first row
TIMEOUT = 240  # seconds for all measurements of one number of ranks


# ---- The model -----------------------------------------------------------------------------------


def forward_bytes(channels: int) -> int:
    """Bytes that a rank sends in the forward pass: a header row, then (count, mean, tail, m2)."""
    return 4 * FLOATS * (1 + channels)


def backward_bytes(channels: int) -> int:
    """Bytes that a rank sends in the backward pass: the gradients of mean and var."""
    return 4 * 2 * channels


@dataclass(frozen=True)
class Network:
    """The link between neighbours in the ring."""

    latency: float  # seconds of a step
    per_byte: float  # seconds

    def gather(self, ranks: int, size: int) -> float:
        """Seconds: in each of p - 1 steps a rank forwards the part of one rank."""
        return (ranks - 1) * (self.latency + size * self.per_byte)

    def sum(self, ranks: int, size: int) -> float:
        """Seconds: p - 1 steps to add up the p parts of an array, p - 1 to pass on the sums."""
        return 2 * (ranks - 1) * (self.latency + size / ranks * self.per_byte)

    def layer(self, ranks: int, channels: int) -> float:
        """Seconds of the forward and the backward pass."""
        forward = self.gather(ranks, forward_bytes(channels))
        return forward + self.sum(ranks, backward_bytes(channels))


@dataclass(frozen=True)
class Collective:
    """A measurement."""

    kind: str  # "gather" or "sum"
    ranks: int
    bytes: int  # of a rank
    milliseconds: float


def fit(measured: Sequence[Collective]) -> Network:
    """The network with the least squares of relative errors in its times."""
    units = (Network(1.0, 0.0), Network(0.0, 1.0))
    of_units = [[getattr(u, c.kind)(c.ranks, c.bytes) for u in units] for c in measured]
    seconds = np.array([c.milliseconds / 1e3 for c in measured])
    relative = np.array(of_units) / seconds[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(relative, np.ones(len(measured)), rcond=None)
    return Network(max(float(latency), 0.0), max(float(per_byte), 0.0))


# ---- Measurements of one rank --------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A measurement: one layer, forward and backward."""

    name: str
    ranks: int
    channels: int
    milliseconds: float


@dataclass(frozen=True)
class Measured:
    """Everything, as it is written to JSON."""

    environment: Environment
    layers: list[Layer]
    collectives: list[Collective]


def median(step: Run, rounds: int) -> float:
    """Milliseconds, without the first round. All ranks must run the same number of rounds."""
    return statistics.median([milliseconds(step) for _ in range(rounds + 1)][1:])


def layer_step(layer: mw.BatchNorm, x: mx.array, g: mx.array) -> Run:
    def step() -> list[mx.array]:
        y, gradients = mx.vjp(lambda x: [layer(x)], [x], [g])
        return [*y, *gradients, layer.running_mean, layer.running_var]

    return step


def measure_layers(rounds: int) -> Iterator[Layer]:
    ranks = mx.distributed.init().size()
    for channels in CHANNELS:
        x, g = mx.random.normal((2, ROWS, channels))
        mx.eval(x, g)
        for kind in (mw.BatchNorm, mw.SyncBatchNorm):
            time = median(layer_step(kind(channels), x, g), rounds)
            yield Layer(kind.__name__, ranks, channels, time)


def step_of(collective: Callable[[mx.array], mx.array], a: mx.array) -> list[mx.array]:
    return [collective(a)]


def measure_collectives(rounds: int) -> Iterator[Collective]:
    ranks = mx.distributed.init().size()
    kinds: dict[str, Callable[[mx.array], mx.array]] = {
        "gather": lambda a: mx.distributed.all_gather(a),
        "sum": lambda a: mx.distributed.all_sum(a),
    }
    for size in (1 << 8, 1 << 11, 1 << 14, 1 << 17, 1 << 20):
        a = mx.zeros((size // 4,))
        mx.eval(a)
        for kind, collective in kinds.items():
            if ranks > 1:
                yield Collective(kind, ranks, size, median(partial(step_of, collective, a), rounds))


def measure_rank(rounds: int, file: Path) -> None:
    """Under mlx.launch; rank 0 writes."""
    mx.random.seed(0)
    found = Measured(environment(), list(measure_layers(rounds)), list(measure_collectives(rounds)))
    if mx.distributed.init().rank() == 0:
        file.write_text(json.dumps(asdict(found)))


# ---- All of them ---------------------------------------------------------------------------------


def load(text: str) -> Measured:
    found = json.loads(text)
    return Measured(
        found["environment"],
        [Layer(**row) for row in found["layers"]],
        [Collective(**row) for row in found["collectives"]],
    )


def run_ranks(ranks: int, rounds: int) -> Measured:
    """Measures in processes of their own."""
    with tempfile.TemporaryDirectory() as folder, quiet_input() as nothing:
        file = Path(folder) / "measured.json"
        own = [sys.executable, "-m", "bench.distributed"]
        own += ["--rounds", str(rounds), "--rank-to", str(file)]
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", str(ranks)]
        launch += ["--backend", "ring", "--starting-port", str(port), "--"]
        done = subprocess.run(
            own if ranks == 1 else [*launch, *own],
            env={"MLX_WELFORD_NUM_THREADS": "1", **os.environ},  # they share one machine's cores
            stdin=nothing,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        if not file.exists():  # mlx.launch ends with status 0 whatever happens
            raise RuntimeError(f"{ranks} processes measured nothing.\n{done.stderr}")
        return load(file.read_text())


@contextmanager
def quiet_input() -> Iterator[int]:
    """A standard input that stays open and empty: at its end mlx.launch would spin on a core."""
    read, write = os.pipe()
    try:
        yield read
    finally:
        os.close(read)
        os.close(write)


def measure_all(rounds: int) -> Measured:
    parts = [run_ranks(ranks, rounds) for ranks in RANKS]
    return Measured(
        parts[0].environment,
        [layer for part in parts for layer in part.layers],
        [collective for part in parts for collective in part.collectives],
    )


# ---- Report --------------------------------------------------------------------------------------


def curves(layers: Sequence[Layer]) -> dict[str, dict[int, float]]:
    """Milliseconds by channels, of BatchNorm in one process, and of SyncBatchNorm in several."""
    found: dict[str, dict[int, float]] = {}
    for layer in layers:
        if layer.name == "BatchNorm" and layer.ranks > 1:
            continue
        label = layer.name if layer.name == "BatchNorm" else f"{layer.name}, {layer.ranks}"
        found.setdefault(label, {})[layer.channels] = layer.milliseconds
    return found


def table(measured: Measured, network: Network) -> str:
    lines = [f"milliseconds of one layer, forward and backward, {ROWS} rows on each rank"]
    lines.append(f"{'channels':24}" + "".join(f"{c:>10}" for c in CHANNELS))
    for label, row in curves(measured.layers).items():
        lines.append(f"{label:24}" + "".join(f"{row[c]:10.3f}" for c in CHANNELS))
    lines.append("")
    lines.append(
        f"model: latency {1e6 * network.latency:.1f} us, {1e-9 / network.per_byte:.2f} GB/s"
        if network.per_byte > 0
        else f"model: latency {1e6 * network.latency:.1f} us, bytes at no cost"
    )
    lines.append(f"{'ranks':24}" + "".join(f"{c:>10}" for c in CHANNELS))
    for ranks in MODELLED_RANKS:
        costs = "".join(f"{1e3 * network.layer(ranks, c):10.3f}" for c in CHANNELS)
        lines.append(f"{ranks:<24}{costs}")
    return "\n".join(lines)


def plot(measured: Measured, network: Network, source: str, file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "distributed", "font.size": 8})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for label, row in curves(measured.layers).items():
        style = "k--" if label == "BatchNorm" else "o-"
        left.loglog(list(row), list(row.values()), style, label=label, markersize=3)
    left.set_title(
        f"measured: {measured.environment['cpu']}, {measured.environment['cores']} cores"
    )
    left.set_xlabel("channels")
    left.set_ylabel("ms per layer, forward and backward")
    left.set_ylim(bottom=0.01)  # room for the legend
    left.legend(fontsize=7, loc="lower right")
    for channels in CHANNELS:
        costs = [1e3 * network.layer(ranks, channels) for ranks in MODELLED_RANKS]
        right.loglog(MODELLED_RANKS, costs, "-", label=f"{channels} channels")
    right.axvspan(64, 1024, color="0.93", zorder=0)
    right.set_title(f"model of what is added: {source}")
    right.set_xlabel("ranks in the group")
    right.set_ylabel("ms per layer, forward and backward")
    right.legend(fontsize=7)
    svg = file.suffix == ".svg"
    figure.savefig(file, metadata={"Date": None} if svg else None, dpi=110)
    plt.close(figure)
    if svg:
        lines = file.read_text(encoding="utf-8").splitlines()
        file.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured here")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="do not measure")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--latency", type=float, metavar="US", help="of another network")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="of another network")
    parser.add_argument("--rank-to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if (options.latency is None) != (options.bandwidth is None):
        parser.error("--latency and --bandwidth go together.")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if options.rank_to:
        measure_rank(options.rounds, options.rank_to)
        return 0
    source = options.source
    measured = load(source.read_text()) if source else measure_all(options.rounds)
    network, of = fit([c for c in measured.collectives if c.ranks == 2]), "loopback"
    if options.latency is not None:
        network, of = Network(options.latency / 1e6, 1e-9 / options.bandwidth), "another network"
    print(json.dumps(measured.environment))
    print(table(measured, network))
    if options.json:
        options.json.write_text(json.dumps(asdict(measured), indent=1) + "\n")
    if options.plot:
        plot(measured, network, f"{of}, {1e6 * network.latency:.0f} us a step", options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
