"""GANomaly: distance between the codes of an image and of its reconstruction by a GAN.

Akcay, Atapour-Abarghouei & Breckon, GANomaly: Semi-Supervised Anomaly Detection via Adversarial
Training (arXiv 1805.06725). The generator encodes an image to z and decodes it, a second encoder
encodes the reconstruction to z', and a discriminator is trained to distinguish image and
reconstruction. The image score is the mean absolute difference of z and z' (equation 5); the
anomaly map is the absolute difference of image and reconstruction. GANomaly is used and not
f-AnoGAN (Schlegl et al., 2019), because it trains all networks together.

As in the paper: three losses with the weights 1, 50 and 1 (equation 4), and a code of size 100.
Differences: small networks without batch norm, see `convnets`; no tanh at the end of the generator,
so that it can reconstruct other maps than images; generator and discriminator are updated in the
same step; the default momentum of Adam.
"""

import dataclasses
import pathlib
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fastflow_jax import parallel
from fastflow_jax.detectors import convnets
from fastflow_jax.detectors.base import CompiledScorer, Method, Scorer
from fastflow_jax.detectors.convnets import (
    Decoder,
    Encoder,
    apply,
    fit_one_map,
    only_map,
    validity,
)
from fastflow_jax.detectors.maps import resize_map, where_counted
from fastflow_jax.features.extract import inside, without_padding
from fastflow_jax.state import State, check, flatten, unflatten
from fastflow_jax.training.context import FitContext
from fastflow_jax.training.loop import READS, cached_by_config, read_variables
from fastflow_jax.training.step import Objective, variable_slots


def fit(context: FitContext) -> Scorer:
    """Trains the networks, see `convnets.fit_one_map`."""
    config = context.config
    return fit_one_map(context, objective(config), partial(GANScorer, config))


def read(config, directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads what `fit` has saved, see `Method.read`."""
    return GANScorer(config, read_variables(directory)).state_dict()


def load(config, shapes, state: State) -> "GANScorer":
    """Rebuilds a scorer, see `Method.load`."""
    slots = variable_slots(objective(config), shapes).items()
    check(state, {name: slot for name, slot in slots if name.startswith("params/generator/")})
    return GANScorer(config, unflatten(state))


class Generator(nn.Module):
    """Encoder, decoder, and the second encoder.

    Attributes:
      width: see `convnets.Encoder`.
      latent: size of a code.
    """

    width: int
    latent: int

    @nn.compact
    def __call__(self, x: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Encodes, reconstructs and encodes again.

        Args:
          x: [B, h, w, C].
          seen: [B, h, w, 1], 0 in padded locations and 1 elsewhere.

        Returns:
          z [B, latent], the reconstruction [B, h, w, C], and z' [B, latent].
        """
        h, w, c = x.shape[1:]
        _, z = Encoder(self.width, self.latent, name="encoder")(seen * x)
        reconstruction = Decoder(self.width, (h, w, c), name="decoder")(z)
        _, z_again = Encoder(self.width, self.latent, name="second_encoder")(seen * reconstruction)
        return z, reconstruction, z_again


@cached_by_config
def objective(config) -> Objective:
    """The sum of the losses of generator and discriminator.

    The parameters of the discriminator are constants in the loss of the generator, and the
    reconstruction is a constant in the loss of the discriminator. So the gradient of the sum with
    respect to the parameters of either network is the gradient of its own loss.
    """
    generator, discriminator = _generator(config), Encoder(config.gan.width, 1)
    fresh, fresh_judge = map(parallel.run_once, (generator.init, discriminator.init))

    def init(key, features):
        x = only_map(features)
        keys = jax.random.split(key)
        made = fresh(keys[0], x, jnp.ones((*x.shape[:3], 1)))
        judge = fresh_judge(keys[1], x)
        return {"params": {"generator": made["params"], "discriminator": judge["params"]}}

    def loss(variables, features, valid, keys):
        players = variables["params"]
        x = only_map(features)
        seen = validity(x, valid)
        made = apply(generator, {"params": players["generator"]}, x, seen)
        fixed = jax.lax.stop_gradient(players["discriminator"])
        return generator_loss(config, fixed, x, seen, *made) + discriminator_loss(
            config, players["discriminator"], seen * x, seen * jax.lax.stop_gradient(made[1])
        )

    def validation(variables, features, valid):
        """The loss of the generator; the sum does not measure progress."""
        players = variables["params"]
        x = only_map(features)
        seen = validity(x, valid)
        made = apply(generator, {"params": players["generator"]}, x, seen)
        return generator_loss(config, players["discriminator"], x, seen, *made)

    return Objective(init, loss, validation)


def generator_loss(config, judge, x, seen, z, reconstruction, z_again) -> jax.Array:
    """The loss of the generator, [B] (equations 1 to 4).

    Args:
      config: filled.
      judge: parameters of the discriminator.
      x: [B, h, w, C].
      seen: [B, h, w, 1], 0 in padded locations and 1 elsewhere.
      z: code of x, [B, latent].
      reconstruction: of x, [B, h, w, C].
      z_again: code of the reconstruction, [B, latent].
    """
    discriminator = Encoder(config.gan.width, 1)
    real, _ = apply(discriminator, {"params": judge}, seen * x)
    fake, _ = apply(discriminator, {"params": judge}, seen * reconstruction)
    adversarial = jnp.mean((real - fake) ** 2, axis=-1)  # of the activations
    difference = jnp.abs(seen * (x - reconstruction)).mean(-1)
    contextual = difference.sum((1, 2)) / seen.sum((1, 2, 3))
    encoder = jnp.mean((z - z_again) ** 2, axis=-1)
    weights = config.gan
    return (
        weights.adversarial * adversarial
        + weights.contextual * contextual
        + weights.encoder * encoder
    )


def discriminator_loss(config, judge, real, fake) -> jax.Array:
    """Cross-entropy of the discriminator on images and reconstructions [B, h, w, C], [B]."""
    discriminator = Encoder(config.gan.width, 1)
    _, of_real = apply(discriminator, {"params": judge}, real)
    _, of_fake = apply(discriminator, {"params": judge}, fake)
    return 0.5 * (jax.nn.softplus(-of_real) + jax.nn.softplus(of_fake))[:, 0]


def _score(config, size, params, batch):
    """Scores [B] and anomaly maps [B, *size] of a batch, see `CompiledScorer.function`."""
    features, valid = batch
    x = only_map(features)
    z, reconstruction, z_again = apply(_generator(config), params, x, validity(x, valid))
    difference = jnp.abs(x - reconstruction).mean(-1)
    if valid is not None:
        difference = without_padding(difference, inside(valid, difference.shape[1:]))
    anomaly_map = where_counted(resize_map(difference, size, config.map.sigma), valid)
    return jnp.abs(z - z_again).mean(-1), anomaly_map


@dataclasses.dataclass(frozen=True)
class GANScorer(CompiledScorer):
    """Scores by the distance of the codes of an image and of its reconstruction."""

    function = staticmethod(_score)
    config: ConfigDict  # filled
    variables: dict

    def arrays(self) -> dict:
        """The variables of the generator."""
        return {"params": self.variables["params"]["generator"]}

    def state_dict(self) -> dict[str, np.ndarray]:
        """The variables of the generator, see `Scorer.state_dict`."""
        return flatten({"params": {"generator": self.variables["params"]["generator"]}})


def _generator(config) -> Generator:
    return Generator(config.gan.width, config.gan.latent)


METHOD = Method(
    title="GANomaly",
    fit=fit,
    read=read,
    load=load,
    layers=convnets.layers,
    fields={
        "gan": {
            "width": 16,  # channels of the first convolution; each next one has twice as many
            "latent": 100,  # size of the code of an image
            "adversarial": 1.0,  # weight of this loss of the generator
            "contextual": 50.0,  # likewise
            "encoder": 1.0,  # likewise
        }
    },
    # The gradient is not clipped: a norm over both players would make one depend on the other.
    recipe={
        "backbone": "pixels",
        "length_power": 1.0,
        "train": {
            "steps": 1000,
            "max_epochs": 200,
            "batch_size": 64,
            "learning_rate": 1e-3,
            "beta2": 0.999,
            "clip": 0.0,
        },
        "heatmaps": 10,
    },
    reads=("gan", *READS),
    bounds={
        "gan.width": (1, 10**4),
        "gan.latent": (1, 10**6),
        "gan.adversarial": (0, 1e6),
        "gan.contextual": (0, 1e6),
        "gan.encoder": (0, 1e6),
    },
)
