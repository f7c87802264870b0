"""The layers of a model that mlx.nn made, turned into these, and back."""

import mlx.core as mx
import mlx.nn as nn
from mlx.nn import Module

from mlx_welford._arguments import check_eps, check_momentum
from mlx_welford._layers import _COUNTER, _VECTORS, BatchNorm, InstanceNorm, _Normalization
from mlx_welford._text import table

__all__ = ["accelerate", "restore"]

_OURS: dict[type[Module], type[_Normalization]] = {
    nn.BatchNorm: BatchNorm,
    nn.InstanceNorm: InstanceNorm,
}


def accelerate(model: Module, *, verbose: bool = False) -> Module:
    """Turns every ``mlx.nn.BatchNorm`` and ``mlx.nn.InstanceNorm`` of a model into the one here.

    The layers stay the same objects, of another class that computes faster: their parameters, which
    of these are frozen, their mode and whatever else hangs on them stay, and so does all that holds
    them (an optimizer, a function made by ``nn.utils.checkpoint``, another model). They still are
    instances of ``mlx.nn.BatchNorm`` and ``mlx.nn.InstanceNorm``. Subclasses are left alone, since
    they may do something else, and so are layers with settings or arrays that these layers refuse,
    and everything else, so that a second call changes nothing. Functions that ``mx.compile`` traced
    before go on with mlx.nn's operations.

    Args:
        model: The model, or a single layer.
        verbose: Whether to print a table of the layers, what became of each, and why those that
            stay as they were do. Default: ``False``.

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
    for path, layer in named_layers(model):
        if not isinstance(layer, tuple(_OURS)) or isinstance(layer, _Normalization):
            continue
        kind = type(layer)
        if kind not in _OURS:
            was = f"{kind.__name__}, a subclass of mlx.nn.{_namesake(layer).__name__}"
            rows.append((path, was, "as it was: a subclass may compute something else"))
            continue
        channels = layer.num_features if kind is nn.BatchNorm else layer.dims
        was = f"mlx.nn.{kind.__name__}({channels})"
        try:
            become_ours(layer)
        except ValueError as error:
            rows.append((path, was, f"as it was: {error}"))
        else:
            rows.append((path, was, f"mlx_welford.{kind.__name__}"))
    if verbose:
        print(table([("layer", "was", "now"), *rows]) if rows else "No layer to replace.")
    return model


def restore(model: Module) -> Module:
    """Undoes :func:`accelerate`: its layers are of their classes in ``mlx.nn`` again.

    The same objects, with the parameters, frozen names, mode and attributes that they have now, so
    that training goes on where it was.

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
    for _, layer in named_layers(model):
        if isinstance(layer, _Normalization) and layer._accelerated is not None:
            frozen = layer._no_grad  # with the running statistics, which mlx.nn only adds once
            original, momentum = layer._accelerated
            if layer.momentum is None:  # and its counter, neither of which mlx.nn has
                layer.momentum = momentum
                layer.pop(_COUNTER, None)
                frozen.discard(_COUNTER)
            for name in ("_accelerated", "group"):
                vars(layer).pop(name, None)
            layer.__class__ = original  # type: ignore[assignment]
    return model


def named_layers(model: Module) -> list[tuple[str, Module]]:
    """All modules of a model with one of their paths, each once, in the order of the tree."""
    once = {id(module): (path, module) for path, module in model.named_modules()}
    return list(reversed(once.values()))


def refusal(layer: Module) -> ValueError | None:
    """Why a layer of mlx.nn cannot become one of these, which take less; None if it can."""
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


def become_ours(layer: Module) -> None:
    """Makes a layer of mlx.nn one of these, the same object.

    Raises:
        ValueError: If these layers refuse its settings or arrays; nothing has changed then.
    """
    if (error := refusal(layer)) is not None:
        raise error
    momentum = vars(layer).get("momentum")
    # Not by assignment through Module, which would take a tuple for parameters.
    vars(layer)["_accelerated"] = (type(layer), momentum)
    layer.__class__ = _OURS[type(layer)]


def _namesake(layer: Module) -> type[Module]:
    return next(kind for kind in _OURS if isinstance(layer, kind))
