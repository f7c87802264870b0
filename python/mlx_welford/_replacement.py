"""All that swaps layers of a model: accelerate, restore and convert_sync_batchnorm.

A layer stays the same object and changes its class, so that whatever holds it goes on with it.
"""

import warnings
from dataclasses import fields

import mlx.core as mx
import mlx.nn as nn
from mlx.nn import Module

from mlx_welford._arguments import check_eps, check_momentum, set_missing_options
from mlx_welford._distributed import Group, SyncBatchNorm
from mlx_welford._layers import (
    _COUNTER,
    _VECTORS,
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    _Normalization,
)
from mlx_welford._text import table

__all__ = ["SYNCHRONIZED", "accelerate", "convert_sync_batchnorm", "restore"]

_FAST: dict[type[Module], type[_Normalization]] = {
    nn.BatchNorm: BatchNorm,
    nn.InstanceNorm: InstanceNorm,
    nn.GroupNorm: GroupNorm,
}

SYNCHRONIZED: dict[type[Module], type[SyncBatchNorm]] = {
    nn.BatchNorm: SyncBatchNorm,
    BatchNorm: SyncBatchNorm,
}
"""What convert_sync_batchnorm makes of layers of exactly these classes."""


def accelerate(model: Module, *, verbose: bool = False) -> Module:
    """Turns ``BatchNorm``, ``InstanceNorm`` and ``GroupNorm`` of ``mlx.nn`` into this package's.

    A layer stays the same object and gets another class, which computes faster. So its parameters
    and attributes, what is frozen, and its mode stay. Whatever holds the layer (an optimizer, a
    function made by ``nn.utils.checkpoint``, another model) goes on with it. It is still an
    instance of its class in ``mlx.nn``.

    Left as they are: subclasses, which may compute something else, layers with settings or arrays
    that this package refuses, and all other layers. A second call changes nothing. Functions that
    ``mx.compile`` traced before keep mlx.nn's operations.

    Args:
        model: The model, or a single layer.
        verbose: Whether to print a table of the normalisation layers: what each was, and what it
            is now or why it was left as it was. Default: ``False``.

    Returns:
        ``model``.

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
    for path, layer in _named_layers(model):
        if not isinstance(layer, tuple(_FAST)) or isinstance(layer, _Normalization):
            continue
        kind = type(layer)
        if kind not in _FAST:
            namesake = next(k.__name__ for k in _FAST if isinstance(layer, k))
            was = f"{kind.__name__}, a subclass of mlx.nn.{namesake}"
            now = "as it was: a subclass may compute something else"
        else:
            names = ("num_groups", "num_features", "dims")
            sizes = ", ".join(str(vars(layer)[name]) for name in names if name in vars(layer))
            was = f"mlx.nn.{kind.__name__}({sizes})"
            if (error := _refusal(layer)) is not None:
                now = f"as it was: {error}"
            else:
                _change_class(layer, _FAST[kind])
                now = f"mlx_welford.{kind.__name__}"
        rows.append((path, was, now))
    if verbose:
        print(table([("layer", "was", "now"), *rows]) if rows else "No layer to replace.")
    return model


def restore(model: Module) -> Module:
    """Undoes :func:`accelerate`: the layers get their classes in ``mlx.nn`` back.

    They stay the same objects and keep their present parameters, frozen names, mode and attributes,
    so that training can go on.

    Args:
        model: The model, or a single layer.

    Returns:
        ``model``.

    Examples:
        >>> import mlx.nn as nn
        >>> import mlx_welford as mw
        >>> mw.restore(mw.accelerate(nn.Sequential(nn.BatchNorm(4))))
        Sequential(
          (layers.0): BatchNorm(4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
        )
    """
    for _, layer in _named_layers(model):
        if isinstance(layer, _Normalization) and layer._accelerated is not None:
            frozen = layer._no_grad  # with the running statistics; mlx.nn adds them only once
            original, settings = layer._accelerated
            if layer.momentum is None:  # and a counter: mlx.nn has neither
                if "momentum" in settings:
                    layer.momentum = settings["momentum"]
                layer.pop(_COUNTER, None)
                frozen.discard(_COUNTER)
            added = {option.name for option in fields(layer)} - settings.keys()
            for name in ("_accelerated", *added):
                vars(layer).pop(name, None)
                layer.pop(name, None)
            layer.__class__ = original  # type: ignore[assignment]
    return model


def convert_sync_batchnorm(model: Module, group: Group | None = None) -> Module:
    """Makes every batch normalisation of a model use the statistics of all processes.

    ``mlx.nn.BatchNorm`` and :class:`BatchNorm` become :class:`SyncBatchNorm`, the classes of
    ``mlx_welford.compat.torch`` become its ``SyncBatchNorm``. As with :func:`accelerate` the layers
    stay the same objects, and :func:`restore` undoes it for layers of ``mlx.nn``. Synchronised
    layers stay as they are. After an error no layer has changed.

    Args:
        model: The model, or a single layer.
        group: The processes that share a batch. Default: ``None``, all there are.

    Returns:
        ``model``.

    Raises:
        ValueError: If a layer of ``mlx.nn`` has arguments or arrays that these layers refuse.

    Warns:
        UserWarning: Names the layers that still use the statistics of one process: subclasses of
            batch normalisation, which may compute something else, and instance normalisation with
            running statistics.

    Examples:
        >>> import mlx.nn as nn
        >>> import mlx_welford as mw
        >>> mw.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), mw.BatchNorm(4)))
        Sequential(
          (layers.0): Linear(input_dims=3, output_dims=4, bias=True)
          (layers.1): SyncBatchNorm(4, eps=1e-05, momentum=0.1, affine=True, \
track_running_stats=True)
        )
    """
    chosen: list[tuple[Module, type[SyncBatchNorm]]] = []
    left: list[str] = []
    for path, layer in _named_layers(model):
        kind = SYNCHRONIZED.get(type(layer))
        if kind is not None:
            if (error := _refusal(layer)) is not None:
                raise ValueError(f"{error} (layer '{path}'; no layer has been converted)")
            chosen.append((layer, kind))
        elif isinstance(layer, nn.BatchNorm) and not isinstance(layer, SyncBatchNorm):
            left.append(f"'{path}' ({type(layer).__name__}, a subclass)")
        elif isinstance(layer, InstanceNorm) and layer.track_running_stats:
            left.append(f"'{path}' ({type(layer).__name__} with running statistics)")
    for layer, kind in chosen:
        _change_class(layer, kind)
        layer.group = group
    if left:
        warnings.warn(
            "convert_sync_batchnorm: these layers keep statistics of each process alone: "
            + ", ".join(left),
            stacklevel=2,
        )
    return model


def _named_layers(model: Module) -> list[tuple[str, Module]]:
    """All modules of a model with a path, each once, in the order of the tree."""
    once = {id(module): (path, module) for path, module in model.named_modules()}
    return list(reversed(once.values()))


def _refusal(layer: Module) -> ValueError | None:
    """The error if a layer's settings or arrays are not allowed in this package, else None."""
    if isinstance(layer, _Normalization):
        return None
    name = type(layer).__name__
    try:
        check_eps(layer.eps, name)
        check_momentum(getattr(layer, "momentum", None), name)
    except ValueError as error:
        return error
    vectors = {v: layer[v] for v in _VECTORS if v in layer}
    sizes = {a.size for a in vectors.values()}
    for vector, a in vectors.items():
        if a.ndim != 1 or len(sizes) > 1 or not mx.issubdtype(a.dtype, mx.floating):
            return ValueError(
                f"[{name}] '{vector}' must be a floating-point vector with a value per channel "
                f"but has shape {a.shape} and dtype {a.dtype}."
            )
    return None


def _change_class(layer: Module, kind: type[_Normalization]) -> None:
    """Gives a layer another class and its options, and records what restore() needs."""
    original = type(layer)
    layer.__class__ = kind
    if not issubclass(original, _Normalization):
        names = [option.name for option in fields(kind)]
        settings = {n: getattr(layer, n) for n in names if n in vars(layer) or n in layer}
        # Not setattr: Module would take a tuple for parameters.
        vars(layer)["_accelerated"] = (original, settings)
    set_missing_options(layer)
