"""GANomaly: a generator that reconstructs normal images, and codes that tell when it fails.

Akcay, Atapour-Abarghouei & Breckon, GANomaly: Semi-Supervised Anomaly Detection via Adversarial
Training (arXiv 1805.06725): the generator encodes an image to z and decodes it, a second encoder
makes z' of the reconstruction, and a discriminator tells image from reconstruction. The score is
the distance of z and z', their mean absolute difference (equation 5); the map is the absolute
difference of image and reconstruction. GANomaly and not f-AnoGAN (Schlegl et al., 2019), since it
is one training of all nets together, where f-AnoGAN trains a Wasserstein GAN with five steps of
the critic for each of the generator's, and then an encoder for it.

As in the paper: the three losses and their weights 1, 50 and 1 (equation 4), a code of 100
numbers. Otherwise: small nets without batch norm, see `convnets`; no tanh at the end of the
generator, so that other maps than images can be reconstructed; both players take each step at once
and not in turn; the default momentum of Adam.
"""

import pathlib
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastflow_jax.detectors.convnets import Decoder, Encoder, fit_one_map, only_map, seen_of
from fastflow_jax.detectors.fastflow.model import resize_map
from fastflow_jax.detectors.scorer import Scorer
from fastflow_jax.features.extract import inside, without_padding
from fastflow_jax.training.loop import once_a_configuration, trained_in
from fastflow_jax.training.step import Objective

# Fields of the configuration that differ from the default. The gradient is not clipped: a norm
# over both players would tie one to the other.
RECIPE = {
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
}


def layers(spec) -> tuple[str, ...]:
    """The image itself; of another backbone the last published map."""
    return spec.layers[-1:]


def fit(config, *images, **how) -> Scorer:
    """Trains, see `fastflow.scorer.fit` and `convnets.fit_one_map` for arguments and errors."""
    return fit_one_map(config, objective(config), partial(_scorer, config), *images, **how)


def load(config, shapes, folder: pathlib.Path) -> Scorer:
    """The scorer that `fit` left in a folder; see `fastflow.scorer.load`."""
    return _scorer(config, trained_in(folder, config, objective(config), shapes))


class Generator(nn.Module):
    """Encoder, decoder, and the second encoder.

    Attributes:
      width: see `convnets.Encoder`.
      latent: numbers in a code.
    """

    width: int
    latent: int

    @nn.compact
    def __call__(self, x: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Reconstruct.

        Args:
          x: [B, h, w, C].
          seen: [B, h, w, 1], 0 in padding.

        Returns:
          z [B, latent], the reconstruction [B, h, w, C], and z' [B, latent].
        """
        _, z = Encoder(self.width, self.latent, name="encoder")(seen * x)
        reconstruction = Decoder(self.width, x.shape[1:], name="decoder")(z)
        _, z_again = Encoder(self.width, self.latent, name="second_encoder")(seen * reconstruction)
        return z, reconstruction, z_again


@once_a_configuration
def objective(config) -> Objective:
    """The losses of both players in one number, of which each player sees its own.

    The discriminator's parameters are held constant in the generator's loss, and the reconstruction
    in the discriminator's: the gradient of the sum by either's parameters is that of its own loss.
    """
    generator, discriminator = _generator(config), Encoder(config.gan.width, 1)
    fresh, fresh_judge = jax.jit(generator.init), jax.jit(discriminator.init)

    def init(key, features):
        x = only_map(features)
        keys = jax.random.split(key)
        made = fresh(keys[0], x, jnp.ones((*x.shape[:3], 1)))
        judge = fresh_judge(keys[1], x)
        return {"params": {"generator": made["params"], "discriminator": judge["params"]}}

    def loss(variables, features, valid, keys):
        players = variables["params"]
        x = only_map(features)
        seen = seen_of(x, valid)
        made = generator.apply({"params": players["generator"]}, x, seen)
        fixed = jax.lax.stop_gradient(players["discriminator"])
        return generator_loss(config, fixed, x, seen, *made) + discriminator_loss(
            config, players["discriminator"], seen * x, seen * jax.lax.stop_gradient(made[1])
        )

    def validation(variables, features, valid):
        """The generator's: the two players' sum says nothing of how far they are."""
        players = variables["params"]
        x = only_map(features)
        seen = seen_of(x, valid)
        made = generator.apply({"params": players["generator"]}, x, seen)
        return generator_loss(config, players["discriminator"], x, seen, *made)

    return Objective(init, loss, validation)


def generator_loss(config, judge, x, seen, z, reconstruction, z_again) -> jax.Array:
    """What the generator makes small, [B] (equations 1 to 4).

    `judge` are the discriminator's parameters, `x` and `seen` what the generator took, and the rest
    is what it gave.
    """
    discriminator = Encoder(config.gan.width, 1)
    real, _ = discriminator.apply({"params": judge}, seen * x)
    fake, _ = discriminator.apply({"params": judge}, seen * reconstruction)
    adversarial = jnp.mean((real - fake) ** 2, axis=-1)  # of what the discriminator sees
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
    """Cross-entropy of taking images [B, h, w, C] for real and reconstructions for fake, [B]."""
    discriminator = Encoder(config.gan.width, 1)
    _, of_real = discriminator.apply({"params": judge}, real)
    _, of_fake = discriminator.apply({"params": judge}, fake)
    return 0.5 * (jax.nn.softplus(-of_real) + jax.nn.softplus(of_fake))[:, 0]


def _scorer(config, variables) -> Scorer:
    return Scorer(config, variables, _score)


@once_a_configuration
def _score(config) -> Callable:
    """See `Scorer.function_of`."""
    generator = _generator(config)

    def score(variables, batch, size):
        features, valid = batch
        x = only_map(features)
        params = {"params": variables["params"]["generator"]}
        z, reconstruction, z_again = generator.apply(params, x, seen_of(x, valid))
        difference = jnp.abs(x - reconstruction).mean(-1)
        if valid is not None:
            difference = without_padding(difference, inside(valid, difference.shape[1:]))
        return jnp.abs(z - z_again).mean(-1), resize_map(difference, size)

    return score


def _generator(config) -> Generator:
    return Generator(config.gan.width, config.gan.latent)
