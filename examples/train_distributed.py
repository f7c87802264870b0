"""Train the network of train_digits.py on several processes, each with a shard of the batch.

    mlx.launch -n 2 --backend ring -- python examples/train_distributed.py

All processes start from the same weights and draw the same batches, and each takes its shard.
SyncBatchNorm normalises over the whole batch, and average_gradients combines the gradients. So the
losses are those of a single process, up to rounding, for any number of processes. Without
mlx.launch there is one process. `--local` uses BatchNorm on each shard instead, for comparison.

Prints test accuracy and whether all processes have the same parameters, to the bit. Exits with
status 1 if they do not, or if the accuracy with SyncBatchNorm is below 97 %.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_welford as mw
import numpy as np
from mlx.utils import tree_flatten
from train_digits import LEAST_ACCURACY, Digits, ResNet, accuracy, load, loss


def train(
    model: nn.Module, digits: Digits, group: mx.distributed.Group, options: argparse.Namespace
) -> list[float]:
    """Trains the model. Returns the loss of each step, averaged over the whole batch."""
    shuffle = np.random.default_rng(options.seed)
    steps = options.epochs * (len(digits.labels) // options.batch_size)
    optimizer = optim.SGD(optim.cosine_decay(0.1, steps), momentum=0.9, weight_decay=5e-4)
    loss_and_grad = nn.value_and_grad(model, loss)
    mine = slice(group.rank(), None, group.size())
    losses: list[Any] = []
    model.train()
    for _ in range(options.epochs):
        for images, labels in digits.batches(options.batch_size, shuffle):
            value, grads = loss_and_grad(model, images[mine], labels[mine])
            optimizer.update(model, nn.average_gradients(grads, group))
            value = mx.distributed.all_sum(value, group=group) / group.size()
            mx.eval(value, model.state, optimizer.state)
            losses.append(value.item())
    return losses


def same_everywhere(model: nn.Module, group: mx.distributed.Group) -> bool:
    """True if parameters and running statistics are the same bits on all processes."""
    arrays = dict(tree_flatten(model.parameters())).values()
    flat = mx.concatenate([a.reshape(-1) for a in arrays])
    of_all = mx.distributed.all_gather(flat.view(mx.uint32)[None], group=group)
    return bool(mx.all(of_all == of_all[:1]).item())


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--width", type=int, default=12, help="channels of the first stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local", action="store_true", help="statistics of each process's own")
    options = parser.parse_args(argv)
    size = mx.distributed.init().size()
    if options.batch_size % size != 0:  # the mean over processes must be that of the batch
        parser.error(f"--batch-size must be a multiple of {size}, the number of processes.")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    group = mx.distributed.init()
    training, test = load()
    mx.random.seed(options.seed)
    model = ResNet(mw.BatchNorm, options.width)
    if not options.local:
        mw.convert_sync_batchnorm(model)

    losses = train(model, training, group, options)
    same = same_everywhere(model, group)
    reached = accuracy(model, test)
    if group.rank() == 0:
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
