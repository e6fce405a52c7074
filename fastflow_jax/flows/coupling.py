"""Affine coupling: half of the channels scales and shifts the other half.

Dinh et al., Density estimation using Real NVP (arXiv 1605.08803), section 3.2; with convolutional
subnets as in FastFlow (arXiv 2111.07677), section 3.3.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp


def affine_coupling(
    x: jax.Array, scale_shift: jax.Array, *, clamp: float = 2.0, inverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Scale and shift the active half by what the subnet made of the passive half.

        a, b    = split(0.1 * scale_shift)
        log s   = clamp * tanh(a)
        forward:  y = s * x + b          log_det =  sum_C log s
        inverse:  x = (y - b) / s        log_det = -sum_C log s

    This is the soft clamp that FastFlow was published with (FrEIA before August 2023); later FrEIA
    divides `a` by the clamp inside the tanh. |log s| never exceeds the clamp.

    Args:
      x: the active half, [..., A].
      scale_shift: the subnet's output, [..., 2A]; log-scales first, then shifts.
      clamp: bound of the log-scale.
      inverse: undo the forward direction.

    Returns:
      The transformed half [..., A] and the log-determinant per location [...].

    Raises:
      ValueError: `scale_shift` does not have twice the channels of `x`.
    """
    if scale_shift.shape[-1] != 2 * x.shape[-1]:
        raise ValueError(
            f"scale_shift has {scale_shift.shape[-1]} channels; {x.shape[-1]} active channels need "
            f"{2 * x.shape[-1]}"
        )
    # Likelihoods are exact whatever the type that the subnet computes in.
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
    """One half of the channels passes, and `subnet` makes of it what transforms the other half.

    Args:
      x: [..., C].
      subnet: from the passive half, and the condition after it, to `scale_shift` of
        `affine_coupling`.
      condition: what else the subnet sees, [..., D].
      clamp: bound of the log-scale.
      swap: the last C//2 channels pass, not the first C - C//2, see `half_channels`.
      inverse: undo the forward direction.

    Returns:
      All channels [..., C], in their places, and the log-determinant per location [...].
    """
    first, last = jnp.split(x, [x.shape[-1] - x.shape[-1] // 2], axis=-1)
    passive, active = (last, first) if swap else (first, last)
    given = passive if condition is None else jnp.concatenate([passive, condition], -1)
    active, log_det = affine_coupling(active, subnet(given), clamp=clamp, inverse=inverse)
    halves = [active, passive] if swap else [passive, active]
    return jnp.concatenate(halves, -1), log_det


def half_channels(channels: int, swap: bool) -> tuple[int, int]:
    """How many channels of `couple` are passive and how many active.

    Raises:
      ValueError: there are not two channels.
    """
    if channels < 2:
        raise ValueError(f"a coupling needs two channels or more, not {channels}")
    first, last = channels - channels // 2, channels // 2
    return (last, first) if swap else (first, last)


def hidden_channels(channels: int, ratio: float) -> int:
    """Channels between the convolutions of a subnet that `channels` come into.

    Raises:
      ValueError: there would be none.
    """
    hidden = int(channels * ratio)
    if hidden < 1:
        raise ValueError(f"hidden_ratio {ratio} leaves no hidden channel of {channels}")
    return hidden


def fan_in_uniform(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's default for convolutions, weight and bias alike.

    Part of the reference's behaviour: a fresh coupling is near the identity but not equal to it.
    """
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class ConvSubnet(nn.Module):
    """Convolution, ReLU, convolution: the subnet of FastFlow (section 3.3).

    [B, h, w, P] -> [B, h, w, features], for any h and w.

    Attributes:
      features: channels that come out.
      hidden_ratio: channels between the convolutions, relative to those that come in.
      kernel_size: side of the kernels: 3 or 1 in the paper.
      out_kernel: side of the last one, where it is another: with 1 a location hangs on its nearest
        neighbours alone, for half the work.
      zero_init: begin with zeros in the last convolution, so that a fresh coupling is the identity
        (Glow, section 3.3); otherwise with the reference's small random numbers.
      dtype: type that the convolutions compute in; parameters are float32.
    """

    features: int
    hidden_ratio: float = 1.0
    kernel_size: int = 3
    zero_init: bool = False
    dtype: jnp.dtype | None = None
    out_kernel: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = hidden_channels(x.shape[-1], self.hidden_ratio)

        def conv(inputs, features, side, init, name):
            init = init or fan_in_uniform(inputs.shape[-1] * side**2)
            kernel = (side, side)
            layer = nn.Conv(
                features, kernel, kernel_init=init, bias_init=init, dtype=self.dtype, name=name
            )
            return layer(inputs)

        h = nn.relu(conv(x, hidden, self.kernel_size, None, "conv_in"))
        init = nn.initializers.zeros if self.zero_init else None
        return conv(h, self.features, self.out_kernel or self.kernel_size, init, "conv_out")


class AffineCoupling(nn.Module):
    """One half of the channels passes and conditions the other: y_b = s(y_a) * y_b + b(y_a).

    The passive half is the first C - C//2 channels, the active one the last C//2; `swap` lets the
    last C//2 pass and transforms the first C - C//2, so that two couplings touch every channel.

    Attributes:
      subnet: called with `features=` twice the active channels; gives the module that maps the
        passive half [..., P] (and what conditions it) to [..., features].
      clamp: bound of the log-scale.
      swap: exchange the halves' parts.
    """

    subnet: Callable[..., nn.Module] = ConvSubnet
    clamp: float = 2.0
    swap: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, condition: jax.Array | None = None, *, inverse: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Transform x [..., C], conditioned on `condition` [..., D] where given."""
        _, active = half_channels(x.shape[-1], self.swap)
        subnet = self.subnet(features=2 * active, name="subnet")
        return couple(x, subnet, condition, clamp=self.clamp, swap=self.swap, inverse=inverse)
