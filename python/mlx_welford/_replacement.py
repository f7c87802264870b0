"""All that swaps layers of a model: accelerate, restore, fuse_block and convert_sync_batchnorm.

A layer stays the same object and changes its class, so that whatever holds it goes on with it.
"""

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn import Module

from mlx_welford._arguments import check_eps, check_momentum, set_missing_options
from mlx_welford._blocks import Make, calls, given_back, replace_blocks, swap
from mlx_welford._distributed import Group, SyncBatchNorm
from mlx_welford._fusing import (
    Identity,
    Row,
    epilogue_of,
    fuse_sequentials,
    is_ours,
    named_layers,
    takes_bias,
    unfused,
)
from mlx_welford._input_bias import CONVOLUTIONS
from mlx_welford._layers import (
    _COUNTER,
    _VECTORS,
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    _Normalization,
)
from mlx_welford._text import table

__all__ = ["SYNCHRONIZED", "accelerate", "convert_sync_batchnorm", "fuse_block", "restore"]

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


def accelerate(
    model: Module,
    *,
    fuse: bool = False,
    also: Mapping[type[Module], Make] | None = None,
    verbose: bool = False,
) -> Module:
    """Turns ``BatchNorm``, ``InstanceNorm`` and ``GroupNorm`` of ``mlx.nn`` into this package's.

    A layer stays the same object and gets another class, which computes faster. So its parameters
    and attributes, what is frozen, and its mode stay. Whatever holds the layer (an optimizer, a
    function made by ``nn.utils.checkpoint``, another model) goes on with it. It is still an
    instance of its class in ``mlx.nn``.

    Left as they are: subclasses, which may compute something else, layers with settings or arrays
    that this package refuses, and all other layers. A second call changes nothing. Functions that
    ``mx.compile`` traced before keep mlx.nn's operations.

    With ``fuse=True``, what follows one another in an ``nn.Sequential`` becomes one layer, also in
    nested ones. An activation behind a normalisation becomes an option of it, and an
    ``nn.Identity`` keeps its place, so that names and indices of parameters stay. A convolution
    before a ``BatchNorm`` or an ``InstanceNorm`` no longer adds its bias, which the normalisation
    takes as a shift of the mean. The bias stays a parameter of the convolution. For other models,
    ``also`` says what their blocks compute (docs/fusing.md).

    Args:
        model: The model, or a single layer.
        fuse: Whether to fuse. Default: ``False``.
        also: Functions for blocks of other classes: ``{Block: make}`` calls ``make(block)`` for
            every module whose class is ``Block``. It returns the same block, edited, another module
            to put in its place, or ``None`` to leave it. :func:`fuse_block` is such a function.
            Default: ``None``.
        verbose: Whether to print a table of the layers concerned: what each was, and what it is now
            or why it was left as it was. Default: ``False``.

    Returns:
        ``model``, unless ``also`` replaces the model itself.

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
    root: list[Any] = [model]
    rows = _change_classes(model)
    if also:
        rows += replace_blocks(root, also)
        rows += _change_classes(root[0])
    if fuse:
        rows += fuse_sequentials(root[0])
    if verbose:
        print(table([("layer", "was", "now"), *rows]) if rows else "No layer to replace.")
    changed: Module = root[0]
    return changed


def _change_classes(model: Module) -> list[Row]:
    """Turns layers of mlx.nn into this package's, and returns a row of the table for each."""
    rows: list[Row] = []
    for path, layer in named_layers(model):
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
    return rows


def restore(model: Module) -> Module:
    """Undoes :func:`accelerate`: the layers get their classes in ``mlx.nn`` back.

    They stay the same objects and keep their present parameters, frozen names, mode and attributes,
    so that training can go on. Activations and blocks that were fused, edited or replaced get their
    places and attributes back.

    Args:
        model: The model, or a single layer.

    Returns:
        ``model``, or what it was before ``also`` replaced it.

    Examples:
        >>> import mlx.nn as nn
        >>> import mlx_welford as mw
        >>> mw.restore(mw.accelerate(nn.Sequential(nn.BatchNorm(4))))
        Sequential(
          (layers.0): BatchNorm(4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
        )
    """
    root: list[Any] = [model]
    swap(root, unfused, inner_first=True)
    swap(root, given_back, inner_first=True)
    model = root[0]
    for _, layer in named_layers(model):
        if isinstance(layer, _Normalization) and layer._accelerated is not None:
            frozen = layer._no_grad  # with the running statistics; mlx.nn adds them only once
            original, settings = layer._accelerated
            if layer.momentum is None:  # an average with a counter; mlx.nn has neither
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


def fuse_block(
    block: Module, norm: str = "bn", activation: str | None = "act", convolution: str = "conv"
) -> Module | None:
    """Fuses a block that computes ``self.act(self.bn(self.conv(x)))``, or a part of that.

    The normalisation takes the activation, whose attribute becomes an ``nn.Identity``. It also
    takes the bias of the convolution, if there is one. Only the code of the block shows what it
    computes, so you must know: the activation must get the result of the normalisation, and nothing
    else may get it. For :func:`accelerate`: ``also={Block: mw.fuse_block}``, with other names
    ``also={Block: functools.partial(mw.fuse_block, norm="norm")}``.

    Args:
        block: The block. :func:`restore` undoes what becomes of it.
        norm: The attribute with the normalisation, of ``mlx.nn`` or of this package.
        activation: The attribute with the activation, a module or a function. ``None`` hands over
            the bias alone.
        convolution: The attribute with the convolution; one that the block does not have is
            ignored.

    Returns:
        The block. ``None`` if there is nothing to fuse, for instance because no layer computes this
        activation.

    Raises:
        ValueError: If the block has no such normalisation or activation, calls one of them in
            several places, or has the same normalisation as two attributes.

    Examples:
        >>> import mlx.nn as nn
        >>> import mlx_welford as mw
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm(8), nn.SiLU()
        ...
        ...     def __call__(self, x):
        ...         return self.act(self.bn(self.conv(x)))
        >>> block = mw.fuse_block(Block())
        >>> block.bn.activation, block.act
        ('silu', Identity())
    """
    kind = type(block).__name__
    for name in filter(None, (norm, activation)):
        if not hasattr(block, name):
            raise ValueError(f"[fuse_block] {kind} has no attribute '{name}'.")
        if calls(block, name) > 1:
            raise ValueError(f"[fuse_block] {kind} calls '{name}' in several places.")
    layer: Any = getattr(block, norm)
    before: Any = getattr(block, convolution, None)
    others = [name for name, value in block.items() if value is layer and name != norm]
    if others:
        raise ValueError(f"[fuse_block] '{norm}' and '{others[0]}' of {kind} are one layer.")
    function = activation and getattr(block, activation)
    epilogue = epilogue_of(function)
    hands_over = type(before) in CONVOLUTIONS and "bias" in before
    if isinstance(layer, Module) and (epilogue is not None or hands_over):
        _change_classes(layer)
    if not is_ours(layer):
        return None
    hands_over = hands_over and takes_bias(layer)
    epilogue = epilogue if layer.activation is None else None
    if activation is not None and epilogue is not None:
        setattr(block, activation, Identity(function, layer, epilogue))
    if hands_over:
        before.__class__ = CONVOLUTIONS[type(before)]
    return block if epilogue is not None or hands_over else None


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
    for path, layer in named_layers(model):
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
