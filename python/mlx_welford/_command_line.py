"""Options that commands share."""

import argparse

from mlx_welford._operations import operations


def add_layer_options(parser: argparse.ArgumentParser, about_shape: str) -> None:
    """A layer, its input, and what follows it."""
    parser.add_argument("--shape", type=_shape, metavar="N,...", help=about_shape)
    parser.add_argument("--layer", choices=("batch", "instance", "group"), default="batch")
    parser.add_argument("--groups", type=int, default=0, help="number of groups of such a layer")
    parser.add_argument(
        "--interleaved", action="store_true", help="groups in MLX's own order, not in torch's"
    )
    parser.add_argument("--axis", type=int, default=-1, help="channel axis (default: -1)")
    parser.add_argument(
        "--affine",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with weight and bias (default), or without",
    )
    parser.add_argument(
        "--activation", choices=operations.activations(), help="activation after the layer"
    )
    parser.add_argument(
        "--residual", action="store_true", help="with a residual, added before the activation"
    )


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
