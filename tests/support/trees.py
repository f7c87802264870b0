"""The arrays of a layer or a model by their full names."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def leaves(tree: object) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def parameters_of(layer: nn.Module) -> dict[str, mx.array]:
    return leaves(layer.parameters())


def trainable_of(layer: nn.Module) -> dict[str, mx.array]:
    return leaves(layer.trainable_parameters())
