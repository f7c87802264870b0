"""The layers of a model that mlx.nn made, replaced by these, and back."""

from collections.abc import Callable
from typing import Any

import mlx.nn as nn
from mlx.nn import Module

from mlx_welford._text import table
from mlx_welford.layers import BatchNorm, InstanceNorm, _Normalization

__all__ = ["accelerate", "restore"]


def accelerate(model: Module, *, verbose: bool = False) -> Module:
    """Replaces every ``mlx.nn.BatchNorm`` and ``mlx.nn.InstanceNorm`` of a model by the one here.

    In place, wherever modules can be: attributes, lists and dictionaries. A layer's successor has
    the same arrays as parameters, under the same names, the same frozen ones among them, and is in
    the same mode; a layer that is in two places has one successor. Subclasses are left alone, since
    they may do something else, and so is everything else, so that a second call changes nothing.
    Functions that ``mx.compile`` traced before keep the old layers.

    Args:
        model: The model, or a single layer.
        verbose: Whether to print a table of what was replaced. Default: ``False``.

    Returns:
        ``model``; if that is itself a layer to be replaced, its successor.

    Examples:
        >>> import mlx.nn as nn
        >>> import mlx_welford as mw
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm(4))
        >>> mw.accelerate(model, verbose=True)
        layer     was                  now
        layers.1  mlx.nn.BatchNorm(4)  mlx_welford.BatchNorm
        Sequential(
          (layers.0): Linear(input_dims=3, output_dims=4, bias=True)
          (layers.1): BatchNorm(4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, \
accelerated=True)
        )
    """
    rows: list[tuple[str, str, str]] = []

    def successor(path: str, layer: Module) -> Module:
        if type(layer) is not nn.BatchNorm and type(layer) is not nn.InstanceNorm:
            return layer
        channels = layer.num_features if type(layer) is nn.BatchNorm else layer.dims
        was = f"mlx.nn.{type(layer).__name__}({channels})"
        try:
            new = _successor(layer)
        except ValueError as error:  # arguments that mlx.nn takes and these layers refuse
            rows.append((path, was, f"as it was: {error}"))
            return layer
        rows.append((path, was, f"mlx_welford.{type(new).__name__}"))
        return new

    model = _replace(model, successor)
    if verbose:
        print(table([("layer", "was", "now"), *rows]) if rows else "No layer to replace.")
    return model


def restore(model: Module) -> Module:
    """Undoes :func:`accelerate`: the layers that it replaced are there again.

    The very same objects, with the parameters, frozen names and mode that their successors have
    now, so that training goes on where it was.

    Args:
        model: The model, or a single layer.

    Returns:
        ``model``; if that is itself a successor, the layer that it replaced.

    Examples:
        >>> import mlx.nn as nn
        >>> import mlx_welford as mw
        >>> mw.restore(mw.accelerate(nn.Sequential(nn.BatchNorm(4))))
        Sequential(
          (layers.0): BatchNorm(4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
        )
    """

    def predecessor(path: str, layer: Module) -> Module:
        if not isinstance(layer, _Normalization) or layer._replaced is None:
            return layer
        old = layer._replaced
        _hand_over(layer, old)
        dict.pop(old, "num_batches_tracked", None)  # of momentum=None, which mlx.nn does not have
        old._no_grad.discard("num_batches_tracked")
        return old

    return _replace(model, predecessor)


_SETTINGS = ("eps", "momentum", "track_running_stats")


def _successor(layer: Module) -> _Normalization:
    """This package's layer, in the state of one of mlx.nn's."""
    new: _Normalization
    if isinstance(layer, nn.BatchNorm):
        new = BatchNorm(
            layer.num_features,
            layer.eps,
            layer.momentum,
            "weight" in layer,
            layer.track_running_stats,
        )
    else:
        new = InstanceNorm(layer.dims, layer.eps, "weight" in layer)
    for name, value in vars(layer).items():  # what users hang on a layer
        if name not in vars(new) and not hasattr(type(new), name):
            object.__setattr__(new, name, value)
    _hand_over(layer, new)
    # Not by assignment, which would make it a child with parameters of its own.
    object.__setattr__(new, "_replaced", layer)
    return new


def _hand_over(source: Module, target: Module) -> None:
    """Arrays, which of them are frozen, mode and settings; the same objects, nothing copied."""
    dict.clear(target)
    dict.update(target, source)
    target._no_grad = set(source._no_grad)
    target._training = source._training
    for name in _SETTINGS:
        value = vars(source).get(name)
        if value is not None and name in vars(target):
            object.__setattr__(target, name, value)


def _replace(model: Module, new: Callable[[str, Module], Module]) -> Module:
    """Puts new(path, module) in the place of every module; each module is asked about once."""
    done: dict[int, tuple[Module, Module]] = {}  # by id, kept alive so that ids stay theirs
    seen: set[int] = set()

    def replaced(path: str, module: Module) -> Module:
        if id(module) not in done:
            done[id(module)] = (module, new(path, module))
        return done[id(module)][1]

    def visit(container: Any, path: str) -> None:
        if id(container) in seen:
            return
        seen.add(id(container))
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in list(pairs):
            where = f"{path}.{key}" if path else str(key)
            if isinstance(value, Module):
                value = replaced(where, value)
                if value is not container[key]:
                    container[key] = value
            if isinstance(value, (dict, list)):
                visit(value, where)

    model = replaced("", model)
    visit(model, "")
    return model
