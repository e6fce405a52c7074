"""Small convolutional encoder and decoder, and other functions that VAE and GAN share.

Blocks of 2x2 pixels are folded into channels and back, so that every convolution has stride 1:
gradients of strided convolutions are slow in XLA on CPUs. There are no normalisation layers: the
networks are shallow, and batch norm would be state that changes in training.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fastflow_jax.detectors.base import Scorer
from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import inside
from fastflow_jax.training.context import FitContext
from fastflow_jax.training.loop import train_variables
from fastflow_jax.training.step import Objective

_HALVINGS = 3


def fold(x: jax.Array) -> jax.Array:
    """Folds 2x2 blocks, [B, h, w, C] -> [B, ceil(h/2), ceil(w/2), 4C]; pads odd sides with 0."""
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // 2, w // 2, 4 * c)


def unfold(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The inverse of `fold`: [B, h, w, 4C] -> [B, *size, C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, 2 * h, 2 * w, c // 4)[:, : size[0], : size[1]]


class Encoder(nn.Module):
    """Encodes maps [B, h, w, C] to activations of three convolutions [B, D] and a code.

    Attributes:
      width: channels of the first convolution; each next one has twice as many.
      features: size of the code, [B, features].
    """

    width: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for i in range(_HALVINGS):
            x = nn.leaky_relu(nn.Conv(self.width * 2**i, (3, 3))(fold(x)), 0.2)
        activations = x.reshape(len(x), -1)
        return activations, nn.Dense(self.features)(activations)


class Decoder(nn.Module):
    """Decodes codes [B, D] to maps [B, h, w, C]; mirrors the encoder.

    Attributes:
      width: see `Encoder`.
      shape: (h, w, C) of the map.
    """

    width: int
    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self, code: jax.Array) -> jax.Array:
        sizes = [self.shape[:2]]
        for _ in range(_HALVINGS):
            height, width = sizes[-1]
            sizes.append((-(-height // 2), -(-width // 2)))
        channels = [self.shape[2], *(self.width * 2**i for i in range(_HALVINGS))]
        height, width = sizes[-1]
        x = nn.Dense(height * width * channels[-1])(code)
        x = x.reshape(len(x), height, width, channels[-1])
        for i in reversed(range(_HALVINGS)):
            x = unfold(nn.Conv(4 * channels[i], (3, 3))(nn.leaky_relu(x, 0.2)), sizes[i])
        return x


def layers(config: ConfigDict, spec: Any) -> tuple[str, ...]:
    """The image itself with the backbone `pixels`; of other backbones the last published map."""
    return spec.layers[-1:]


def fit_one_map(
    context: FitContext, objective: Objective, make_scorer: Callable[[dict], Scorer]
) -> Scorer:
    """Trains a network that reconstructs one map.

    Args:
      context: of the training.
      objective: the loss to minimise.
      make_scorer: variables -> scorer.

    Raises:
      InputError: the configuration names several maps, or training diverged.
      Interrupted: see `loop.train`.
    """
    config = context.config
    if len(config.layers) != 1:
        raise InputError(
            f"The detector {config.detector} reconstructs one map. Set config.layers to one of "
            f"{', '.join(config.layers)}."
        )
    return make_scorer(train_variables(context, objective, lambda v, seed: make_scorer(v)))


def apply(module: nn.Module, variables: dict, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Applies a module that returns a tuple of arrays."""
    return cast(tuple[jax.Array, ...], module.apply(variables, *arrays))


def only_map(features: Sequence[jax.Array]) -> jax.Array:
    """The map [B, h, w, C] of features with one scale, in float32."""
    (x,) = features
    return x.astype(jnp.float32)


def validity(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Float [B, h, w, 1], 0 in padded locations of a map [B, h, w, C] and 1 elsewhere."""
    if valid is None:
        return jnp.ones((*x.shape[:3], 1))
    return inside(valid, x.shape[1:3])[..., None].astype(jnp.float32)
