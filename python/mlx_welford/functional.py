"""The operations as functions of arrays."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from mlx_welford._arguments import check_eps, check_positive
from mlx_welford._operations import operations

__all__ = ["batch_norm", "composed", "group_moments", "group_norm", "instance_norm", "moments"]

StreamOrDevice = mx.Stream | mx.Device | None


def instance_norm(
    x: mx.array,
    weight: mx.array | None = None,
    bias: mx.array | None = None,
    eps: float = 1e-5,
    *,
    axis: int = -1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: mx.array | None = None,
    stream: StreamOrDevice = None,
) -> mx.array:
    r"""Normalises every channel of every instance by its own mean and variance.

    .. math::

        z = f(y + r), \qquad
        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma + \beta

    with the mean and the biased variance over all axes but 0 and ``axis``, found in a single pass
    (Welford, merged after Chan et al.) in float32 whatever the dtype of ``x``.

    Args:
        x: Input of shape ``(N, ..., C)``, or with the channels on another ``axis``; at least three
            dimensions, of dtype float16, bfloat16, float32, or float64 on the CPU.
        weight: Scale :math:`\gamma` of shape ``(C,)``, or ``(N, C)`` for one per instance. Default:
            ``None``, which stands for 1.
        bias: Offset :math:`\beta` of shape ``(C,)`` or ``(N, C)``. Default: ``None``, which stands
            for 0.
        eps: Added to the variance. Default: ``1e-5``.
        axis: The channel axis; not 0. Default: ``-1``.
        activation, negative_slope: What follows, as in :class:`BatchNorm`. Default: ``None``.
        residual: Added before the activation, of the shape of ``x``. Default: ``None``.
        stream: Stream or device to run on. Default: ``None``, the default stream.

    Returns:
        An array of the shape of ``x`` and of dtype ``mx.result_type(x, weight, bias, residual)``.

    Raises:
        ValueError: If a shape, ``axis``, ``eps`` or ``activation`` does not fit.
        TypeError: If an array is not of a floating-point dtype.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx_welford as mw
        >>> x = mx.array([[[1.0, 10.0], [3.0, 30.0]]])
        >>> mw.instance_norm(x)
        array([[[-0.999995, -1],
                [0.999995, 1]]], dtype=float32)

    References:
        Ulyanov, Vedaldi, Lempitsky: `Instance Normalization: The Missing Ingredient for Fast
        Stylization <https://arxiv.org/abs/1607.08022>`_.
    """
    check_eps(eps, "instance_norm")
    y, _, _ = operations.normalize(
        x,
        weight,
        bias,
        eps,
        operations.Statistics.of_instance,
        "instance_norm",
        axis=axis,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
        stream=stream,
    )
    return y


def group_norm(
    x: mx.array,
    num_groups: int,
    weight: mx.array | None = None,
    bias: mx.array | None = None,
    eps: float = 1e-5,
    *,
    interleaved: bool = False,
    mean: mx.array | None = None,
    var: mx.array | None = None,
    axis: int = -1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: mx.array | None = None,
    stream: StreamOrDevice = None,
) -> mx.array:
    r"""Normalises groups of channels of every instance by their mean and variance.

    .. math::

        z = f(y + r), \qquad
        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma + \beta

    with the mean and the biased variance over the C / G channels of a group and over all axes but 0
    and ``axis``, found in a single pass (Welford, merged after Chan et al.) in float32 whatever the
    dtype of ``x``. With ``mean`` and ``var`` these are used instead: a large image can be
    normalised tile by tile with the statistics of the whole, which :func:`group_moments` finds.

    Args:
        x: Input of shape ``(N, ..., C)``, or with the channels on another ``axis``; at least two
            dimensions, of dtype float16, bfloat16, float32, or float64 on the CPU.
        num_groups: The number of groups G, which divides the number of channels.
        weight: Scale :math:`\gamma` of shape ``(C,)``, or ``(N, C)`` for one per instance. Default:
            ``None``, which stands for 1.
        bias: Offset :math:`\beta` of shape ``(C,)`` or ``(N, C)``. Default: ``None``, which stands
            for 0.
        eps: Added to the variance. Default: ``1e-5``.
        interleaved: Whether channel ``c`` is in group ``c % G``, as in ``mlx.nn.GroupNorm`` with
            ``pytorch_compatible=False``. Default: ``False``, neighbouring channels are a group, as
            in ``torch.nn``.
        mean: Mean to use, of shape ``(N, G)``. Default: ``None``, the mean of ``x``.
        var: Variance to use, of shape ``(N, G)``; given exactly if ``mean`` is. Default: ``None``.
        axis: The channel axis; not 0. Default: ``-1``.
        activation, negative_slope: What follows, as in :class:`BatchNorm`. Default: ``None``.
        residual: Added before the activation, of the shape of ``x``. Default: ``None``.
        stream: Stream or device to run on. Default: ``None``, the default stream.

    Returns:
        An array of the shape of ``x`` and of dtype ``mx.result_type(x, weight, bias, residual)``.
        It can be differentiated with respect to all arrays, also ``mean`` and ``var``.

    Raises:
        ValueError: If a shape, ``num_groups``, ``axis``, ``eps`` or ``activation`` does not fit, or
            only one of ``mean`` and ``var`` is given.
        TypeError: If an array is not of a floating-point dtype.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx_welford as mw
        >>> x = mx.array([[[1.0, 3.0, 10.0, 30.0], [3.0, 1.0, 10.0, 30.0]]])
        >>> mw.group_norm(x, 2)
        array([[[-0.999995, 0.999995, -1, 1],
                [0.999995, -0.999995, -1, 1]]], dtype=float32)

    References:
        Wu, He: `Group Normalization <https://arxiv.org/abs/1803.08494>`_.
    """
    check_eps(eps, "group_norm")
    check_positive(num_groups, "num_groups", "group_norm")
    y, _, _ = operations.normalize(
        x,
        weight,
        bias,
        eps,
        operations.Statistics.of_instance,
        "group_norm",
        mean=mean,
        var=var,
        axis=axis,
        groups=num_groups,
        interleaved=interleaved,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
        stream=stream,
    )
    return y


def batch_norm(
    x: mx.array,
    weight: mx.array | None = None,
    bias: mx.array | None = None,
    eps: float = 1e-5,
    *,
    mean: mx.array | None = None,
    var: mx.array | None = None,
    axis: int = -1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: mx.array | None = None,
    stream: StreamOrDevice = None,
) -> tuple[mx.array, mx.array, mx.array]:
    r"""Normalises every channel by its mean and variance over the batch, or by given ones.

    .. math::

        z = f(y + r), \qquad
        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma + \beta

    with the mean and the biased variance over all axes but ``axis``, found in a single pass
    (Welford, merged after Chan et al.) in float32 whatever the dtype of ``x``. With ``mean`` and
    ``var`` these are used instead, as in evaluation.

    Args:
        x: Input of shape ``(N, ..., C)``, or with the channels on another ``axis``; at least two
            dimensions, of dtype float16, bfloat16, float32, or float64 on the CPU.
        weight: Scale :math:`\gamma` of shape ``(C,)``. Default: ``None``, which stands for 1.
        bias: Offset :math:`\beta` of shape ``(C,)``. Default: ``None``, which stands for 0.
        eps: Added to the variance. Default: ``1e-5``.
        mean: Mean to use, of shape ``(C,)``. Default: ``None``, the mean of ``x``.
        var: Variance to use, of shape ``(C,)``; given exactly if ``mean`` is. Default: ``None``.
        axis: The channel axis. Default: ``-1``.
        activation, negative_slope: What follows, as in :class:`BatchNorm`. Default: ``None``.
        residual: Added before the activation, of the shape of ``x``. Default: ``None``.
        stream: Stream or device to run on. Default: ``None``, the default stream.

    Returns:
        ``(z, mean, var)``: an array of the shape of ``x`` and of dtype ``mx.result_type(x, weight,
        bias, residual)``, and the statistics used, of shape ``(C,)`` and dtype float32 (float64 for
        float64 input). All three can be differentiated. The statistics of an empty batch are nan.

    Raises:
        ValueError: If a shape, ``axis``, ``eps`` or ``activation`` does not fit, or only one of
            ``mean`` and ``var`` is given.
        TypeError: If an array is not of a floating-point dtype.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx_welford as mw
        >>> x = mx.array([[1.0, 10.0], [3.0, 30.0]])
        >>> y, mean, var = mw.batch_norm(x)
        >>> mean, var
        (array([2, 20], dtype=float32), array([1, 100], dtype=float32))

    References:
        Ioffe, Szegedy: `Batch Normalization: Accelerating Deep Network Training by Reducing
        Internal Covariate Shift <https://arxiv.org/abs/1502.03167>`_.
    """
    check_eps(eps, "batch_norm")
    return operations.normalize(
        x,
        weight,
        bias,
        eps,
        operations.Statistics.of_batch,
        "batch_norm",
        mean=mean,
        var=var,
        axis=axis,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
        stream=stream,
    )


def moments(
    x: mx.array,
    axes: int | Sequence[int],
    *,
    keepdims: bool = False,
    stream: StreamOrDevice = None,
) -> tuple[mx.array, mx.array]:
    r"""Mean and biased variance over ``axes``, in a single pass over ``x``.

    .. math::

        \mu = \frac{1}{m} \sum x, \qquad \sigma^2 = \frac{1}{m} \sum (x - \mu)^2

    Args:
        x: Input of any shape, of dtype float16, bfloat16, float32, or float64 on the CPU.
        axes: The axis or axes to reduce, at least one.
        keepdims: Whether reduced axes stay, with length 1. Default: ``False``.
        stream: Stream or device to run on. Default: ``None``, the default stream.

    Returns:
        ``(mean, var)`` in float32 (float64 for float64 input); nan where nothing is reduced.

    Raises:
        ValueError: If ``axes`` is empty, repeats an axis or names one that ``x`` lacks.
        TypeError: If ``x`` is not of a floating-point dtype.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx_welford as mw
        >>> mw.moments(mx.array([[1.0, 2.0], [3.0, 6.0]]), axes=0)
        (array([2, 4], dtype=float32), array([1, 4], dtype=float32))

    References:
        Welford, Technometrics 4 (1962) 419; Chan, Golub, LeVeque, The American Statistician 37
        (1983) 242: the merge of two sets' moments.
    """
    axes = [axes] if isinstance(axes, int) else list(axes)
    return operations.moments(x, axes, keepdims=keepdims, stream=stream)


def group_moments(
    x: mx.array,
    num_groups: int,
    *,
    interleaved: bool = False,
    axis: int = -1,
    stream: StreamOrDevice = None,
) -> tuple[mx.array, mx.array]:
    r"""Mean and biased variance of groups of channels, in a single pass over ``x``.

    They are what :func:`group_norm` finds for an ``x`` of the same dtype: a tile that is normalised
    with them equals that part of the whole, to the bit.

    Args:
        x: Input of shape ``(N, ..., C)``, or with the channels on another ``axis``; at least two
            dimensions, of dtype float16, bfloat16, float32, or float64 on the CPU.
        num_groups: The number of groups G, which divides the number of channels.
        interleaved: Whether channel ``c`` is in group ``c % G``, as in ``mlx.nn.GroupNorm`` with
            ``pytorch_compatible=False``. Default: ``False``, neighbouring channels are a group, as
            in ``torch.nn``.
        axis: The channel axis; not 0. Default: ``-1``.
        stream: Stream or device to run on. Default: ``None``, the default stream.

    Returns:
        ``(mean, var)`` of shape ``(N, G)`` in float32 (float64 for float64 input); nan where a
        group has no values. Both can be differentiated.

    Raises:
        ValueError: If a shape, ``num_groups`` or ``axis`` does not fit.
        TypeError: If ``x`` is not of a floating-point dtype.

    Examples:
        Two groups of two channels, neighbouring and interleaved.

        >>> import mlx.core as mx
        >>> import mlx_welford as mw
        >>> x = mx.random.normal((1, 8, 6, 4))
        >>> for interleaved in (False, True):
        ...     mean, var = mw.group_moments(x, 2, interleaved=interleaved)
        ...     tile = mw.group_norm(x[:, :3], 2, interleaved=interleaved, mean=mean, var=var)
        ...     whole = mw.group_norm(x, 2, interleaved=interleaved)
        ...     assert mx.array_equal(tile, whole[:, :3])
    """
    check_positive(num_groups, "num_groups", "group_moments")
    return operations.group_moments(
        x, num_groups, interleaved=interleaved, axis=axis, stream=stream
    )


_composing = threading.Lock()
_composing_blocks = 0


@contextmanager
def composed() -> Iterator[None]:
    """Within the block, every operation of this package is composed of MLX's own.

    For ``mx.export_function``, which cannot write other packages' primitives, and to find out
    whether a kernel causes an error. Operations that are called within the block are composed; a
    function that ``mx.compile`` has traced before keeps its kernels. The switch holds for all
    threads of the process, and blocks may be nested. Functions may be exported with
    ``shapeless=True``; their gradients are right where no axis has length 1.

    Examples:
        >>> import tempfile
        >>> import mlx.core as mx
        >>> import mlx_welford as mw
        >>> norm = mw.BatchNorm(4).eval()
        >>> x = mx.random.normal((5, 4))
        >>> with tempfile.NamedTemporaryFile(suffix=".mlxfn") as file, mw.composed():
        ...     mx.export_function(file.name, lambda x: norm(x), x)
        ...     (y,) = mx.import_function(file.name)(x)
        >>> mx.allclose(y, norm(x), atol=1e-5).item()
        True
    """
    _change_composing(1)
    try:
        yield
    finally:
        _change_composing(-1)


def _change_composing(by: int) -> None:
    global _composing_blocks
    with _composing:
        _composing_blocks += by
        operations.use_fallback(_composing_blocks > 0)
