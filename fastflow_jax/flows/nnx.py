"""The layers of `fastflow_jax.flows` as Flax NNX modules.

    flow = Flow(64, steps=4, rngs=nnx.Rngs(0))
    z, log_det = flow(x)                # x and z [B, h, w, 64], log_det [B, h, w]
    x, log_det = flow(z, inverse=True)

Each layer takes the number of channels, then the fields of the linen layer of the same name.
Parameters are `nnx.Param` and permutations `Permutation`, so `nnx.Optimizer(flow, ...,
wrt=nnx.Param)` trains the parameters only. Save both with a checkpoint.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from fastflow_jax import flows
from fastflow_jax.flows.chain import compose, rebuilding, step_fields
from fastflow_jax.flows.coupling import couple, half_channels

__all__ = [
    "AffineCoupling",
    "ConvSubnet",
    "Flow",
    "FlowStep",
    "GlobalAffine",
    "Permutation",
    "Permute",
]


@nnx.register_variable_name("permutations")
class Permutation(nnx.Variable):
    """Index of a `Permute`, int32 [C]: saved with the parameters, but not trained."""


class _LinenLayer(nnx.bridge.ToNNX):
    """A linen layer, initialised for `channels` channels; the variables have linen's names."""

    def __init__(self, layer: nn.Module, channels: int, rngs: nnx.Rngs, condition_channels=0):
        super().__init__(layer)
        widths = [channels, condition_channels] if condition_channels else [channels]
        inputs = [jnp.zeros((1, 1, 1, width), jnp.float32) for width in widths]
        self.lazy_init(*inputs, rngs=rngs.params())
        for name, value in list(vars(self).items()):
            if isinstance(value, Mapping) and not name.startswith("_"):
                setattr(self, name, _as_attributes(value))


def _as_attributes(tree: Any) -> Any:
    """Nested dicts as `nnx.Dict`, so that `step.permute.index` can be written."""
    if not isinstance(tree, Mapping):
        return tree
    return nnx.Dict({name: _as_attributes(value) for name, value in tree.items()})


class ConvSubnet(_LinenLayer):
    """Convolution, ReLU, convolution; [B, h, w, channels] -> [B, h, w, features]."""

    def __init__(self, channels: int, *fields: Any, rngs: nnx.Rngs, **named: Any):
        """Initialises the parameters.

        Args:
          channels: channels of the input.
          *fields: fields of `flows.ConvSubnet` in their order.
          rngs: keys; the parameters are drawn from "params".
          **named: the same by their names.
        """
        super().__init__(flows.ConvSubnet(*fields, **named), channels, rngs)


class GlobalAffine(_LinenLayer):
    """Learned scale and offset of each channel, see `flows.GlobalAffine`."""

    def __init__(self, channels: int, form: str = "softplus"):
        """Initialises the parameters.

        Args:
          channels: channels of the input.
          form: see `flows.GlobalAffine`.
        """
        super().__init__(flows.GlobalAffine(form), channels, nnx.Rngs(0))  # draws no numbers


class Permute(_LinenLayer):
    """Fixed shuffle of the channels, drawn from the "params" key; see `flows.Permute`."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        """Draws the permutation.

        Args:
          channels: channels of the input.
          rngs: keys; the permutation is drawn from "params".
        """
        super().__init__(flows.Permute(), channels, rngs)


class FlowStep(_LinenLayer):
    """Coupling, learned scale and offset, channel shuffle; [B, h, w, C], log_det [B, h, w]."""

    def __init__(
        self,
        channels: int,
        *fields: Any,
        condition_channels: int = 0,
        rngs: nnx.Rngs,
        **named: Any,
    ):
        """Initialises the parameters.

        Args:
          channels: channels of the input.
          *fields: fields of `flows.FlowStep` in their order.
          condition_channels: channels of the condition; 0 for none.
          rngs: keys; the parameters are drawn from "params".
          **named: the same by their names.
        """
        super().__init__(flows.FlowStep(*fields, **named), channels, rngs, condition_channels)


class AffineCoupling(nnx.Module):
    """Affine coupling with an NNX subnet; see `flows.AffineCoupling`.

    Attributes:
      subnet: made by `subnet(channels, features, rngs=rngs)`; maps the passive half and the
        condition, [..., channels], to [..., features].
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
        """Makes the subnet.

        Args:
          channels: channels of the input.
          subnet: called as `subnet(channels, features, rngs=rngs)`.
          clamp: bound of the log-scale.
          swap: whether the last C//2 channels are passive.
          condition_channels: channels of the condition; 0 for none.
          rngs: keys, passed to `subnet`.
        """
        passive, active = half_channels(channels, swap)
        self.subnet: Any = subnet(passive + condition_channels, 2 * active, rngs=rngs)
        self.clamp = clamp
        self.swap = swap

    def __call__(
        self, x: jax.Array, condition: jax.Array | None = None, *, inverse: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Transforms x [..., C], given `condition` [..., D] if there is one; log_det [...].

        Args:
          x: features [..., C], or transformed ones with `inverse`.
          condition: [..., D], a further input of the subnet; None for none.
          inverse: whether to compute the inverse.
        """
        return couple(x, self.subnet, condition, clamp=self.clamp, swap=self.swap, inverse=inverse)


class Flow(nnx.Module):
    """Chain of steps with alternating kernel sizes.

    Attributes:
      step: `nnx.List` of `FlowStep`.
      reversible: see `flows.Flow`.
    """

    def __init__(
        self,
        channels: int,
        *fields: Any,
        condition_channels: int = 0,
        rngs: nnx.Rngs,
        **named: Any,
    ):
        """Initialises the parameters of all steps.

        Args:
          channels: channels of the input.
          *fields: fields of `flows.Flow` in their order.
          condition_channels: channels of the condition; 0 for none.
          rngs: keys; the parameters are drawn from "params".
          **named: the same by their names.
        """
        flow = flows.Flow(*fields, **named)
        shared = {"condition_channels": condition_channels, "rngs": rngs}
        self.step = nnx.List(
            [FlowStep(channels, **shared, **step_fields(flow, i)) for i in range(flow.steps)]
        )
        self.reversible = flow.reversible

    def __call__(
        self, x: jax.Array, condition: jax.Array | None = None, *, inverse: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Maps features to latents, or latents to features, see `flows.Flow`.

        Args:
          x: features [B, h, w, C], or latents with `inverse`.
          condition: [B, h, w, D], see `flows.Flow`; None for none.
          inverse: whether to map latents to features.
        """
        if not self.reversible:
            return compose([partial(step, condition=condition) for step in self.step], x, inverse)
        parts = (nnx.split(step, nnx.Param, ...) for step in self.step)
        graphs, params, constants = zip(*parts, strict=True)
        given = tuple((each, condition) for each in constants)
        return rebuilding(_apply, graphs, inverse, params, given, x)


def _apply(graph, constants, params, x, inverse):
    variables, condition = constants
    return nnx.merge(graph, params, variables)(x, condition, inverse=inverse)
