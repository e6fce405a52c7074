"""Affine coupling: half of the channels determines the scale and shift of the other half.

Dinh et al., Density estimation using Real NVP (arXiv 1605.08803), section 3.2; with convolutional
subnets as in FastFlow (arXiv 2111.07677), section 3.3.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def affine_coupling(
    x: jax.Array, scale_shift: jax.Array, *, clamp: float = 2.0, inverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Scales and shifts the active half by the output of the subnet.

        a, b    = split(0.1 * scale_shift)
        log s   = clamp * tanh(a)
        forward:  y = s * x + b          log_det =  sum_C log s
        inverse:  x = (y - b) / s        log_det = -sum_C log s

    This soft clamp is that of the published FastFlow (FrEIA before August 2023); later versions of
    FrEIA divide `a` by the clamp inside the tanh. |log s| is at most `clamp`.

    Args:
      x: active half, [..., A].
      scale_shift: output of the subnet, [..., 2A]; log-scales first, then shifts.
      clamp: bound of the log-scale.
      inverse: whether to compute x from y.

    Returns:
      The transformed half [..., A] and the log-determinant per location [...].

    Raises:
      ValueError: `scale_shift` does not have twice the channels of `x`.
    """
    if scale_shift.shape[-1] != 2 * x.shape[-1]:
        raise ValueError(
            f"scale_shift must have {2 * x.shape[-1]} channels for {x.shape[-1]} active channels, "
            f"not {scale_shift.shape[-1]}."
        )
    # At least float32, whatever the subnet computes in, so that likelihoods are exact.
    scale_shift = 0.1 * scale_shift.astype(jnp.promote_types(x.dtype, jnp.float32))
    a, shift = jnp.split(scale_shift, 2, axis=-1)
    log_scale = clamp * jnp.tanh(a)  # [..., A]
    if inverse:
        return (x - shift) * jnp.exp(-log_scale), -log_scale.sum(-1)
    return x * jnp.exp(log_scale) + shift, log_scale.sum(-1)


def couple(
    x: jax.Array,
    subnet: Callable[[jax.Array], jax.Array],
    condition: jax.Array | None = None,
    *,
    clamp: float = 2.0,
    swap: bool = False,
    inverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Transforms the active half of the channels, given the passive half.

    Args:
      x: [..., C].
      subnet: maps the passive half, concatenated with the condition, to `scale_shift` of
        `affine_coupling`.
      condition: further input of the subnet, [..., D], or None.
      clamp: bound of the log-scale.
      swap: whether the last C//2 channels are passive, instead of the first C - C//2.
      inverse: whether to compute x from y.

    Returns:
      All channels [..., C], in their order, and the log-determinant per location [...].
    """
    first, last = jnp.split(x, [x.shape[-1] - x.shape[-1] // 2], axis=-1)
    passive, active = (last, first) if swap else (first, last)
    given = passive if condition is None else jnp.concatenate([passive, condition], -1)
    active, log_det = affine_coupling(active, subnet(given), clamp=clamp, inverse=inverse)
    halves = [active, passive] if swap else [passive, active]
    return jnp.concatenate(halves, -1), log_det


def half_channels(channels: int, swap: bool) -> tuple[int, int]:
    """Returns the numbers of passive and active channels of `couple`.

    Raises:
      ValueError: there are fewer than two channels.
    """
    if channels < 2:
        raise ValueError(f"A coupling needs at least two channels, not {channels}.")
    first, last = channels - channels // 2, channels // 2
    return (last, first) if swap else (first, last)


def hidden_channels(channels: int, ratio: float) -> int:
    """Returns the number of hidden channels of a subnet with `channels` input channels.

    Raises:
      ValueError: the number would be zero.
    """
    hidden = int(channels * ratio)
    if hidden < 1:
        raise ValueError(f"hidden_ratio {ratio} gives no hidden channels for {channels} channels.")
    return hidden


class ConvSubnet(nn.Module):
    """Convolution, ReLU, convolution: the subnet of FastFlow (section 3.3).

    [B, h, w, P] -> [B, h, w, features], for any h and w. Weights and biases are drawn from
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default, as in the published FastFlow.

    Attributes:
      features: number of output channels.
      hidden_ratio: hidden channels, relative to the input channels.
      kernel_size: side of the kernels: 3 or 1 in the paper.
      zero_init: whether to initialise the last convolution with zeros, so that the coupling is
        the identity (Glow, section 3.3).
      dtype: type of the convolutions' computation, None for the input's; parameters are float32.
      out_kernel: side of the last kernel; None or 0 for `kernel_size`. With 1, a location depends
        only on its nearest neighbours, for about half of the computation.

    Raises:
      ValueError: the input has no height and width.
    """

    features: int
    hidden_ratio: float = 1.0
    kernel_size: int = 3
    zero_init: bool = False
    dtype: DTypeLike | None = None
    out_kernel: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(inputs: jax.Array, features: int, side: int, name: str, zeros: bool) -> jax.Array:
            bound = (inputs.shape[-1] * side**2) ** -0.5

            def uniform(key, shape, dtype=jnp.float32):
                return jax.random.uniform(key, shape, dtype, -bound, bound)

            init = nn.initializers.zeros if zeros else uniform
            how = {"kernel_init": init, "bias_init": init, "dtype": self.dtype}
            return nn.Conv(features, (side, side), name=name, **how)(inputs)

        if x.ndim < 3:
            raise ValueError(
                f"The input of a ConvSubnet is [B, h, w, C], not {list(x.shape)}. Pass vectors as "
                "x[:, None, None]."
            )
        hidden = hidden_channels(x.shape[-1], self.hidden_ratio)
        h = nn.relu(conv(x, hidden, self.kernel_size, "conv_in", False))
        out_kernel = self.out_kernel or self.kernel_size
        return conv(h, self.features, out_kernel, "conv_out", self.zero_init)


class AffineCoupling(nn.Module):
    """Transforms half of the channels, given the other half: y_b = s(y_a) * y_b + b(y_a).

    The first C - C//2 channels are passive and the last C//2 active. With `swap` it is the other
    way round, so that two couplings transform every channel.

    Attributes:
      subnet: makes a module when called with `features=`, which is twice the number of active
        channels. The module maps the passive half and the condition to [..., features].
      clamp: bound of the log-scale.
      swap: whether the last C//2 channels are passive.
    """

    subnet: Callable[..., nn.Module] = ConvSubnet
    clamp: float = 2.0
    swap: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, condition: jax.Array | None = None, *, inverse: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Transforms x [..., C], given `condition` [..., D] if there is one; log_det [...].

        Args:
          x: features [..., C], or transformed ones with `inverse`.
          condition: [..., D], a further input of the subnet; None for none.
          inverse: whether to compute the inverse.
        """
        _, active = half_channels(x.shape[-1], self.swap)
        subnet = self.subnet(features=2 * active, name="subnet")
        return couple(x, subnet, condition, clamp=self.clamp, swap=self.swap, inverse=inverse)
