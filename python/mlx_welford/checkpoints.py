"""Weights that other systems saved, for ``Module.load_weights``."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn import Module

__all__ = ["from_gluon", "from_torch"]

Weights = list[tuple[str, mx.array]]

_COUNTER = "num_batches_tracked"

_GLUON = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",  # the name of MXNet's symbols for the same
    "moving_var": "running_var",
}
_GLUON_ENDS = [*_GLUON, "running_mean", "running_var", "weight", "bias"]


def from_torch(state_dict: Mapping[str, Any], model: Module | None = None) -> Weights:
    """The weights of a ``torch`` state_dict, for ``Module.load_weights``.

    Normalisation layers have the same parameters under the same names in ``torch.nn``, ``mlx.nn``
    and here, except ``num_batches_tracked``, which is left out unless ``model`` has it (a layer
    with ``momentum=None``). Dtypes are kept.

    Args:
        state_dict: Arrays by name, of PyTorch, NumPy or MLX; so also what ``mx.load`` reads from a
            safetensors file.
        model: Where the weights shall go. With it the numbers within a ``mlx.nn.Sequential`` get
            the ``layers.`` before them that ``torch.nn.Sequential`` does not have, and the weights
            of convolutions get their channels last. Default: ``None``, only the names are known.

    Returns:
        Pairs of a name and an array.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> import mlx_welford as mw
        >>> model = nn.Sequential(mw.BatchNorm(2, affine=False))
        >>> state = {
        ...     "0.running_mean": mx.array([1.0, 2.0]),
        ...     "0.running_var": mx.array([3.0, 4.0]),
        ...     "0.num_batches_tracked": mx.array(7),
        ... }
        >>> weights = mw.from_torch(state, model)
        >>> [name for name, _ in weights]
        ['layers.0.running_mean', 'layers.0.running_var']
        >>> _ = model.load_weights(weights)
    """
    weights = []
    for name, value in state_dict.items():
        name, owner = _place(name, model)
        last = name.rpartition(".")[2]
        if last == _COUNTER and (owner is None or _COUNTER not in owner):
            continue
        weights.append((name, _channels_last(last, _array(value), owner)))
    return weights


def from_gluon(params: Mapping[str, Any], model: Module | None = None) -> Weights:
    """The weights of MXNet's gluon layers, for ``Module.load_weights``.

    ``gamma``, ``beta``, ``running_mean`` and ``running_var`` become ``weight``, ``bias``,
    ``running_mean`` and ``running_var``. Dtypes are kept.

    Args:
        params: Arrays by name, of MXNet, NumPy or MLX, or gluon's parameters: what
            ``mxnet.nd.load`` or ``collect_params()`` gives. Both of gluon's forms of a name are
            known, ``features.1.gamma`` and ``batchnorm0_gamma`` (which becomes
            ``batchnorm0.weight``), and the ``arg:`` and ``aux:`` of an exported model.
        model: Where the weights shall go. With it ``layers.`` and the convolutions are as in
            :func:`from_torch`, and the constant ``gamma`` and ``beta`` that gluon keeps with
            ``scale=False`` and ``center=False`` are left out. Default: ``None``.

    Returns:
        Pairs of a name and an array.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx_welford as mw
        >>> from mlx_welford.compat.gluon import InstanceNorm
        >>> layer = InstanceNorm(in_channels=2)
        >>> params = {"gamma": mx.ones((2,)), "beta": mx.array([3.0, 4.0])}
        >>> weights = mw.from_gluon(params, layer)
        >>> weights
        [('bias', array([3, 4], dtype=float32))]
        >>> _ = layer.load_weights(weights)
    """
    weights = []
    for gluon_name, value in params.items():
        name, owner = _place(_gluon_name(gluon_name), model)
        last = name.rpartition(".")[2]
        array = _array(value)
        if owner is not None and last not in owner and _is_neutral(last, array):
            continue
        weights.append((name, _channels_last(last, array, owner)))
    return weights


def _gluon_name(name: str) -> str:
    for prefix in ("arg:", "aux:"):
        name = name.removeprefix(prefix)
    for end in _GLUON_ENDS:
        if name == end or name.endswith((f".{end}", f"_{end}")):
            owner = name[: -len(end) - 1]
            return f"{owner}.{_GLUON.get(end, end)}" if owner else _GLUON.get(end, end)
    return name


def _is_neutral(name: str, array: mx.array) -> bool:
    """Whether multiplying with, or adding, these values changes nothing."""
    neutral = {"weight": 1, "bias": 0}
    return name in neutral and bool((array == neutral[name]).all().item())


def _place(name: str, model: Module | None) -> tuple[str, Module | None]:
    """The name within a model, and the module that has the parameter; None if there is none."""
    if model is None:
        return name, None
    node: Any = model
    owner: Module | None = None
    parts: list[str] = []
    for part in name.split("."):
        if isinstance(node, nn.Sequential) and part.isdigit():
            parts.append("layers")
            node = node.layers
        parts.append(part)
        owner = node if isinstance(node, Module) else None
        if isinstance(node, list):
            node = node[int(part)] if part.isdigit() and int(part) < len(node) else None
        else:
            node = node.get(part) if isinstance(node, dict) else None
    return ".".join(parts), owner


def _channels_last(name: str, array: mx.array, owner: Module | None) -> mx.array:
    """A convolution's weight: (out, ..., in) from (out, in, ...), transposed (in, out, ...)."""
    if name != "weight":
        return array
    if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return mx.moveaxis(array, 1, -1)
    if isinstance(owner, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return mx.moveaxis(array, 0, -1)
    return array


def _array(value: Any) -> mx.array:
    """An MLX array of the same dtype and values; no other library is imported for it."""
    if callable(getattr(value, "data", None)):  # gluon's parameters
        value = value.data()
    if isinstance(value, mx.array):
        return value
    dtype = getattr(value.dtype, "__name__", str(value.dtype)).removeprefix("torch.")
    if hasattr(value, "asnumpy"):  # MXNet
        value = value.asnumpy()
    elif hasattr(value, "detach"):  # PyTorch
        value = value.detach().cpu()
        value = (value.float() if dtype == "bfloat16" else value).numpy()
    elif dtype == "bfloat16":  # NumPy knows it from ml_dtypes alone, and MLX does not take those
        value = value.astype("float32")
    return mx.array(value, getattr(mx, "bool_" if dtype == "bool" else dtype))
