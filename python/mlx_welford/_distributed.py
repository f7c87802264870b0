"""Batch normalisation over a batch whose shards are on several processes."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import cast

import mlx.core as mx

from mlx_welford._arguments import options
from mlx_welford._fallback import result_type
from mlx_welford._layers import BatchNorm, Epilogue
from mlx_welford._operations import operations

__all__ = ["SyncBatchNorm"]

Group = mx.distributed.Group


@options
class SyncBatchNorm(BatchNorm):
    r"""Applies :class:`BatchNorm` over a batch whose shards are on the processes of a group.

    In training every rank computes the moments of its shard in one pass, the ranks exchange them in
    one collective operation, and all merge them (Chan et al.) to the same

    .. math::

        n = \sum_r n_r, \qquad \mu = \frac{1}{n} \sum_r n_r \mu_r, \qquad
        \sigma^2 = \frac{1}{n} \sum_r \left( m_{2,r} + n_r (\mu_r - \mu)^2 \right),

    with which each normalises its shard. Shards may differ in size and may be empty. The gradient
    takes one more collective operation. It is the gradient of the sum of the losses of all ranks.
    With respect to the input it is complete. With respect to ``weight`` and ``bias`` it is this
    rank's part, as for every other parameter, and ``mlx.nn.average_gradients`` combines the parts
    (docs/distributed.md). Running statistics are the same on every rank.

    In a group of one process, and in evaluation, this is :class:`BatchNorm`, and nothing is sent.

    Args:
        num_features, eps, momentum, affine, axis, activation, negative_slope: As in
            :class:`BatchNorm`.
        track_running_stats: Whether to keep running statistics. Default: ``True``. Without them
            evaluation uses the statistics of the rank's own input.
        group: The processes that share the batch, as from ``mx.distributed.init().split(...)``.
            Default: ``None``, all there are.

    Shape:
        - Input: ``(N, C)``, ``(N, L, C)``, ``(N, H, W, C)`` and so on, or with the channels on
          ``axis``. C and the dtype must be the same on every rank. N may be anything, also 0.
        - Output: same shape as the input, dtype ``mx.result_type(x, weight, bias, residual)``.

    Raises:
        ValueError: If an argument is out of range, or an input has too few dimensions or another
            number of channels.
        TypeError: If an input is not of a floating-point dtype.
        RuntimeError: When the output is evaluated: if the messages of other ranks show another
            number of channels or another dtype; if all ranks together have one value per channel;
            or from MLX, if a rank is lost.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx_welford as mw
        >>> bn = mw.SyncBatchNorm(4)
        >>> output = bn(mx.random.normal((5, 4)))

    References:
        Chan, Golub, LeVeque, The American Statistician 37 (1983) 242: the merge of two sets'
        moments. Interface of ``torch.nn.SyncBatchNorm``.
    """

    _: KW_ONLY
    group: Group | None = None

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        group = (self.group or mx.distributed.init()) if self.training else None
        if group is None or group.size() == 1:
            return super().__call__(x, residual)
        # Only the messages of all ranks tell whether there are several values per channel.
        self._take_features_from(x, several_values=False)
        x, shift = self._split(x)
        normalize = _Synchronized(self, group)
        y, mean, var, count = normalize(x, self.get("weight"), self.get("bias"), residual)
        if self.track_running_stats:
            of_input = mean if shift is None else mean + shift
            following = self._next_running_statistics(of_input, var, count)
            # A batch that is empty on all ranks changes nothing.
            self.update({k: mx.where(count > 0, v, self[k]) for k, v in following.items()})
        return y


class _Synchronized:
    """(x, [weight], [bias], [residual]) -> (z, mean, var, count), with the statistics of all ranks.

    With m values per channel on all ranks, r = 1 / sqrt(var + eps) and the cotangent g of y, where
    z = activation(y + residual), the gradient of x is

        gx = r w g + (grad_mean + 2 grad_var (x - mean)) / m

    where grad_mean and grad_var are the cotangents of mean and var, summed over the ranks. MLX
    could differentiate the parts instead, but would read and write x five times more often.
    """

    def __init__(self, layer: SyncBatchNorm, group: Group) -> None:
        self.caller = type(layer).__name__
        self.eps = layer.eps
        self.axis = layer.axis
        self.channels = layer._channels()
        self.epilogue: Epilogue = {
            "activation": layer.activation,
            "negative_slope": layer.negative_slope,
        }
        self.group = group

    def __call__(
        self,
        x: mx.array,
        weight: mx.array | None,
        bias: mx.array | None,
        residual: mx.array | None,
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        named = {"weight": weight, "bias": bias, "residual": residual}
        given = {name: a for name, a in named.items() if a is not None}
        self.names = list(given)
        # Cast to the dtype of the result first, so that casts back give gradients their dtypes.
        dtype = result_type(x, *given.values())
        function = mx.custom_function(self._forward)
        function.vjp(self._backward)
        outputs = function([a.astype(dtype) for a in (x, *given.values())])
        return cast(tuple[mx.array, mx.array, mx.array, mx.array], outputs)

    def _forward(self, arguments: list[mx.array]) -> tuple[mx.array, ...]:
        x, *others = arguments
        given = dict(zip(self.names, others, strict=True))
        message = operations.rank_moments(x, self.caller, self.axis, self.channels)
        messages = mx.distributed.all_gather(message, group=self.group)
        mean, var, count = operations.merge_ranks(
            messages, self.group.size(), self.group.rank(), self.caller
        )
        z, _, _ = operations.normalize(
            x,
            given.get("weight"),
            given.get("bias"),
            self.eps,
            operations.Statistics.of_batch,
            self.caller,
            mean=mean,
            var=var,
            axis=self.axis,
            residual=given.get("residual"),
            **self.epilogue,
        )
        return z, mean, var, count

    def _backward(
        self,
        primals: list[mx.array],
        cotangents: tuple[mx.array, ...],
        outputs: tuple[mx.array, ...],
    ) -> list[mx.array]:
        x, *others = primals
        of_z, *of_statistics, _ = cotangents
        z, mean, var, count = outputs
        given = dict(zip(self.names, others, strict=True))

        # One pass over x and the cotangent gives all sums, and the gradient of the residual.
        found = operations.given_gradients(
            x,
            z,
            of_z,
            mean,
            var,
            given.get("weight"),
            given.get("bias"),
            given.get("residual"),
            self.eps,
            self.caller,
            self.axis,
            **self.epilogue,
        )
        through_statistics, of_others = found[:2], found[2:]

        # One collective operation sums the cotangents of mean and var.
        own = [a + b for a, b in zip(through_statistics, of_statistics, strict=True)]
        everyone = _sum_over_ranks(mx.concatenate(own), self.group) / count
        grad_mean, grad_var = mx.split(everyone, 2)
        if "residual" in given:  # whose gradient is the cotangent of y
            g, epilogue = of_others[-1], Epilogue()
        else:
            g, epilogue = of_z, self.epilogue
        grad_x = operations.input_gradient(
            x,
            g,
            mean,
            var,
            given.get("weight"),
            self.eps,
            grad_mean,
            grad_var,
            self.caller,
            self.axis,
            bias=given.get("bias"),
            **epilogue,
        )
        return [grad_x, *of_others]


def _sum_over_ranks(x: mx.array, group: Group) -> mx.array:
    """all_sum whose gradient is that of the sum of all ranks' losses, for second derivatives.

    The gradient of MLX's all_sum is the cotangent of one rank, as if the others had none.
    """

    def backward(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return _sum_over_ranks(cotangent, group)

    function = mx.custom_function(lambda x: mx.distributed.all_sum(x, group=group))
    function.vjp(backward)
    return cast(mx.array, function(x))
