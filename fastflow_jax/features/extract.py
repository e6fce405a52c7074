"""Features of the frozen backbone, computed once for each image."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax import parallel
from fastflow_jax.backbones import Backbone
from fastflow_jax.data.pipeline import Batch
from fastflow_jax.errors import InputError

# One [N, h, w, C] a scale, of any of `DTYPES`: cast to float32 before reckoning with them. Kept
# ones are arrays in memory or on disk, or `features.cache.Rows` of these.
Features = tuple[np.ndarray, ...]
DTYPES = ("float16", "bfloat16", "float32")


def compress(maps: jax.Array, power: float) -> jax.Array:
    """X -> x |x|^(power - 1) for each feature vector of [B, h, w, C]: its length to the power.

    The direction of a deep feature says what is there, its length how strongly; contrast and
    exposure move lengths far and directions little. A power below 1 keeps both, invertibly, in
    proportions that a likelihood can use. Zero would leave directions alone, 1 changes nothing.
    """
    if power == 1:
        return maps
    return maps * (jnp.linalg.norm(maps, axis=-1, keepdims=True) + 1e-6) ** (power - 1)


@functools.lru_cache(maxsize=4)  # JAX traces the same function once
def maps_of(module: nn.Module, length_power: float, dtype: str) -> Callable:
    """`(variables, images [B, H, W, 3])` -> what the flows see of the images, purely."""

    def run(variables, images):
        maps = module.apply(variables, images)
        return tuple(compress(m, length_power).astype(dtype) for m in maps)

    return run


def extractor(
    backbone: Backbone, length_power: float, kind: str, batch_size: int, dtype: str
) -> Callable[[np.ndarray], Features]:
    """Images [b, H, W, 3] -> `maps_of` them, on all devices of this process.

    b is up to this process's share of `batch_size`.

    All features come from here, whether they are kept or not, so that a type of few bits rounds
    those that are trained on, calibrated with and scored alike.

    Raises (the function that is returned):
      InputError: the type cannot hold the features.
    """
    run = _compiled(backbone.module, length_power, dtype, kind, batch_size)
    variables = parallel.on_devices(backbone.variables)

    def extract(images):
        maps = run(variables, images)
        if dtype == "float16":  # the others reach as far as float32
            _check_range(maps)
        return maps

    return extract


@functools.lru_cache(maxsize=4)  # one program for all passes over images, whatever the weights
def _compiled(module, length_power, dtype, kind, batch_size) -> Callable:
    return parallel.per_own_example(maps_of(module, length_power, dtype), kind, batch_size)


def _check_range(maps: Features) -> None:
    """Refuse features that overflowed, and such as are all below what keeps its precision."""
    for m in maps:
        largest = np.abs(m).max()
        if np.isinf(largest) or 0 < largest < np.finfo(m.dtype).tiny:
            limits = np.finfo(m.dtype)
            raise InputError(
                f"features of this backbone are out of the range of {m.dtype}, {limits.tiny:.0e} "
                f"to {limits.max:.0e}: choose --config.feature_dtype=bfloat16 or float32"
            )


# Added to the variance of each direction before whitening, in units of their mean.
_SHRINKAGE = 0.5
# Lowest deviation of a channel, in units of their median. In 32 images of each of three sets no
# channel of EfficientNet-Lite0's default maps was below .6.
_FLOOR = 0.05

Part = tuple[Features, np.ndarray | None]  # of some images, and their `Batch.valid`


@dataclasses.dataclass(frozen=True)
class TrainingFeatures:
    """The features of the training images, computed once or again in every epoch."""

    n: int
    shapes: tuple[tuple[int, ...], ...]  # (h, w, C) of each scale
    # (epoch, rows [steps, b]) -> the features of each row's images, step by step; b up to this
    # process's share of the batch
    stream: Callable[[int, np.ndarray], Iterator[Features]]
    parts: Callable[[], Iterable[Part]]  # of all images, once and in order
    cached: Features | None  # all of them, where they do not change from epoch to epoch
    valid: np.ndarray | None = None  # bool [N, H, W], false in padding; None without padding
    on_device: bool = False  # in training the devices are to hold all that are cached
    _statistics: dict = dataclasses.field(default_factory=dict, init=False)

    def in_batches(self, size: int, chosen: np.ndarray | None = None) -> Iterator[Part]:
        """`parts()` in batches of `size`, the last of what is left; or only what is chosen of them.

        Args:
          size: images a batch.
          chosen: bool [N]; None for all.
        """
        chosen = np.ones(self.n, bool) if chosen is None else chosen
        waiting, first = [], 0
        for part in self.parts():
            here = chosen[first : first + len(part[0][0])]
            first += len(here)
            part = _joined(*waiting, _rows(part, here))
            while len(part[0][0]) >= size:
                yield _rows(part, slice(size))
                part = _rows(part, slice(size, None))
            waiting = [part] if len(part[0][0]) else []
        yield from waiting

    def statistics(self, norm: str) -> dict:
        """See `channel_statistics`; computed once."""
        if norm not in self._statistics:
            self._statistics[norm] = channel_statistics(self.parts(), norm)
        return self._statistics[norm]


def in_batches(function: Callable, arrays: Any, size: int) -> Any:
    """`function(arrays)` of a tree of arrays, up to `size` of their rows at a time, joined."""
    rows = [slice(i, i + size) for i in range(0, len(jax.tree.leaves(arrays)[0]), size)]
    return _joined(*(function(_rows(arrays, r)) for r in rows))


def _rows(arrays: Any, rows: slice | np.ndarray) -> Any:
    """Of each array of a tree."""
    return jax.tree.map(operator.itemgetter(rows), arrays)


def _joined(*parts: Any) -> Any:
    """Trees of arrays, the rows of one after those of the other."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def cached_features(
    maps: Features, valid: np.ndarray | None = None, on_device: bool = False
) -> TrainingFeatures:
    """Training features that are kept; for `valid` and `on_device` see `TrainingFeatures`."""

    def stream(epoch, index):
        return (tuple(m[rows] for m in maps) for rows in index)

    def parts():
        for i in range(0, n, 32):
            part = slice(i, i + 32)
            yield tuple(m[part] for m in maps), None if valid is None else valid[part]

    n = len(maps[0])
    shapes = tuple(m.shape[1:] for m in maps)
    return TrainingFeatures(n, shapes, stream, parts, maps, valid, on_device)


def recomputed_features(
    n: int,
    batches_of: Callable[[int, np.ndarray, int], Iterable[Batch]],
    extract: Callable,
    batch_size: int,
    valid: np.ndarray | None = None,
) -> TrainingFeatures:
    """Training features that come from the images again in every epoch.

    Args:
      n: number of training images.
      batches_of: (epoch, rows [M], batch size) -> batches of those images, as they are to be seen
        in that epoch.
      extract: see `extractor`.
      batch_size: that `extract` is made for.
      valid: see `TrainingFeatures`.
    """

    def stream(epoch, index):
        for batch in batches_of(epoch, index.ravel(), index.shape[1]):
            yield extract(batch.image)

    def read(rows, size):
        for batch in batches_of(0, rows, size):
            yield extract(batch.image), batch.valid

    def parts():
        return parallel.shared_out(read, np.arange(n), batch_size)

    shapes = tuple(m.shape[1:] for m in next(iter(parts()))[0])
    return TrainingFeatures(n, shapes, stream, parts, None, valid)


def inside(valid: jax.Array | np.ndarray, size: tuple[int, ...]) -> jax.Array:
    """Which locations of a map lie in the image, not in padding: bool [b, h, w].

    A location counts as padding where more than half of it is, by what of its image lies most
    inside.

    Args:
      valid: bool [b, H, W], false in padding.
      size: (h, w) of the map.
    """
    share = jax.image.resize(jnp.asarray(valid, jnp.float32), (len(valid), *size), "linear")
    return share > 0.5 * share.max((1, 2), keepdims=True)


def without_padding(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Location scores [B, h, w] in which padding has the mean of the rest of its image.

    So it adds nothing to a score, and nothing of it reaches the map around it.

    Args:
      scores: of all locations.
      seen: bool [B, h, w], see `inside`.
    """
    return jnp.where(seen, scores, scores.mean((1, 2), where=seen, keepdims=True))


def channel_statistics(parts: Iterable[Part], norm: str) -> dict:
    """What `model.FeatureNorm` has to know of the training set, in one pass.

    Args:
      parts: features of some images each, with what of them is no padding.
      norm: "whiten" or "standardise"; the norms of single images need nothing.

    Returns:
      The collection "statistics" of `model.FastFlow`, float32: the mean of each channel, and its
      deviation (at least a twentieth of the median) or the symmetric matrix that whitens (ZCA),
      half way: half of the mean variance is added to each direction's. Otherwise directions in
      which channels hardly vary would be amplified to noise.
    """
    if norm not in ("whiten", "standardise"):
        return {}
    moments = None
    for maps, valid in parts:
        moments = moments or [_Moments(m[0].mean((0, 1), dtype=np.float64)) for m in maps]
        for moment, m in zip(moments, maps, strict=True):
            seen = ... if valid is None else np.asarray(inside(valid, m.shape[1:3]))
            moment.add(m[seen])
    statistics = {}
    for i, moment in enumerate(moments):
        mean, covariance = moment.result()
        if not np.isfinite(covariance).all():
            raise InputError(
                "features of the training images are no finite numbers: are the backbone's weights "
                "damaged, or of another model?"
            )
        std = _floored(np.sqrt(np.diag(covariance)))
        if norm == "standardise":
            scale = {"std": std}
        else:
            values, vectors = np.linalg.eigh(covariance / np.outer(std, std))
            # All channels may be constant, as on a map of one place of one image.
            root = vectors / np.sqrt(values.clip(0) + _SHRINKAGE * (values.mean() or 1.0))
            scale = {"whitening": (root @ vectors.T) / std[:, None]}
        statistics[f"norm_{i}"] = {k: np.float32(v) for k, v in {"mean": mean, **scale}.items()}
    return statistics


def _floored(std: np.ndarray) -> np.ndarray:
    """Deviations, float [C], that can be divided by.

    A channel that hardly ever fires in training would otherwise explode where it does fire. If no
    channel changes, all deviations are 1.
    """
    varying = std[std > 0]
    return np.maximum(std, _FLOOR * np.median(varying)) if len(varying) else np.ones_like(std)


class _Moments:
    """Mean and covariance of vectors in float64, of sums about a guess at the mean."""

    def __init__(self, guess: np.ndarray):
        self.guess, self.n, self.sum, self.outer = guess, 0, 0.0, 0.0

    def add(self, maps: np.ndarray) -> None:
        """All vectors of an array [..., C]."""
        x = maps.reshape(-1, maps.shape[-1]) - self.guess
        self.n += len(x)
        self.sum += x.sum(0)
        self.outer += x.T @ x

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        mean = self.sum / self.n
        return self.guess + mean, self.outer / self.n - np.outer(mean, mean)
