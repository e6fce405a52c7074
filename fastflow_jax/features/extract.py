"""Features of images: the compressed feature maps of the frozen backbone."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax import parallel
from fastflow_jax.backbones import Backbone
from fastflow_jax.backbones.spec import Network
from fastflow_jax.data.pipeline import Batch
from fastflow_jax.errors import InputError

# [N, h, w, C] per scale, in one of `DTYPES`; cast to float32 before computing with them. Cached
# features are arrays in memory or on disk, or `features.cache.Rows` of such arrays.
Features = tuple[np.ndarray, ...]
DTYPES = ("float16", "bfloat16", "float32")


def compress(maps: Any, power: float) -> jax.Array:
    """Raises the length of each feature vector x of [B, h, w, C] to a power: x |x|^(power - 1).

    Contrast and exposure change the lengths of deep features much more than their directions. A
    power below 1 reduces the variation of the lengths, and is invertible. With 0, only directions
    would be left; 1 changes nothing.
    """
    if power == 1:
        return maps
    return maps * (jnp.linalg.norm(maps, axis=-1, keepdims=True) + 1e-6) ** (power - 1)


@parallel.cached_program
def maps_of(module: Network, length_power: float, dtype: str) -> Callable:
    """Returns the pure function `(variables, images [B, H, W, 3]) -> features [B, h, w, C]`."""

    def run(variables, images):
        maps = module.apply(variables, images)
        return tuple(compress(m, length_power).astype(dtype) for m in maps)

    return run


def extractor(
    backbone: Backbone, length_power: float, kind: str, batch_size: int, dtype: str
) -> Callable[[np.ndarray], Features]:
    """Returns the function images [b, H, W, 3] -> features [b, h, w, C] per scale.

    It runs on all devices of this process, and raises InputError if the features are out of the
    range of `dtype`. All features are computed by it, cached or not, so that they are rounded in
    the same way for training, calibration and scoring.

    Args:
      backbone: frozen backbone.
      length_power: see `compress`.
      kind: one of `parallel.KINDS`.
      batch_size: largest number of images, over all processes.
      dtype: one of `DTYPES`.
    """
    run = _compiled(backbone.module, length_power, dtype, kind, batch_size)
    variables = parallel.on_devices(backbone.variables)

    def extract(images):
        maps = run(variables, images)
        if dtype == "float16":  # the others have the range of float32
            _check_range(maps)
        return maps

    return extract


@parallel.cached_program
def _compiled(
    module: Network, length_power: float, dtype: str, kind: str, batch_size: int
) -> Callable:
    return parallel.per_own_example(maps_of(module, length_power, dtype), kind, batch_size)


def _check_range(maps: Features) -> None:
    """Raises InputError if features overflow, or if all of a scale are subnormal."""
    for m in maps:
        limits, largest = np.finfo(m.dtype), np.abs(m).max()
        if np.isinf(largest) or 0 < largest < limits.tiny:
            raise InputError(
                f"Features of this backbone are out of the range of {m.dtype}, {limits.tiny:.0e} "
                f"to {limits.max:.0e}. Pass --config.feature_dtype=bfloat16 or float32."
            )


# Added to the variance of each direction before whitening, as a fraction of their mean.
_SHRINKAGE = 0.5
# Minimum standard deviation of a channel, as a fraction of their median. In 32 images of each of
# three data sets, no channel of EfficientNet-Lite0's default maps was below 0.6.
_FLOOR = 0.05


class FeatureBatch(NamedTuple):
    """A `Batch` with the features of its images instead of the images."""

    features: Features  # [b, h, w, C] per scale
    mask: np.ndarray | None  # bool [b, H, W]
    label: np.ndarray  # int32 [b]
    index: np.ndarray  # int32 [b], position in the source
    # bool [b, H, W], False in padding and outside of the region of interest; None if all count
    valid: np.ndarray | None = None


Part = tuple[Features, np.ndarray | None]  # features of some images, and their `Batch.valid`


@dataclasses.dataclass(frozen=True)
class TrainingFeatures:
    """Features of the training images, computed once or in every epoch.

    Attributes:
      n: number of training images.
      shapes: (h, w, C) of each scale.
      stream: function of an epoch and rows [steps, b] that yields the features of the rows' images
        step by step. b is at most this process's share of the batch size.
      parts: function that yields the features of all images in order, each once.
      cached: features of all images; None if they are computed in every epoch.
      valid: bool [N, H, W], False in padded pixels and outside of the region of interest; None if
        all pixels count.
      on_device: whether the devices hold all cached features during training.
    """

    n: int
    shapes: tuple[tuple[int, ...], ...]
    stream: Callable[[int, np.ndarray], Iterator[Features]]
    parts: Callable[[], Iterable[Part]]
    cached: Features | None
    valid: np.ndarray | None = None
    on_device: bool = False
    _statistics: dict = dataclasses.field(default_factory=dict, init=False)

    def in_batches(self, size: int, chosen: np.ndarray | None = None) -> Iterator[Part]:
        """Yields `parts()` in batches of `size` images; the last batch may be smaller.

        Args:
          size: images per batch.
          chosen: bool [N], True for the images to yield; None for all.
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

    def with_valid(self, valid: np.ndarray) -> "TrainingFeatures":
        """The same features with other pixels that count, see `valid`."""

        def parts() -> Iterator[Part]:
            first = 0
            for maps, _ in self.parts():
                yield maps, valid[first : first + len(maps[0])]
                first += len(maps[0])

        return dataclasses.replace(self, valid=valid, parts=parts)

    def statistics(self, norm: str) -> dict:
        """`channel_statistics` of the training images, computed once."""
        if norm not in self._statistics:
            self._statistics[norm] = channel_statistics(self.parts(), norm)
        return self._statistics[norm]


def in_batches(function: Callable, arrays: Any, size: int) -> Any:
    """Applies a function to a tree of arrays, at most `size` rows at a time; joins the results."""
    return _joined(*map(function, _batches(arrays, size)))


def image_means(features: Features, valid: np.ndarray | None = None) -> np.ndarray:
    """Mean of each channel of all scales over the locations of each image, float64 [N, C].

    Args:
      features: [N, h, w, C] per scale.
      valid: bool [N, H, W], False in padded pixels, whose locations do not count; None if there is
        no padding.
    """

    def means(part: Part) -> np.ndarray:
        maps, valid = part
        return np.concatenate(channel_means(tuple(map(np.asarray, maps)), valid, np.float64), 1)

    return in_batches(means, (features, valid), 32)


def channel_means(maps: Any, valid: Any, dtype: Any) -> list[Any]:
    """Mean of each channel over the locations of each image, [B, C] per scale.

    Args:
      maps: [B, h, w, C] per scale, of numpy or JAX.
      valid: see `image_means`.
      dtype: of the computation.
    """
    found = []
    for m in maps:
        seen: Any = None if valid is None else inside(valid, m.shape[1:3])[..., None]
        if seen is None:
            found.append(m.astype(dtype).mean((1, 2)))
        else:
            seen = np.asarray(seen) if isinstance(m, np.ndarray) else seen
            found.append(m.astype(dtype).mean((1, 2), where=seen))
    return found


def _batches(arrays: Any, size: int) -> Iterator[Any]:
    """Yields trees of at most `size` rows of each array."""
    n = len(jax.tree.leaves(arrays)[0])
    return (_rows(arrays, slice(i, i + size)) for i in range(0, n, size))


def _rows(arrays: Any, rows: slice | np.ndarray) -> Any:
    """Rows of each array of a tree."""
    return jax.tree.map(operator.itemgetter(rows), arrays)


def _joined(*parts: Any) -> Any:
    """Trees of arrays, concatenated along the first axis."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def cached_features(
    maps: Features, valid: np.ndarray | None = None, on_device: bool = False
) -> TrainingFeatures:
    """Training features from cached ones; for the arguments see `TrainingFeatures`."""

    def stream(epoch, index):
        return (_rows(maps, rows) for rows in index)

    def parts():
        return _batches((maps, valid), 32)

    shapes = tuple(m.shape[1:] for m in maps)
    return TrainingFeatures(len(maps[0]), shapes, stream, parts, maps, valid, on_device)


def recomputed_features(
    n: int,
    batches_of: Callable[[int, np.ndarray, int], Iterable[Batch]],
    extract: Callable,
    batch_size: int,
    valid: np.ndarray | None = None,
) -> TrainingFeatures:
    """Training features that are computed from the images in every epoch.

    Args:
      n: number of training images.
      batches_of: function of an epoch, rows [M] and a batch size that yields batches of those
        images, augmented for that epoch.
      extract: see `extractor`.
      batch_size: batch size of `extract`.
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
    """Locations of a feature map that count: bool [b, h, w].

    A location counts if its valid share is more than half of the largest valid share of any
    location of the image.

    Args:
      valid: bool [b, H, W], False in pixels that do not count: padding, and pixels outside of the
        region of interest.
      size: (h, w) of the feature map.
    """
    share = jax.image.resize(jnp.asarray(valid, jnp.float32), (valid.shape[0], *size), "linear")
    return share > 0.5 * share.max((1, 2), keepdims=True)


def without_padding(scores: jax.Array, is_inside: jax.Array) -> jax.Array:
    """Replaces the scores of locations that do not count by the mean of the others of the image.

    They then neither change the mean score of an image nor the anomaly map next to them, and no
    maximum over locations or windows comes from them.

    Args:
      scores: [B, h, w], one per location.
      is_inside: bool [B, h, w], False in locations that do not count, see `inside`.
    """
    return jnp.where(is_inside, scores, scores.mean((1, 2), where=is_inside, keepdims=True))


def channel_statistics(parts: Iterable[Part], norm: str) -> dict:
    """Statistics of the training features that `model.FeatureNorm` needs, in one pass.

    Args:
      parts: features of some images each, and their padding masks.
      norm: "whiten" or "standardise"; the result is empty for other norms.

    Returns:
      The collection "statistics" of `model.FastFlow`, float32. Per scale: "mean" [C], and either
      "std" [C], which is at least 1/20 of its median over the channels, or "whitening" [C, C], see
      `whitening`.

    Raises:
      InputError: features are not finite.
    """
    if norm not in ("whiten", "standardise"):
        return {}
    statistics = {}
    for i, (mean, covariance) in enumerate(channel_moments(parts)):
        if norm == "standardise":
            scale = {"std": _floored(np.sqrt(np.diag(covariance)))}
        else:
            scale = {"whitening": whitening(covariance)}
        statistics[f"norm_{i}"] = {k: np.float32(v) for k, v in {"mean": mean, **scale}.items()}
    return statistics


def channel_moments(parts: Iterable[Part]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean [C] and covariance [C, C] of the training features of each scale, float64.

    Args:
      parts: features of some images each, and their padding masks.

    Raises:
      InputError: features are not finite.
    """
    moments: list[_Moments] = []
    for maps, valid in parts:
        moments = moments or [_Moments(m[0].mean((0, 1), dtype=np.float64)) for m in maps]
        for moment, m in zip(moments, maps, strict=True):
            moment.add(m if valid is None else m[np.asarray(inside(valid, m.shape[1:3]))])
    results = [moment.result() for moment in moments]
    if not all(np.isfinite(covariance).all() for _, covariance in results):
        raise InputError(
            "Features of the training images are not finite numbers. Check that the weights of "
            "the backbone are undamaged and belong to its architecture."
        )
    return results


def location_moments(
    train: TrainingFeatures, channels: list[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields mean [h, w, D] and covariance [h, w, D, D] of each location of each scale, float64.

    Images count where they are not padded.

    Args:
      train: features of the training images.
      channels: int [D] per scale, the channels to use.
    """
    for i, chosen in enumerate(channels):
        n = total = outer = guess = np.zeros(())
        for maps, valid in train.parts():
            x = maps[i][..., chosen].astype(np.float64)
            guess = guess if guess.ndim else x.mean((0, 1, 2))
            seen = np.ones(x.shape[:3]) if valid is None else inside(valid, x.shape[1:3])
            x = (x - guess) * np.asarray(seen)[..., None]
            n, total = n + np.asarray(seen).sum(0), total + x.sum(0)
            outer = outer + np.einsum("nhwc,nhwd->hwcd", x, x, optimize=True)
        counts = np.maximum(n, 1)[..., None]
        mean = total / counts
        yield guess + mean, outer / counts[..., None] - mean[..., None] * mean[..., None, :]


def whitening(covariance: np.ndarray, shrinkage: float = _SHRINKAGE) -> np.ndarray:
    """Symmetric (ZCA) whitening matrix [C, C] of standardised channels.

    A part of the mean variance is added to the variance of each direction, because noise would be
    amplified in directions of low variance.

    Args:
      covariance: [C, C].
      shrinkage: that part, half by default.
    """
    std = _floored(np.sqrt(np.diag(covariance)))
    values, vectors = np.linalg.eigh(covariance / np.outer(std, std))
    # The mean is 0 if all channels are constant.
    root = vectors / np.sqrt(values.clip(0) + shrinkage * (values.mean() or 1.0))
    return (root @ vectors.T) / std[:, None]


def _floored(std: np.ndarray) -> np.ndarray:
    """Standard deviations [C] with a minimum; all 1 if all channels are constant.

    Without a minimum, a channel that is almost constant in training would explode in images where
    it is not.
    """
    varying = std[std > 0]
    return np.maximum(std, _FLOOR * np.median(varying)) if len(varying) else np.ones_like(std)


class _Moments:
    """Mean and covariance of vectors, accumulated in float64 relative to a guess of the mean."""

    def __init__(self, guess: np.ndarray):
        self.guess, self.n = guess, 0
        self.sum, self.outer = np.zeros(len(guess)), np.zeros((len(guess), len(guess)))

    def add(self, maps: np.ndarray) -> None:
        """Adds all vectors of an array [..., C]."""
        x = maps.reshape(-1, maps.shape[-1]) - self.guess
        self.n += len(x)
        self.sum += x.sum(0)
        self.outer += x.T @ x

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [C] and covariance [C, C]."""
        mean = self.sum / self.n
        return self.guess + mean, self.outer / self.n - np.outer(mean, mean)
