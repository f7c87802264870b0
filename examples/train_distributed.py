"""Train the network of train_digits.py on several processes, each with a shard of the batch.

    mlx.launch -n 2 --backend ring -- python examples/train_distributed.py

All processes start from the same weights and draw the same batches, and each takes its shard.
SyncBatchNorm normalises over the whole batch, and average_gradients combines the gradients. So the
losses are those of a single process, up to rounding, for any number of processes. Without
mlx.launch there is one process. `--local` uses BatchNorm on each shard instead, for comparison.

Prints test accuracy and whether all processes have the same parameters, to the bit. Exits with
status 1 if they do not, or if the accuracy with SyncBatchNorm is below 97 %.

    python examples/train_distributed.py --output train_distributed.png

trains in one process, in two with SyncBatchNorm and in two with BatchNorm, compares times and
memory, and draws the losses.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_welford as mw
import numpy as np
from mlx.utils import tree_flatten
from rich.console import Console
from train_digits import (
    LEAST_ACCURACY,
    Digits,
    ResNet,
    Training,
    accuracy,
    load,
    loss,
    loss_difference,
    picture,
    table,
)

PROCESSES: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "two, SyncBatchNorm": (2, []),
    "two, BatchNorm": (2, ["--local"]),
}


def train(
    model: nn.Module,
    data: tuple[Digits, Digits],
    group: mx.distributed.Group,
    options: argparse.Namespace,
) -> Training:
    """Trains on the first of `data` and tests on the second. Losses are those of whole batches."""
    digits, test = data
    shuffle = np.random.default_rng(options.seed)
    steps = options.epochs * (len(digits.labels) // options.batch_size)
    optimizer = optim.SGD(optim.cosine_decay(0.1, steps), momentum=0.9, weight_decay=5e-4)
    loss_and_grad = nn.value_and_grad(model, loss)
    mine = slice(group.rank(), None, group.size())
    losses: list[Any] = []
    seconds, peaks = [], []
    model.train()
    for _ in range(options.epochs):
        for images, labels in digits.batches(options.batch_size, shuffle):
            mx.reset_peak_memory()
            start = time.perf_counter()
            value, grads = loss_and_grad(model, images[mine], labels[mine])
            optimizer.update(model, nn.average_gradients(grads, group))
            value = mx.distributed.all_sum(value, group=group) / group.size()
            mx.eval(value, model.state, optimizer.state)
            seconds.append(time.perf_counter() - start)
            peaks.append(mx.get_peak_memory())
            losses.append(value.item())
    return Training(
        accuracy=accuracy(model, test),
        losses=losses,
        step_ms=1e3 * statistics.median(seconds),
        peak_bytes=max(peaks),
    )


def same_everywhere(model: nn.Module, group: mx.distributed.Group) -> bool:
    """True if parameters and running statistics are the same bits on all processes."""
    arrays = dict(tree_flatten(model.parameters())).values()
    flat = mx.concatenate([a.reshape(-1) for a in arrays])
    of_all = mx.distributed.all_gather(flat.view(mx.uint32)[None], group=group)
    return bool(mx.all(of_all == of_all[:1]).item())


def compare(options: argparse.Namespace) -> dict[str, Training]:
    """The trainings of PROCESSES; time and memory are those of the first process."""
    shared = [
        f"--epochs={options.epochs}",
        f"--batch-size={options.batch_size}",
        f"--width={options.width}",
        f"--seed={options.seed}",
    ]
    launch = Path(sys.executable).with_name("mlx.launch")
    found = {}
    for name, (number, own) in PROCESSES.items():
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "training.json"
            command = [sys.executable, __file__, *shared, *own, "--json", str(report)]
            if number > 1:
                command = [str(launch), "-n", str(number), "--backend", "ring", "--", *command]
            # The status tells of the accuracy and the parameters; without a report all has failed.
            subprocess.run(command, check=False, stdin=subprocess.DEVNULL, stdout=sys.stderr)
            found[name] = Training(**json.loads(report.read_text(encoding="utf-8")))
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--width", type=int, default=12, help="channels of the first stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local", action="store_true", help="statistics of each process's own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="compare, and draw the loss curves here"
    )
    options = parser.parse_args(argv)
    size = mx.distributed.init().size()
    if options.batch_size % size != 0:  # the mean over processes must be that of the batch
        parser.error(f"--batch-size must be a multiple of {size}, the number of processes.")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if options.output:
        trainings = compare(options)
        console = Console()
        console.print(table(trainings))
        one, *others = trainings.items()
        for other in others:
            distance = loss_difference(dict([one, other]))
            console.print(f"{other[0]}: losses within {distance:.1g} of those of {one[0]}")
        picture(trainings).savefig(options.output)
        return 0
    group = mx.distributed.init()
    mx.random.seed(options.seed)
    model = ResNet(mw.BatchNorm, options.width)
    if not options.local:
        mw.convert_sync_batchnorm(model)

    training = train(model, load(), group, options)
    same = same_everywhere(model, group)
    losses, reached = training.losses, training.accuracy
    if group.rank() == 0:
        if options.json:
            options.json.write_text(json.dumps(asdict(training), indent=1) + "\n")
        print(f"processes                 {group.size()}")
        print(f"loss, first and last step {losses[0]:.6f} {losses[-1]:.6f}")
        print(f"test accuracy             {reached:.2%}")
        print(
            f"parameters                {'the same' if same else 'not the same'} on all processes"
        )
    good = reached >= LEAST_ACCURACY or options.local
    return 0 if same and good else 1


if __name__ == "__main__":
    raise SystemExit(main())
