"""The same layers for Flax NNX.

    flow = Flow(64, steps=4, rngs=nnx.Rngs(0))
    z, log_det = flow(x)                # x and z [B, h, w, 64], log_det [B, h, w]
    x, log_det = flow(z, inverse=True)

They hold parameters alone; what is computed are the functions that the linen modules call, and
fields mean what they mean there. As NNX has it, channels are given beforehand. Parameters are
`nnx.Param` under linen's names, permutations are `Permutation`: `nnx.state(flow, nnx.Param)` and
`nnx.Optimizer(flow, ..., wrt=nnx.Param)` see the former alone, a checkpoint wants both.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from fastflow_jax.flows.chain import compose, is_double, rebuilding
from fastflow_jax.flows.coupling import couple, fan_in_uniform, half_channels, hidden_channels
from fastflow_jax.flows.elementwise import global_affine, unit_scale
from fastflow_jax.flows.permute import draw_permutation, shuffle

__all__ = [
    "AffineCoupling",
    "ConvSubnet",
    "Flow",
    "FlowStep",
    "GlobalAffine",
    "Permutation",
    "Permute",
]


class Permutation(nnx.Variable):
    """The index of a `Permute`, int32 [C]: no parameter, but to be saved with them."""


class ConvSubnet(nnx.Module):
    """Convolution, ReLU, convolution, as `flows.ConvSubnet`: [B, h, w, P] -> [B, h, w, features].

    Attributes:
      conv_in, conv_out: the convolutions.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        hidden_ratio: float = 1.0,
        kernel_size: int = 3,
        zero_init: bool = False,
        dtype: jnp.dtype | None = None,
        out_kernel: int | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        hidden = hidden_channels(channels, hidden_ratio)

        def conv(inputs, features, side, init):
            init = init or fan_in_uniform(inputs * side**2)
            kernel = (side, side)
            return nnx.Conv(
                inputs, features, kernel, kernel_init=init, bias_init=init, dtype=dtype, rngs=rngs
            )

        self.conv_in = conv(channels, hidden, kernel_size, None)
        init = nnx.initializers.zeros if zero_init else None
        self.conv_out = conv(hidden, features, out_kernel or kernel_size, init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, channels] -> [B, h, w, features], for any h and w."""
        return self.conv_out(nnx.relu(self.conv_in(x)))


class AffineCoupling(nnx.Module):
    """One half of the channels passes and conditions the other, as `flows.AffineCoupling`.

    Attributes:
      subnet: given as what makes it, `subnet(channels, features, rngs=rngs)`: the module that maps
        the passive half and what conditions it, [..., channels], to [..., features].
      clamp, swap: see `flows.AffineCoupling`.
    """

    def __init__(
        self,
        channels: int,
        subnet: Callable[..., nnx.Module] = ConvSubnet,
        clamp: float = 2.0,
        swap: bool = False,
        condition_channels: int = 0,
        *,
        rngs: nnx.Rngs,
    ):
        passive, active = half_channels(channels, swap)
        self.subnet = subnet(passive + condition_channels, 2 * active, rngs=rngs)
        self.clamp = clamp
        self.swap = swap

    def __call__(
        self, x: jax.Array, condition: jax.Array | None = None, *, inverse: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Transform x [..., C], conditioned on `condition` [..., D] where given."""
        return couple(x, self.subnet, condition, clamp=self.clamp, swap=self.swap, inverse=inverse)


class GlobalAffine(nnx.Module):
    """Learned scale and offset of each channel, as `flows.GlobalAffine`."""

    def __init__(self, channels: int, form: str = "softplus"):
        self.scale = nnx.Param(jnp.full(channels, unit_scale(form), jnp.float32))
        self.offset = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.form = form

    def __call__(self, x: jax.Array, *, inverse: bool = False) -> tuple[jax.Array, jax.Array]:
        """Transform x [..., C]; log_det [...] is the same number at every location."""
        raw, offset = self.scale[...], self.offset[...]
        return global_affine(x, raw, offset, form=self.form, inverse=inverse)


class Permute(nnx.Module):
    """A shuffle of the channels, drawn once from the "params" key, as `flows.Permute`."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.index = Permutation(draw_permutation(rngs.params(), channels))

    def __call__(self, x: jax.Array, *, inverse: bool = False) -> tuple[jax.Array, jax.Array]:
        """Shuffle x [..., C]; log_det [...] is zero."""
        return shuffle(x, self.index[...], inverse=inverse)


class FlowStep(nnx.Module):
    """Coupling, learned scale and offset, channel shuffle, as `flows.FlowStep`."""

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        hidden_ratio: float = 1.0,
        clamp: float = 2.0,
        coupling: str = "single",
        affine: str = "softplus",
        zero_init: bool = False,
        dtype: jnp.dtype | None = None,
        out_kernel: int | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        fields = (hidden_ratio, kernel_size, zero_init, dtype, out_kernel)

        def subnet(inputs, features, *, rngs):
            return ConvSubnet(inputs, features, *fields, rngs=rngs)

        coupled = partial(AffineCoupling, channels, subnet, clamp, rngs=rngs)
        self.coupling = coupled()
        self.coupling_swapped = coupled(swap=True) if is_double(coupling) else None
        self.affine = GlobalAffine(channels, affine)
        self.permute = Permute(channels, rngs=rngs)

    def __call__(self, x: jax.Array, *, inverse: bool = False) -> tuple[jax.Array, jax.Array]:
        """Transform x [B, h, w, C]; log_det [B, h, w]."""
        layers = [self.coupling, self.coupling_swapped, self.affine, self.permute]
        return compose([layer for layer in layers if layer is not None], x, inverse)


class Flow(nnx.Module):
    """A chain of steps whose kernels take turns, as `flows.Flow`, from whose fields it is made."""

    def __init__(
        self,
        channels: int,
        steps: int = 8,
        kernels: tuple[int, ...] = (3, 1),
        hidden_ratio: float = 1.0,
        clamp: float = 2.0,
        coupling: str = "single",
        affine: str = "softplus",
        zero_init: bool = False,
        dtype: jnp.dtype | None = None,
        reversible: bool = False,
        out_kernel: int | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        fields = (hidden_ratio, clamp, coupling, affine, zero_init, dtype, out_kernel)
        self.step = nnx.List(
            [
                FlowStep(channels, kernels[i % len(kernels)], *fields, rngs=rngs)
                for i in range(steps)
            ]
        )
        self.reversible = reversible

    def __call__(self, x: jax.Array, *, inverse: bool = False) -> tuple[jax.Array, jax.Array]:
        """Map features [B, h, w, C] to z of the same shape, or z back; log_det [B, h, w]."""
        if not self.reversible:
            return compose(self.step, x, inverse)
        parts = (nnx.split(step, nnx.Param, ...) for step in self.step)
        graphs, params, constants = zip(*parts, strict=True)
        return rebuilding(_apply, graphs, inverse, params, constants, x)


def _apply(graph, constants, params, x, inverse):
    return nnx.merge(graph, params, constants)(x, inverse=inverse)
