"""Weights of PyTorch and MXNet, converted for ``Module.load_weights``."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn import Module

__all__ = ["from_gluon", "from_torch"]

Weights = list[tuple[str, mx.array]]

_COUNTER = "num_batches_tracked"

# MLX's dtypes by their names in NumPy and PyTorch.
_DTYPES = {
    "bool": mx.bool_,
    **{
        f"{sign}int{bits}": getattr(mx, f"{sign}int{bits}")
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
    **{
        name: getattr(mx, name)
        for name in ("float16", "bfloat16", "float32", "float64", "complex64")
    },
}

_GLUON = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",  # moving_*: the names of MXNet's symbols
    "moving_var": "running_var",
}
_GLUON_ENDS = [*_GLUON, "running_mean", "running_var", "weight", "bias"]


def from_torch(state_dict: Mapping[str, Any], model: Module | None = None) -> Weights:
    """The weights of a ``torch`` state_dict, for ``Module.load_weights``.

    The parameters of normalisation layers have the same names in ``torch.nn``, in ``mlx.nn`` and
    here. The exception is ``num_batches_tracked``: it is left out unless ``model`` has it, in a
    layer with ``momentum=None``. Dtypes are kept.

    Args:
        state_dict: Arrays of PyTorch, NumPy or MLX by name, for instance what ``mx.load`` reads
            from a safetensors file. A checkpoint is accepted too: a mapping without arrays, in
            which exactly one value is such a state_dict.
        model: The model that the weights are for. Names within a ``mlx.nn.Sequential`` then get
            the ``layers.`` that ``torch.nn.Sequential`` does not have, and the weights of
            convolutions get their channels last. Default: ``None``, neither is done.

    Returns:
        Pairs of a name and an array.

    Raises:
        TypeError: If a value is not an array, or a name not a string.
        ValueError: If a checkpoint has several state_dicts, or an array has a dtype that MLX does
            not have.

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
    for name, value in _arrays_by_name(state_dict, "from_torch", "state_dict").items():
        name, owner = _place(name, model)
        last = name.rpartition(".")[2]
        if last == _COUNTER and (owner is None or _COUNTER not in owner):
            continue
        weights.append((name, _channels_last(last, _to_mlx(value), owner)))
    return weights


def from_gluon(params: Mapping[str, Any], model: Module | None = None) -> Weights:
    """The weights of MXNet's gluon layers, for ``Module.load_weights``.

    ``gamma``, ``beta``, ``running_mean`` and ``running_var`` become ``weight``, ``bias``,
    ``running_mean`` and ``running_var``. Dtypes are kept.

    Args:
        params: Arrays of MXNet, NumPy or MLX by name, or gluon's parameters: the result of
            ``mxnet.nd.load`` or ``collect_params()``, or a checkpoint as in :func:`from_torch`.
            Names may be of the form ``features.1.gamma`` or ``batchnorm0_gamma`` (which becomes
            ``batchnorm0.weight``), and begin with the ``arg:`` or ``aux:`` of an exported model.
        model: The model that the weights are for, as in :func:`from_torch`. The constant
            ``gamma`` and ``beta`` that gluon stores with ``scale=False`` and ``center=False`` are
            then left out as well. Default: ``None``.

    Returns:
        Pairs of a name and an array.

    Raises:
        TypeError, ValueError: As :func:`from_torch`.

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
    for gluon_name, value in _arrays_by_name(params, "from_gluon", "params").items():
        name, owner = _place(_gluon_name(gluon_name), model)
        last = name.rpartition(".")[2]
        array = _to_mlx(value)
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
    """True if these values, as a weight or a bias, change nothing."""
    neutral = {"weight": 1, "bias": 0}
    return name in neutral and bool((array == neutral[name]).all().item())


def _place(name: str, model: Module | None) -> tuple[str, Module | None]:
    """The parameter's name in the model, and the module that has it, or None."""
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
    """The array; a convolution's weight as (out, ..., in).

    From (out, in, ...), or (in, out, ...) of a transposed convolution.
    """
    if name != "weight":
        return array
    if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return mx.moveaxis(array, 1, -1)
    if isinstance(owner, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return mx.moveaxis(array, 0, -1)
    return array


def _arrays_by_name(given: Any, caller: str, argument: str) -> dict[str, Any]:
    """The arrays of a state_dict or a checkpoint by name, not converted.

    Raises:
        TypeError, ValueError: As :func:`from_torch`.
    """
    found = _state_dict(given, caller, argument)
    for name in found:
        if not isinstance(name, str):
            raise TypeError(
                f"[{caller}] '{argument}' must have strings as names but {name!r} is of type "
                f"{type(name).__name__}."
            )
    arrays = {name: _data(value) for name, value in found.items()}
    for name, array in arrays.items():
        if not isinstance(array, mx.array) and _dtype_name(array) not in _DTYPES:
            dtype = _dtype_name(array)
            raise ValueError(f"[{caller}] {name!r} has the dtype {dtype}, which MLX does not have.")
    return arrays


def _state_dict(given: Any, caller: str, argument: str) -> dict[Any, Any]:
    """The argument if its values are arrays, else the only mapping of arrays among its values."""
    wanted = f"[{caller}] '{argument}' must map names to arrays but"
    if not _is_mapping(given):
        raise TypeError(f"{wanted} is of type {type(given).__name__}.{_hint(given)}")
    found = dict(given.items())
    others = [name for name, value in found.items() if not _is_array(value)]
    models = [name for name in others if _hint(found[name])]
    nested = [name for name in others if _maps_names_to_arrays(found[name])]
    if len(nested) == 1 and len(others) == len(found) and not models:
        return dict(found[nested[0]].items())
    if nested and not models:
        names = ", ".join(map(repr, nested))
        are = "is such a mapping" if len(nested) == 1 else "are such mappings"
        raise ValueError(f"{wanted} {names} {are}. Use {argument}[{nested[0]!r}], for instance.")
    for name in models or others:
        kind = type(found[name]).__name__
        raise TypeError(f"{wanted} {name!r} is of type {kind}.{_hint(found[name])}")
    return found


def _is_mapping(value: Any) -> bool:
    """True if it has items(). gluon's ParameterDict has, but is not a Mapping."""
    return callable(getattr(value, "items", None))


def _maps_names_to_arrays(value: Any) -> bool:
    if not _is_mapping(value):
        return False
    items = list(value.items())
    return bool(items) and all(isinstance(k, str) and _is_array(v) for k, v in items)


def _is_array(value: Any) -> bool:
    """True for arrays of MLX, NumPy, PyTorch or MXNet, and parameters of gluon."""
    is_parameter = callable(getattr(value, "data", None))
    # A dtype alone is not enough: models and command-line options may have one.
    return is_parameter or all(hasattr(value, name) for name in ("dtype", "shape"))


def _hint(value: Any) -> str:
    """For an error: how to get the arrays of a model; empty if the value is not a model."""
    if callable(getattr(value, "collect_params", None)):  # gluon
        return " Use its collect_params()."
    if all(callable(getattr(value, name, None)) for name in ("named_parameters", "state_dict")):
        return " Use its state_dict()."
    return ""


def _data(value: Any) -> Any:
    """The array of a parameter of gluon; an array itself."""
    return value.data() if callable(getattr(value, "data", None)) else value


def _dtype_name(array: Any) -> str:
    name: str = getattr(array.dtype, "__name__", str(array.dtype)).removeprefix("torch.")
    return name


def _to_mlx(value: Any) -> mx.array:
    """An MLX array of the same dtype and values. Imports no other library."""
    if isinstance(value, mx.array):
        return value
    dtype = _dtype_name(value)
    if hasattr(value, "asnumpy"):  # MXNet
        value = value.asnumpy()
    elif hasattr(value, "detach"):  # PyTorch
        value = value.detach().cpu()
        value = (value.float() if dtype == "bfloat16" else value).numpy()
    elif dtype == "bfloat16":  # NumPy has it only from ml_dtypes, whose arrays MLX refuses
        value = value.astype("float32")
    return mx.array(value, _DTYPES[dtype])
