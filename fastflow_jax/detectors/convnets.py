"""Small convolutional encoder and decoder, and their training: what the VAE and the GAN share.

Blocks of 2x2 pixels are folded into channels and back, so that every convolution has stride 1:
the strided form computes the same kind of thing, and its gradients are slow in XLA on a CPU. There
are no norms: batch norm would be state that changes in training, and nets so shallow do without.
"""

import pathlib
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax.detectors.scorer import Scorer
from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import Features, TrainingFeatures, inside
from fastflow_jax.training.loop import train_in
from fastflow_jax.training.step import Objective

_HALVINGS = 3


def fold(x: jax.Array) -> jax.Array:
    """[B, h, w, C] -> [B, ceil(h/2), ceil(w/2), 4C]; odd sides get a line of zeros."""
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
    """A map [B, h, w, C] -> what three convolutions see in it, [B, D], and numbers from it.

    Attributes:
      width: channels of the first convolution; each next one has twice as many.
      features: numbers that come out, [B, features].
    """

    width: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for i in range(_HALVINGS):
            x = nn.leaky_relu(nn.Conv(self.width * 2**i, (3, 3))(fold(x)), 0.2)
        seen = x.reshape(len(x), -1)
        return seen, nn.Dense(self.features)(seen)


class Decoder(nn.Module):
    """Numbers [B, D] -> a map [B, h, w, C]: the encoder's mirror image.

    Attributes:
      width: as of the encoder.
      shape: (h, w, C) of the map.
    """

    width: int
    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self, code: jax.Array) -> jax.Array:
        sizes = [self.shape[:2]]
        for _ in range(_HALVINGS):
            sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
        channels = [self.shape[2], *(self.width * 2**i for i in range(_HALVINGS))]
        height, width = sizes[-1]
        x = nn.Dense(height * width * channels[-1])(code)
        x = x.reshape(len(x), height, width, channels[-1])
        for i in reversed(range(_HALVINGS)):
            x = unfold(nn.Conv(4 * channels[i], (3, 3))(nn.leaky_relu(x, 0.2)), sizes[i])
        return x


def fit_one_map(
    config,
    objective: Objective,
    scorer: Callable[[dict], Scorer],
    features: TrainingFeatures,
    holdout: Features | None,
    holdout_valid: np.ndarray | None = None,
    *,
    seed: int,
    folder: pathlib.Path,
    beside: Sequence[tuple[int, pathlib.Path]] = (),
    on_epoch: Callable[[int, Callable[[], Scorer]], dict] = lambda epoch, scorer: {},
    progress: str = "train",
) -> Scorer:
    """Train a net that reconstructs one map.

    `objective` is what is trained, `scorer` makes what scores of the variables; the rest is that of
    `fastflow.scorer.fit`.

    Raises:
      InputError: the configuration names several maps.
      Interrupted, InputError: see `loop.train`.
    """
    if len(config.layers) != 1:
        raise InputError(
            f"a {config.detector} reconstructs one map: give one of config.layers, not "
            f"{', '.join(config.layers)}"
        )
    variables = train_in(
        folder,
        config,
        objective,
        features,
        holdout,
        holdout_valid,
        seed=seed,
        beside=beside,
        on_epoch=lambda epoch, variables, _: on_epoch(epoch, lambda: scorer(variables)),
        progress=progress,
    )
    return scorer(variables)


def only_map(features: Sequence[jax.Array]) -> jax.Array:
    """[B, h, w, C] in float32, of features that are one map."""
    (x,) = features
    return x.astype(jnp.float32)


def seen_of(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Which locations of a map [B, h, w, C] count, [B, h, w, 1]: 0 in padding, else 1."""
    if valid is None:
        return jnp.ones((*x.shape[:3], 1))
    return inside(valid, x.shape[1:3])[..., None].astype(jnp.float32)
