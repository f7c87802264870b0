"""Options that commands share."""

import argparse


def add_layer_options(parser: argparse.ArgumentParser, about_shape: str) -> None:
    """A layer and its input: shape, layer, groups, interleaved and axis."""
    parser.add_argument("--shape", type=_shape, metavar="N,...", help=about_shape)
    parser.add_argument("--layer", choices=("batch", "instance", "group"), default="batch")
    parser.add_argument("--groups", type=int, default=0, help="number of groups of such a layer")
    parser.add_argument(
        "--interleaved", action="store_true", help="groups in MLX's own order, not in torch's"
    )
    parser.add_argument("--axis", type=int, default=-1, help="channel axis (default: -1)")


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
