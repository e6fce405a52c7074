"""VAE: reconstruction probability under a variational autoencoder of normal images.

Kingma & Welling, Auto-Encoding Variational Bayes (arXiv 1312.6114): the code z is Gaussian, the
decoder returns mean and variance of every value of the image, and training maximises the evidence
lower bound with one z per image. The score is the reconstruction probability of An & Cho,
Variational Autoencoder based Anomaly Detection using Reconstruction Probability (SNU, 2015),
algorithm 4: the mean of log p(x | z) over several z ~ q(z | x), negated, per value of the image.
The anomaly map is the same for each pixel.

The networks are small and convolutional, see `convnets`; An & Cho use dense layers. The noise of
the codes in scoring is the same for all images, so that a score does not depend on other images.
"""

import dataclasses
import math
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

_LOWEST_LOG_VARIANCE = -6.0  # deviations of 0.05 or more, in images from -1 to 1


def fit(context: FitContext) -> Scorer:
    """Trains the networks, see `convnets.fit_one_map`."""
    config = context.config
    return fit_one_map(context, objective(config), partial(VAEScorer, config))


def read(config, directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads what `fit` has saved, see `Method.read`."""
    return flatten(read_variables(directory))


def load(config, shapes, state: State) -> "VAEScorer":
    """Rebuilds a scorer, see `Method.load`."""
    check(state, variable_slots(objective(config), shapes))
    return VAEScorer(config, unflatten(state))


class VAE(nn.Module):
    """Encoder and decoder of maps [B, h, w, C].

    Attributes:
      width: see `convnets.Encoder`.
      latent: size of a code z.
    """

    width: int
    latent: int

    @nn.compact
    def __call__(self, x: jax.Array, noise: jax.Array) -> tuple[jax.Array, ...]:
        """Encodes maps, draws codes and decodes them.

        Args:
          x: [B, h, w, C].
          noise: standard normal, [L, B, latent]: L codes for each map.

        Returns:
          Mean and log-variance of q(z | x), [B, latent] each, and of p(x | z), [L, B, h, w, C].
        """
        _, code = Encoder(self.width, 2 * self.latent, name="encoder")(x)
        mean, log_variance = jnp.split(code, 2, axis=-1)
        z = mean + jnp.exp(0.5 * log_variance) * noise  # [L, B, latent]
        h, w, c = x.shape[1:]
        decoder = Decoder(self.width, (h, w, 2 * c), name="decoder")
        out = decoder(z.reshape(-1, self.latent)).reshape(*z.shape[:2], h, w, 2 * c)
        x_mean, raw = jnp.split(out, 2, axis=-1)
        x_log_variance = _LOWEST_LOG_VARIANCE + jax.nn.softplus(raw - _LOWEST_LOG_VARIANCE)
        return mean, log_variance, x_mean, x_log_variance


def divergence(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """KL(N(mean, variance) || N(0, 1)) in nats, [B, D] -> [B] (appendix B)."""
    return 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance, axis=-1)


def negative_log_density(x: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """-log N(x; mean, variance) of each value in nats."""
    squares = (x - mean) ** 2 * jnp.exp(-log_variance)
    return 0.5 * (squares + log_variance + math.log(2 * math.pi))


@cached_by_config
def objective(config) -> Objective:
    """The negative evidence lower bound, in nats per value (equation 10)."""
    model = _model(config)
    fresh = parallel.run_once(model.init)

    def init(key, features):
        x = only_map(features)
        return fresh(key, x, jnp.zeros((1, len(x), config.vae.latent)))

    def bound(variables, features, valid, noise):
        x = only_map(features)
        seen = validity(x, valid)
        mean, log_variance, *density = apply(model, variables, x * seen, noise[None])
        nll = (seen * negative_log_density(x, *density)[0]).sum((1, 2, 3))
        values = x.shape[-1] * seen.sum((1, 2, 3))
        return (nll + divergence(mean, log_variance)) / values

    def loss(variables, features, valid, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (config.vae.latent,)))(keys)
        return bound(variables, features, valid, noise)

    def validation(variables, features, valid):
        noise = _noise(config, 1)[0]
        return bound(variables, features, valid, jnp.tile(noise, (len(features[0]), 1)))

    return Objective(init, loss, validation)


def _score(config, size, variables, batch):
    """Scores [B] and anomaly maps [B, *size] of a batch, see `CompiledScorer.function`."""
    features, valid = batch
    x = only_map(features)
    seen = validity(x, valid)
    noise = _noise(config, config.vae.samples)[:, None]  # [L, 1, latent]
    noise = jnp.tile(noise, (1, len(x), 1))
    _, _, *density = apply(_model(config), variables, x * seen, noise)
    nll = negative_log_density(x, *density).mean((0, -1))  # [B, h, w]
    if valid is not None:
        nll = without_padding(nll, inside(valid, nll.shape[1:]))
    return nll.mean((1, 2)), where_counted(resize_map(nll, size, config.map.sigma), valid)


@dataclasses.dataclass(frozen=True)
class VAEScorer(CompiledScorer):
    """Scores by the reconstruction probability."""

    function = staticmethod(_score)
    config: ConfigDict  # filled
    variables: dict

    def arrays(self) -> dict:
        """The variables of the networks."""
        return self.variables

    def state_dict(self) -> dict[str, np.ndarray]:
        """See `Scorer.state_dict`."""
        return flatten(self.variables)


def _noise(config, samples: int) -> jax.Array:
    """Fixed noise of codes, [samples, latent]."""
    return jax.random.normal(jax.random.key(0), (samples, config.vae.latent))


def _model(config) -> VAE:
    return VAE(config.vae.width, config.vae.latent)


METHOD = Method(
    title="VAE",
    fit=fit,
    read=read,
    load=load,
    layers=convnets.layers,
    fields={
        "vae": {
            "width": 16,  # channels of the first convolution; each next one has twice as many
            "latent": 64,  # size of the code of an image
            "samples": 8,  # codes per image in scoring
        }
    },
    recipe={
        "backbone": "pixels",
        "length_power": 1.0,
        "train": {"steps": 1000, "max_epochs": 200, "batch_size": 64, "learning_rate": 2e-3},
        "heatmaps": 10,
    },
    reads=("vae", *READS),
    bounds={"vae.width": (1, 10**4), "vae.latent": (1, 10**6), "vae.samples": (1, 10**4)},
)
