"""CFLOW: a conditional flow on the feature vector of each location, given its position.

Gudovskiy, Ishizaka & Kozuka, CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization
via Conditional Normalizing Flows (arXiv 2107.12571). As in the paper and its code: maps of strides
8, 16 and 32, a flow for each; a 2D encoding of the position is an input of each of 8 couplings;
subnets of two dense layers, the inner twice as wide as the input; clamp 1.9; the loss
-log sigmoid(log p), log p in nats per channel; scores from exp(log p) over its highest value,
summed over the scales. Differences:

    here                                            the reference code
    one Adam step per image batch, on a fiber of    the shuffled vectors of a batch in fibers of
    256 vectors per scale drawn from its images     256, a step for each, until none is left
    1,000 steps, cosine from 1e-3                   every vector 200 times, cosine from 2e-4
    channels are permuted (as in anomalib)          channels are rotated at random
    log p over its maximum on the training images   over that on the test images
    bilinear with half-pixel centres, then blurred  bilinear with aligned corners
    images as they are                              rotated by up to 5 degrees

So a score does not depend on the other test images, and training sees far fewer vectors: 256,000
per scale, whereas the reference shows each vector 200 times.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from fastflow_jax import parallel
from fastflow_jax.backbones import deepest_maps
from fastflow_jax.detectors.base import CompiledScorer, Method, compiled
from fastflow_jax.detectors.fastflow.model import Latents, location_energies
from fastflow_jax.detectors.maps import resize_map, where_counted
from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import TrainingFeatures, inside, without_padding
from fastflow_jax.files import read_arrays, write_arrays
from fastflow_jax.flows import AffineCoupling, ConvSubnet, GlobalAffine, Permute
from fastflow_jax.state import Slot, State, check, flatten, unflatten
from fastflow_jax.training.context import FitContext
from fastflow_jax.training.loop import READS, cached_by_config, read_variables, train_variables
from fastflow_jax.training.step import Objective, variable_slots

_MAXIMA = "likelihood_maxima.npz"


def layers(config: ConfigDict, spec: Any) -> tuple[str, ...]:
    """The deepest maps of strides 8, 16 and 32; the published map of a transformer."""
    return deepest_maps(spec, (8, 16, 32))


def fill(config: ConfigDict, spec: Any) -> None:
    """Checks the size of the position encoding, see `Method.fill`."""
    if config.cflow.encoding % 4:
        raise InputError(
            f"config.cflow.encoding must be a multiple of 4, not {config.cflow.encoding}."
        )


def fit(context: FitContext) -> "CFlowScorer":
    """Trains, and finds the highest likelihoods of the training images."""
    config = context.config

    def scorer(variables: dict, seed: int) -> CFlowScorer:
        return CFlowScorer(config, variables, maxima(config, variables, context.train))

    trained = scorer(train_variables(context, objective(config), scorer), context.seed)
    write_arrays(context.directory / _MAXIMA, {"log_likelihood": trained.maxima})
    return trained


def read(config, directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads what `fit` has saved, see `Method.read`."""
    highest = read_arrays(directory / _MAXIMA)["log_likelihood"]
    return flatten({**read_variables(directory), "maxima": highest})


def load(config, shapes, state: State) -> "CFlowScorer":
    """Rebuilds a scorer, see `Method.load`."""
    check(state, variable_slots(objective(config), shapes) | {"maxima": Slot((len(shapes),))})
    variables = unflatten(state)
    return CFlowScorer(config, variables, variables.pop("maxima"))


def position_encoding(height: int, width: int, size: int) -> np.ndarray:
    """Sines and cosines of column and row, [height, width, size] (section 4.2).

    In the first half, channels 2i and 2i+1 are sin(x f) and cos(x f) of the column x, with
    f = 10000^(-4i / size); the second half is the same for the row.
    """
    frequencies = 1e4 ** (-np.arange(0, size, 4) / size)  # [size / 4]

    def waves(n):
        angles = np.arange(n)[:, None] * frequencies
        return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(n, -1)  # [n, size / 2]

    columns = np.broadcast_to(waves(width)[None], (height, width, size // 2))
    rows = np.broadcast_to(waves(height)[:, None], (height, width, size // 2))
    return np.concatenate([columns, rows], -1).astype(np.float32)


class ConditionalFlow(nn.Module):
    """The flow of one scale: `steps` times a coupling, a learned scale and offset, a permutation.

    Each vector of x [B, h, w, C] is transformed by itself, given a condition [B, h, w, D].
    """

    steps: int = 8
    clamp: float = 1.9

    def setup(self):
        subnet = functools.partial(ConvSubnet, hidden_ratio=2.0, kernel_size=1)
        self.step = [
            (
                AffineCoupling(subnet, self.clamp, name=f"coupling_{i}"),
                GlobalAffine(name=f"affine_{i}"),
                Permute(name=f"permute_{i}"),
            )
            for i in range(self.steps)
        ]

    def __call__(
        self, x: jax.Array, condition: jax.Array, *, inverse: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Returns z of the shape of x, or x of z if `inverse`, and log_det [B, h, w]."""
        layers = [layer for step in self.step for layer in step]
        log_det = jnp.zeros(x.shape[:-1])
        for layer in reversed(layers) if inverse else layers:
            given = (condition,) if isinstance(layer, AffineCoupling) else ()
            x, change = layer(x, *given, inverse=inverse)
            log_det += change
        return x, log_det


class CFlow(nn.Module):
    """A conditional flow for each scale; attributes as in `ConditionalFlow`."""

    steps: int = 8
    clamp: float = 1.9

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], conditions: Sequence[jax.Array]) -> Latents:
        """Maps features [B, h, w, C] and conditions [B, h, w, D] to (z, log_det) per scale."""
        return tuple(
            ConditionalFlow(self.steps, self.clamp, name=f"flow_{i}")(
                x.astype(jnp.float32), condition
            )
            for i, (x, condition) in enumerate(zip(features, conditions, strict=True))
        )


@cached_by_config
def objective(config) -> Objective:
    """-log sigmoid(log p) of a fiber of each scale, summed over the scales (equation 6)."""
    model = _model(config)
    each = -(-config.cflow.fiber // config.train.batch_size)  # vectors of an image
    fresh = parallel.run_once(model.init)

    def init(key, features):
        return fresh(key, features, _conditions(config, features))

    def negative_log_likelihoods(variables, features, valid, keys):
        """Values per channel of the drawn vectors, [B, n] per scale, and their validity [B, n]."""
        drawn = []
        conditions = _conditions(config, features)
        for i, x in enumerate(features):
            seen = jnp.ones(x.shape[:3], bool) if valid is None else inside(valid, x.shape[1:3])
            scale_keys = jax.vmap(functools.partial(jax.random.fold_in, data=i))(keys)
            rows, counts = _draw(scale_keys, seen.reshape(len(seen), -1), each)
            drawn.append((_take(x, rows), _take(conditions[i], rows), counts))
        vectors, given, counts = zip(*drawn, strict=True)
        latents = cast(Latents, model.apply(variables, vectors, given))
        return [(-log_p[:, 0], c) for log_p, c in zip(_log_p(latents), counts, strict=True)]

    def loss(variables, features, valid, keys):
        losses = [
            jax.nn.softplus(nll).mean(1, where=counts)  # -log sigmoid(x) = log(1 + e^-x)
            for nll, counts in negative_log_likelihoods(variables, features, valid, keys)
        ]
        return jnp.sum(jnp.stack(losses), 0)

    def validation(variables, features, valid):
        """The loss of the same few locations of every image, which is enough to follow training."""
        keys = jnp.broadcast_to(jax.random.key(0), (len(features[0]),))
        return loss(variables, features, valid, keys)

    return Objective(init, loss, validation)


def maxima(config, variables: dict, features: TrainingFeatures) -> np.ndarray:
    """The highest log p per channel of each scale over all training images, [scales]."""
    run = compiled(_highest, FrozenConfigDict(config))
    batches = features.in_batches(config.batch_size)
    return np.concatenate([run(variables, batch) for batch in batches]).max(0)


def _highest(config, variables, batch):
    """The highest log p of each image and scale, [B, scales]."""
    features, valid = batch
    log_p = _log_p_of(config, variables, features)
    if valid is not None:
        log_p = [jnp.where(inside(valid, m.shape[1:]), m, -jnp.inf) for m in log_p]
    return jnp.stack([m.max((1, 2)) for m in log_p], -1)


def _score(config, size, state, batch):
    """Scores [B] and anomaly maps [B, *size] of a batch, see `CompiledScorer.function`."""
    return _score_with_likelihood(config, size, state, batch)[:2]


def _score_with_likelihood(config, size, state, batch):
    """Scores, anomaly maps and log-likelihoods of a batch, see `CompiledScorer.with_likelihood`."""
    variables, highest = state
    features, valid = batch
    log_p = _log_p_of(config, variables, features)
    maps = [jnp.exp(m - top) for m, top in zip(log_p, highest, strict=True)]
    if valid is not None:
        maps = [without_padding(m, inside(valid, m.shape[1:])) for m in maps]
    resized = [resize_map(m, size, config.map.sigma) for m in maps]
    anomaly_map = where_counted(-sum(resized, start=jnp.zeros(())), valid)
    return anomaly_map.max((1, 2)), anomaly_map, _likelihood(features, valid, log_p)


def _likelihood(features, valid, log_p) -> jax.Array:
    """Log-likelihood of each image's features in nats per dimension, [B]."""
    total = dimensions = jnp.zeros(())
    for x, m in zip(features, log_p, strict=True):
        seen = jnp.ones(m.shape, bool) if valid is None else inside(valid, m.shape[1:])
        total += x.shape[-1] * m.sum((1, 2), where=seen)
        dimensions += x.shape[-1] * seen.sum((1, 2))
    return total / dimensions


@dataclasses.dataclass(frozen=True)
class CFlowScorer(CompiledScorer):
    """Scores by the likelihoods of locations."""

    function = staticmethod(_score)
    with_likelihood = staticmethod(_score_with_likelihood)
    config: ConfigDict  # filled
    variables: dict
    maxima: np.ndarray  # see `maxima`

    def arrays(self) -> tuple[dict, np.ndarray]:
        """Variables of the flows, and the highest likelihoods."""
        return self.variables, self.maxima

    def state_dict(self) -> dict[str, np.ndarray]:
        """See `Scorer.state_dict`."""
        return flatten({**self.variables, "maxima": self.maxima})


def _model(config) -> CFlow:
    return CFlow(config.cflow.steps, config.cflow.clamp)


def _conditions(config, features: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Position encodings of each scale, [B, h, w, D]."""
    encodings = (position_encoding(m.shape[1], m.shape[2], config.cflow.encoding) for m in features)
    pairs = zip(features, encodings, strict=True)
    return tuple(jnp.broadcast_to(e, (m.shape[0], *e.shape)) for m, e in pairs)


def _log_p(latents: Latents) -> list[jax.Array]:
    """Log-likelihood per channel in nats, [B, h, w] per scale."""
    constant = 0.5 * math.log(2 * math.pi)
    return [
        -location_energies(z, log_det, form="log", log_det_weight=1.0) - constant
        for z, log_det in latents
    ]


def _log_p_of(config, variables, features) -> list[jax.Array]:
    """`_log_p` of features [B, h, w, C] per scale."""
    latents = _model(config).apply(variables, features, _conditions(config, features))
    return _log_p(cast(Latents, latents))


def _draw(keys: jax.Array, seen: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Draws up to n valid locations of each image without repetition.

    Args:
      keys: [B].
      seen: bool [B, locations].
      n: number of locations; all if there are fewer.

    Returns:
      Indices int32 [B, n], and bool [B, n], False if an image has too few valid locations.
    """
    noise = jax.vmap(lambda key: jax.random.uniform(key, seen.shape[1:]))(keys)
    values, rows = jax.lax.top_k(jnp.where(seen, noise, -1.0), min(n, seen.shape[1]))
    return rows, values >= 0


def _take(maps: jax.Array, rows: jax.Array) -> jax.Array:
    """Vectors of maps [B, h, w, C] at locations [B, n], [B, 1, n, C]."""
    vectors = maps.reshape(len(maps), -1, maps.shape[-1])
    return jnp.take_along_axis(vectors, rows[..., None], axis=1)[:, None]


METHOD = Method(
    title="CFLOW",
    fit=fit,
    read=read,
    load=load,
    layers=layers,
    fields={
        "cflow": {
            "steps": 8,  # of each scale's flow
            "clamp": 1.9,  # bound of a coupling's log-scale
            "encoding": 128,  # channels of the position encoding, a multiple of 4
            "fiber": 256,  # locations of each scale that a training step draws from its images
        }
    },
    recipe={
        "length_power": 1.0,
        "train": {
            "steps": 1000,
            "max_epochs": 10**6,
            "batch_size": 32,
            "learning_rate": 1e-3,
            "beta2": 0.999,
            "clip": 0.0,
        },
        "checkpoint_every": 10,
    },
    fill=fill,
    reads=("cflow", *READS),
    bounds={
        "cflow.steps": (1, 1000),
        "cflow.clamp": (1e-3, 100),
        "cflow.encoding": (4, 10**6),
        "cflow.fiber": (1, 10**9),
    },
)
