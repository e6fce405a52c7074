"""CFLOW: a flow on the feature vector of each location, told where the location lies.

Gudovskiy, Ishizaka & Kozuka, CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization
via Conditional Normalizing Flows (arXiv 2107.12571). As in the paper and its code: maps of strides
8, 16 and 32, a flow for each; a 2D encoding of the position beside the passive half of each of 8
couplings; subnets of two dense layers, the inner twice as wide as what comes in; clamp 1.9; the
loss -log sigmoid(log p), log p in nats per channel; scores from exp(log p) over its highest value,
summed over the scales. Otherwise:

    here                                            the reference code
    one Adam step an image batch, on a fiber of     the shuffled vectors of a batch in fibers of
    256 vectors a scale drawn from all its images   256, a step for each, until none is left
    1,000 steps, cosine from 1e-3                   every vector 200 times, cosine from 2e-4
    channels are permuted (as in anomalib)          channels are rotated at random
    log p over its maximum on the training images   over that on the test images
    bilinear with half-pixel centres                bilinear with aligned corners
    images as they are                              turned by up to 5 degrees

So a score does not hang on what else is tested, and training sees far fewer vectors: 256,000 of a
scale, where the reference shows each of theirs 200 times.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax import parallel
from fastflow_jax.backbones import deepest_maps
from fastflow_jax.detectors.fastflow.model import Latents, location_scores, resize_map
from fastflow_jax.detectors.scorer import Scorer
from fastflow_jax.features.extract import Features, TrainingFeatures, inside, without_padding
from fastflow_jax.files import read_arrays, write_arrays
from fastflow_jax.flows import AffineCoupling, ConvSubnet, GlobalAffine, Permute
from fastflow_jax.training.loop import once_a_configuration, train_in, trained_in
from fastflow_jax.training.step import Objective

_MAXIMA = "likelihood_maxima.npz"

# Fields of the configuration that differ from the default; a step sees 256 vectors a scale.
RECIPE = {
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
}


def layers(spec) -> tuple[str, ...]:
    """The deepest maps of strides 8, 16 and 32; the published cut of a transformer."""
    return deepest_maps(spec, (8, 16, 32))


def fit(
    config,
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
    """Train, and find the highest likelihoods of the training images; see `fastflow.scorer.fit`."""

    def scorer(variables):
        return scorer_of(config, variables, maxima(config, variables, features))

    variables = train_in(
        folder,
        config,
        objective(config),
        features,
        holdout,
        holdout_valid,
        seed=seed,
        beside=beside,
        on_epoch=lambda epoch, variables, _: on_epoch(epoch, lambda: scorer(variables)),
        progress=progress,
    )
    trained = scorer(variables)
    write_arrays(folder / _MAXIMA, {"log_likelihood": trained.state[1]})
    return trained


def load(config, shapes, folder: pathlib.Path) -> Scorer:
    """The scorer that `fit` left in a folder; see `fastflow.scorer.load`."""
    variables = trained_in(folder, config, objective(config), shapes)
    return scorer_of(config, variables, read_arrays(folder / _MAXIMA)["log_likelihood"])


def position_encoding(height: int, width: int, size: int) -> np.ndarray:
    """Sines and cosines of column and row, [height, width, size] (section 4.2).

    Of the first half, channels 2i and 2i+1 are sin(x f) and cos(x f) of the column x, with
    f = 10000^(-4i / size); of the second half the same of the row.
    """
    frequencies = 1e4 ** (-np.arange(0, size, 4) / size)  # [size / 4]

    def waves(n):
        angles = np.arange(n)[:, None] * frequencies
        return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(n, -1)  # [n, size / 2]

    columns = np.broadcast_to(waves(width)[None], (height, width, size // 2))
    rows = np.broadcast_to(waves(height)[:, None], (height, width, size // 2))
    return np.concatenate([columns, rows], -1).astype(np.float32)


class ConditionalFlow(nn.Module):
    """The flow of one scale: coupling, learned scale and offset, shuffle, `steps` times.

    Vectors x [B, h, w, C] are transformed each for itself, given a condition [B, h, w, D].
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
        """Z of the shape of x, or x of z; log_det [B, h, w]."""
        layers = [layer for step in self.step for layer in step]
        log_det = jnp.zeros(x.shape[:-1])
        for layer in reversed(layers) if inverse else layers:
            given = (condition,) if isinstance(layer, AffineCoupling) else ()
            x, change = layer(x, *given, inverse=inverse)
            log_det += change
        return x, log_det


class CFlow(nn.Module):
    """A conditional flow for each scale; attributes as of `ConditionalFlow`."""

    steps: int = 8
    clamp: float = 1.9

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], conditions: Sequence[jax.Array]) -> Latents:
        """Features [B, h, w, C] and conditions [B, h, w, D] a scale -> z and log_det a scale."""
        return tuple(
            ConditionalFlow(self.steps, self.clamp, name=f"flow_{i}")(
                x.astype(jnp.float32), condition
            )
            for i, (x, condition) in enumerate(zip(features, conditions, strict=True))
        )


@once_a_configuration
def objective(config) -> Objective:
    """-log sigmoid(log p) of a fiber of each scale, summed over the scales (equation 6)."""
    model = _model(config)
    each = -(-config.cflow.fiber // config.train.batch_size)  # vectors of an image
    fresh = jax.jit(model.init)

    def init(key, features):
        return fresh(key, features, _conditions(config, features))

    def negative_log_likelihoods(variables, features, valid, keys):
        """Of the drawn vectors per channel, [B, n] a scale, and which of them count, [B, n]."""
        drawn = []
        conditions = _conditions(config, features)
        for i, x in enumerate(features):
            seen = jnp.ones(x.shape[:3], bool) if valid is None else inside(valid, x.shape[1:3])
            scale_keys = jax.vmap(functools.partial(jax.random.fold_in, data=i))(keys)
            rows, counts = _draw(scale_keys, seen.reshape(len(seen), -1), each)
            drawn.append((_take(x, rows), _take(conditions[i], rows), counts))
        vectors, given, counts = zip(*drawn, strict=True)
        latents = model.apply(variables, vectors, given)
        return [(-log_p[:, 0], c) for log_p, c in zip(_log_p(latents), counts, strict=True)]

    def loss(variables, features, valid, keys):
        return sum(
            jax.nn.softplus(nll).mean(1, where=counts)  # -log sigmoid(x) = log(1 + e^-x)
            for nll, counts in negative_log_likelihoods(variables, features, valid, keys)
        )

    def validation(variables, features, valid):
        """The same few locations of every image: enough to see where training stands."""
        keys = jnp.broadcast_to(jax.random.key(0), (len(features[0]),))
        return loss(variables, features, valid, keys)

    return Objective(init, loss, validation)


def maxima(config, variables: dict, features: TrainingFeatures) -> np.ndarray:
    """The highest log p per channel of each scale over all training images, [scales]."""
    run = _highest(config)
    size = config.batch_size
    parts = []
    for part in features.parts():
        n = len(part[0][0])
        for i in range(0, n, size):
            parts.append(run(variables, jax.tree.map(lambda a, i=i: a[i : i + size], part)))
    return np.concatenate(parts).max(0)


@once_a_configuration
def _highest(config) -> Callable:
    """(variables, (features, valid)) -> the highest log p of each image and scale, [B, scales]."""
    model = _model(config)

    def highest(variables, batch):
        maps, valid = batch
        log_p = _log_p(model.apply(variables, maps, _conditions(config, maps)))
        if valid is not None:
            log_p = [jnp.where(inside(valid, m.shape[1:]), m, -jnp.inf) for m in log_p]
        return jnp.stack([m.max((1, 2)) for m in log_p], -1)

    return parallel.per_example(highest, config.parallel, config.batch_size)


def scorer_of(config, variables: dict, maxima: np.ndarray) -> Scorer:
    """What scores with these variables, and the `maxima` that go with them."""
    return Scorer(config, (variables, maxima), _score, _likelihood)


@once_a_configuration
def _score(config) -> Callable:
    """See `Scorer.function_of`."""
    model = _model(config)

    def score(state, batch, size):
        variables, maxima = state
        features, valid = batch
        log_p = _log_p(model.apply(variables, features, _conditions(config, features)))
        maps = [jnp.exp(m - highest) for m, highest in zip(log_p, maxima, strict=True)]
        if valid is not None:
            maps = [without_padding(m, inside(valid, m.shape[1:])) for m in maps]
        anomaly_map = -sum(resize_map(m, size) for m in maps)
        return anomaly_map.max((1, 2)), anomaly_map

    return score


@once_a_configuration
def _likelihood(config) -> Callable:
    """See `Scorer.log_likelihood_of`; in nats per dimension of the features."""
    model = _model(config)

    def log_likelihood(state, batch):
        features, valid = batch
        log_p = _log_p(model.apply(state[0], features, _conditions(config, features)))
        total = dimensions = 0.0
        for x, m in zip(features, log_p, strict=True):
            seen = jnp.ones(m.shape, bool) if valid is None else inside(valid, m.shape[1:])
            total += x.shape[-1] * m.sum((1, 2), where=seen)
            dimensions += x.shape[-1] * seen.sum((1, 2))
        return total / dimensions

    return log_likelihood


def _model(config) -> CFlow:
    return CFlow(config.cflow.steps, config.cflow.clamp)


def _conditions(config, features: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The encoded positions of each scale's map, [B, h, w, D]."""
    return tuple(
        jnp.broadcast_to(encoding, (len(m), *encoding.shape))
        for m in features
        for encoding in [position_encoding(*m.shape[1:3], config.cflow.encoding)]
    )


def _log_p(latents: Latents) -> list[jax.Array]:
    """Log-likelihood per channel in nats, [B, h, w] a scale."""
    return [
        -location_scores(z, log_det, form="log", log_det_weight=1.0) - 0.5 * math.log(2 * math.pi)
        for z, log_det in latents
    ]


def _draw(keys: jax.Array, seen: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Up to n locations of each image without repetition, of those seen.

    Args:
      keys: [B].
      seen: bool [B, locations].
      n: how many; all where there are fewer.

    Returns:
      int32 [B, n] and bool [B, n], False where an image has too few.
    """
    noise = jax.vmap(lambda key: jax.random.uniform(key, seen.shape[1:]))(keys)
    values, rows = jax.lax.top_k(jnp.where(seen, noise, -1.0), min(n, seen.shape[1]))
    return rows, values >= 0


def _take(maps: jax.Array, rows: jax.Array) -> jax.Array:
    """The vectors of [B, h, w, C] at locations [B, n], as [B, 1, n, C]."""
    vectors = maps.reshape(len(maps), -1, maps.shape[-1])
    return jnp.take_along_axis(vectors, rows[..., None], axis=1)[:, None]
