"""Normalisations that take over what surrounds them: activations, and biases of convolutions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.nn import Module

from mlx_welford._input_bias import CONVOLUTIONS
from mlx_welford._layers import Epilogue, _Normalization
from mlx_welford._operations import operations

__all__ = [
    "Identity",
    "Row",
    "epilogue_of",
    "fuse_sequentials",
    "is_ours",
    "named_layers",
    "takes_bias",
    "unfused",
]

Row = tuple[str, str, str]
"""A row of the table that accelerate prints: path, what was there, what is there now."""

_MODULES: dict[type, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
_GELUS = {"none": "gelu", "precise": "gelu_approx", "tanh": "gelu_approx"}


def epilogue_of(activation: object) -> Epilogue | None:
    """The options of a layer that computes the same as this module or function, if there are any.

    Subclasses of a module may compute something else.
    """
    kind = type(activation)
    name = _MODULES.get(kind)
    if kind is nn.GELU:
        name = _GELUS.get(activation._approx)  # type: ignore[attr-defined]
    if kind is nn.LeakyReLU:
        return _leaky(activation._negative_slope)  # type: ignore[attr-defined]
    if isinstance(activation, partial) and activation.func is nn.leaky_relu:
        slope = activation.keywords.get("negative_slope")
        return _leaky(slope) if not activation.args and len(activation.keywords) == 1 else None
    for function in operations.activations():
        if activation is getattr(nn, function):
            name = function
    return None if name is None else {"activation": name}


def _leaky(slope: Any) -> Epilogue | None:
    if not isinstance(slope, int | float):
        return None
    return {"activation": "leaky_relu", "negative_slope": slope}


class Identity(nn.Identity):
    """Takes the place of an activation that a normalisation computes.

    If the normalisation no longer does so, for instance because it alone was restored, the
    activation is called here again.
    """

    def __init__(self, activation: Any, norm: Any, epilogue: Epilogue) -> None:
        super().__init__()
        # Not setattr: the two modules would become children of this one.
        vars(self).update(_activation=activation, _norm=norm, _slope=norm.negative_slope)
        if isinstance(activation, Module):
            self.train(activation.training)
        for option, value in epilogue.items():
            setattr(norm, option, value)

    def __call__(self, x: mx.array) -> mx.array:
        if getattr(self._norm, "activation", None) is not None:
            return x
        z: mx.array = self._activation(x)
        return z

    def undone(self) -> Any:
        """Takes the activation back from the normalisation, and returns it."""
        if isinstance(self._norm, _Normalization):
            self._norm.activation, self._norm.negative_slope = None, self._slope
        if isinstance(self._activation, Module):
            self._activation.train(self.training)
        return self._activation


def unfused(module: Module) -> Any:
    """What takes the place of a module when fusing is undone: mostly the module itself."""
    if isinstance(module, Identity):
        return module.undone()
    if type(module) in CONVOLUTIONS.values():
        module.__class__ = type(module)._namesake  # type: ignore[attr-defined]
    return module


def is_ours(layer: object) -> bool:
    """True for layers of this package. Subclasses of users may compute something else."""
    return isinstance(layer, _Normalization) and type(layer).__module__.startswith("mlx_welford.")


def takes_bias(norm: _Normalization) -> bool:
    """True if a normalisation takes the bias of a convolution before it as a shift of the mean."""
    return norm._channelwise and norm.axis == -1


def named_layers(model: Module) -> list[tuple[str, Module]]:
    """All modules of a model with a path, each once, in the order of the tree."""
    once = {id(module): (path, module) for path, module in model.named_modules()}
    return list(reversed(once.values()))


# ---- nn.Sequential -------------------------------------------------------------------------------


class _Step(NamedTuple):
    """A callable of an nn.Sequential."""

    path: str
    layers: list[Any]
    place: int

    @property
    def layer(self) -> Any:
        return self.layers[self.place]

    @property
    def kind(self) -> str:
        """Name of the callable, for the table."""
        layer = self.layer
        named = layer if hasattr(layer, "__name__") else type(layer)
        name = named.__name__
        return f"mlx.nn.{name}" if getattr(nn, name, None) is named else name


def fuse_sequentials(model: Module) -> list[Row]:
    """Fuses neighbours in every nn.Sequential of a model, and returns rows for the table.

    A nested nn.Sequential counts as part of the outer one, unless it is in several places.
    """
    uses = _uses(model)
    rows: list[Row] = []
    inner: set[int] = set()

    def steps(path: str, sequential: Any) -> Iterator[_Step]:
        for i, layer in enumerate(sequential.layers):
            step = _Step(f"{path}.layers.{i}".lstrip("."), sequential.layers, i)
            if _is_sequential(layer) and uses[id(layer)] == 1:
                inner.add(id(layer))
                yield from steps(step.path, layer)
            else:
                yield step

    outermost_first = sorted(named_layers(model), key=lambda pair: pair[0].count("."))
    for path, module in outermost_first:
        if _is_sequential(module) and id(module) not in inner:
            for first, second in pairwise(list(steps(path, module))):
                rows += _fuse_pair(first, second, uses)
        elif isinstance(module, nn.Sequential) and not _is_sequential(module):
            kind = f"{type(module).__name__}, a subclass of mlx.nn.Sequential"
            rows.append((path, kind, "as it was: its __call__ may do something else"))
    return rows


def _is_sequential(module: object) -> bool:
    """True for an nn.Sequential, also of a subclass, that calls its layers one after another."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).__call__ is nn.Sequential.__call__
        and isinstance(module.layers, list)
    )


def _uses(model: Module) -> Counter[int]:
    """Number of places of a model that hold each module, by id."""
    uses: Counter[int] = Counter()

    def visit(container: Any) -> None:
        values = container.values() if isinstance(container, dict) else container
        for value in values:
            if isinstance(value, Module):
                uses[id(value)] += 1
                if uses[id(value)] > 1:
                    continue
            if isinstance(value, dict | list | tuple):
                visit(value)

    visit([model])
    return uses


def _fuse_pair(first: _Step, second: _Step, uses: Counter[int]) -> list[Row]:
    """Fuses two callables. The second is called with the result of the first."""
    shared = [step.path for step in (first, second) if uses[id(step.layer)] > 1]
    convolution, norm, activation = first.layer, first.layer, second.layer
    if type(convolution) in CONVOLUTIONS and "bias" in convolution and is_ours(second.layer):
        kind = first.kind
        if not takes_bias(second.layer):
            now = f"as it was: its bias does not cancel in {second.path}"
        elif shared:
            now = f"as it was: {shared[0]} is in several places"
        else:
            convolution.__class__ = CONVOLUTIONS[type(convolution)]
            now = f"hands its bias to {second.path}"
        return [(first.path, kind, now)]
    if not is_ours(norm):
        return []
    kind = second.kind
    if (epilogue := epilogue_of(activation)) is None:
        if type(activation).__module__ != nn.ReLU.__module__:
            return []
        now = "as it was: no layer computes it"
    elif norm.activation is not None:
        now = f"as it was: {first.path} has an activation"
    elif first.path in shared:
        now = f"as it was: {first.path} is in several places"
    else:
        second.layers[second.place] = Identity(activation, norm, epilogue)
        now = f"computed by {first.path}"
    return [(second.path, kind, now)]
