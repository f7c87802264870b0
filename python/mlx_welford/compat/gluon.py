"""Instance normalisation with the arguments and defaults of ``mxnet.gluon.nn``."""

from collections.abc import Callable
from typing import Unpack

import mlx.core as mx

from mlx_welford import _layers
from mlx_welford._layers import Epilogue

__all__ = ["InstanceNorm"]

Initializer = str | Callable[[mx.array], mx.array]

_INITIALIZERS: dict[str, Callable[[mx.array], mx.array]] = {
    "zeros": mx.zeros_like,
    "ones": mx.ones_like,
}


class InstanceNorm(_layers.InstanceNorm):
    r""":class:`mlx_welford.InstanceNorm` as ``mxnet.gluon.nn.InstanceNorm``.

    .. math::

        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma + \beta

    with :math:`\epsilon` inside the root, as MXNet computes it, unlike its documentation.
    :math:`\gamma` and :math:`\beta` are the parameters ``weight`` and ``bias``, as
    everywhere in MLX; :func:`mlx_welford.from_gluon` renames those of a checkpoint.

    Args:
        axis: The channel axis; not 0. Default: ``1``.
        epsilon: Added to the variance. Default: ``1e-5``.
        center: Whether to add ``bias``. Default: ``True``.
        scale: Whether to multiply with ``weight``. Default: ``False``.
        beta_initializer: First values of ``bias``: ``"zeros"``, ``"ones"``, or a function from an
            array to one of its shape, such as those of ``mlx.nn.init``. Default: ``"zeros"``.
        gamma_initializer: First values of ``weight``, likewise. Default: ``"ones"``.
        in_channels: The number of channels. Default: ``0``, taken from the first input.
        activation, negative_slope: As in :class:`mlx_welford.BatchNorm`.

    Shape:
        - Input: ``(N, C, ...)`` with at least 3 dimensions, or with the channels on ``axis``.
        - Output: same shape as the input.

    Raises:
        ValueError: If an argument is out of range, or an input has another number of channels or
            too few dimensions.

    Examples:
        >>> import mlx.core as mx
        >>> from mlx_welford.compat.gluon import InstanceNorm
        >>> layer = InstanceNorm(scale=True)
        >>> layer(mx.array([[[1.0, 3.0], [10.0, 30.0]]]))
        array([[[-0.999995, 0.999995],
                [-1, 1]]], dtype=float32)
    """

    _features_argument = "in_channels"
    _eps_argument = "epsilon"

    def __init__(
        self,
        axis: int = 1,
        epsilon: float = 1e-5,
        center: bool = True,
        scale: bool = False,
        beta_initializer: Initializer = "zeros",
        gamma_initializer: Initializer = "ones",
        in_channels: int = 0,
        **epilogue: Unpack[Epilogue],
    ) -> None:
        self.center = center
        self.scale = scale
        # Kept only until the parameters exist, because functions may not be picklable.
        self.beta_initializer: Initializer | None = _known(beta_initializer, "beta_initializer")
        self.gamma_initializer: Initializer | None = _known(gamma_initializer, "gamma_initializer")
        self._start(
            weight=scale,
            bias=center,
            num_features=None if in_channels == 0 else in_channels,
            eps=epsilon,
            axis=axis,
            epilogue=epilogue,
        )

    def _first_values(self, num_features: int) -> dict[str, mx.array]:
        values = super()._first_values(num_features)
        self.beta_initializer = self.gamma_initializer = None
        return values

    def _initial(self, name: str, num_features: int) -> mx.array:
        if name == "weight":
            return _initial(self.gamma_initializer, num_features, "gamma")
        return _initial(self.beta_initializer, num_features, "beta")

    def _extra_repr(self) -> str:
        shown = (
            f"axis={self.axis}, epsilon={self.eps}, center={self.center}, scale={self.scale}, "
            f"in_channels={self.num_features or 0}"
        )
        return ", ".join([shown, *self._not_at_default(*Epilogue.__annotations__)])


def _known(initializer: Initializer, name: str) -> Initializer:
    if not callable(initializer) and initializer not in _INITIALIZERS:
        raise ValueError(
            f"[InstanceNorm] '{name}' must be a function or one of "
            f"{', '.join(map(repr, _INITIALIZERS))} but got {initializer!r}."
        )
    return initializer


def _initial(initializer: Initializer | None, num_features: int, name: str) -> mx.array:
    assert initializer is not None, "the parameters are created once"
    function = _INITIALIZERS[initializer] if isinstance(initializer, str) else initializer
    values = function(mx.zeros((num_features,)))
    if values.shape != (num_features,):
        raise ValueError(
            f"[InstanceNorm] '{name}_initializer' must give shape {(num_features,)} "
            f"but gave {values.shape}."
        )
    return values
