"""Cross-fitted scores of normal images: how unusual each one is among the others.

There are as many folds as parts: an image is scored as by k-NN (`knn.py`), with a memory bank of
other images, without those of the same part. Of these, the ones that are most similar as a whole
are taken, with all their locations, as in SPADE (arXiv 2005.02357). The nearest location decides,
because a rare but normal region is in few images; so defects that look alike hide each other.

The latents of a flow are compared in the same way, if there are any, with the same weight. The flow
may be trained on all of the images: only the comparison leaves an image out.

An image that differs as a whole, such as by its lighting, has no location that stands out. So the
score also has the distance of its `image_means`, whitened, to those of the nearest image.

Whitening and calibration use all images, since a single one hardly changes them.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from scipy.spatial.distance import cdist
from tqdm import tqdm

from fastflow_jax.config import default
from fastflow_jax.detectors.calibration import calibrate_on
from fastflow_jax.detectors.knn import KnnScorer
from fastflow_jax.detectors.nearest import nearest_squared_distances
from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import (
    Features,
    cached_features,
    image_means,
    in_batches,
    inside,
    whitening,
)

SIMILAR = 32  # images that an image is compared with
_SIDE = 16  # locations on the shorter side of a map that are scored; finer maps are thinned out
_FEWEST = 5  # parts
_WHOLE = 0.5  # weight of the image as a whole, relative to its locations
_FAR = 1e3  # value of the vectors of padding, which is then nearest to nothing


@dataclasses.dataclass(frozen=True)
class CrossFitted:
    """Scores of N images among each other."""

    scores: np.ndarray  # float32 [N], in standard deviations above the median, both robust
    maps: tuple[np.ndarray, ...]  # energies [N, h, w] of each scale, then of its latents
    scorer: KnnScorer  # calibrated on these maps; it has no memory bank

    def anomaly_maps(self, rows: np.ndarray) -> np.ndarray:
        """Anomaly maps of the images at `rows`, float32 [M, H, W]."""
        return _score(self.scorer, tuple(m[rows] for m in self.maps))[1]


def cross_fit(
    config: ConfigDict,
    features: Features,
    valid: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    *,
    latents: Features | None = None,
    similar: int = SIMILAR,
    label: str = "cross-fit",
) -> CrossFitted:
    """Scores each image by its distances to similar images of other parts.

    Args:
      config: the filled configuration of the features. Its detector is not used, and its fields of
        maps and scores are taken as their defaults.
      features: of N normal images, [N, h, w, C] per scale.
      valid: bool [N, H, W], False in padded pixels, or None if there is no padding.
      groups: int [N], equal for images of the same part, or None if each shows another part.
      latents: of the same images, [N, h, w, C] per scale; None to compare features only.
      similar: number of images that an image is compared with, if there are as many.
      label: of the progress bar.

    Raises:
      InputError: there are fewer than five images or, with groups, parts.
    """
    n = len(features[0])
    parts = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    if (n_parts := parts.max() + 1) < _FEWEST:
        what = "images" if groups is None else "groups of images"
        raise InputError(
            f"{n_parts} normal {what} are too few to compare each with the others. Add normal "
            f"images: at least {_FEWEST} {what} are needed."
        )
    means = image_means(features, valid)
    scale = means.std(0)
    others, _ = _nearest((means - means.mean(0)) / np.where(scale > 0, scale, 1.0), parts, similar)
    _, whole = _nearest(means @ whitening(np.cov(means.T)), parts, 1)
    maps = []
    total = n * (len(features) + len(latents or ()))
    with tqdm(total=total, desc=label, unit="map", leave=False, dynamic_ncols=True) as bar:
        for vectors, seen in _vectors(features, latents, valid):
            energies = []
            for i in range(n):
                bank = vectors[others[i]].reshape(-1, vectors.shape[-1])
                energies.append(np.asarray(_energies(_thinned(vectors[i : i + 1]), bank))[0])
                bar.update()
            maps.append(_without_padding(np.stack(energies), seen))
    scorer = _calibrated(config, tuple(maps))
    scores = _deviations(_score(scorer, tuple(maps))[0]) + _WHOLE * _deviations(whole[:, 0])
    return CrossFitted(_deviations(scores), tuple(maps), scorer)


def _nearest(vectors: np.ndarray, parts: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the nearest vectors of other parts, and their distances, [N, K] with K up to `most`.

    The nearest one is repeated if there are fewer of other parts.

    Args:
      vectors: [N, C].
      parts: int [N].
      most: largest K.
    """
    rows, distances = [], []
    for part, vector in zip(parts, vectors, strict=True):
        found = np.where(parts == part, np.inf, cdist(vector[None], vectors)[0])
        order = np.argsort(found, kind="stable")[: min(most, len(parts) - 1)]
        rows.append(np.where(np.isfinite(found[order]), order, order[0]))
        distances.append(found[rows[-1]])
    return np.stack(rows), np.stack(distances)


def _vectors(
    features: Features, latents: Features | None, valid: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yields the vectors to compare, float16 [N, h, w, C], and where they are not padding.

    They are the whitened features of each scale, then its latents.
    """
    statistics = cached_features(features, valid).statistics("whiten").values()
    functions = [functools.partial(_whiten, **of_scale) for of_scale in statistics]
    functions += [_far_in_padding] * len(latents or ())
    for function, maps in zip(functions, (*features, *(latents or ())), strict=True):
        seen = None if valid is None else np.asarray(inside(valid, maps.shape[1:3]))
        yield in_batches(lambda rows, f=function: f(*rows), (maps, seen), 32), seen


@jax.jit
def _whiten(maps, seen, mean, whitening):  # names of `channel_statistics`
    return _far_in_padding((maps.astype(jnp.float32) - mean) @ whitening, seen)


@jax.jit
def _far_in_padding(vectors, seen):
    """Vectors [B, h, w, C], `_FAR` from those of normal images where not `seen` [B, h, w]."""
    y = vectors.astype(jnp.float16)
    return y if seen is None else jnp.where(seen[..., None], y, jnp.float16(_FAR))


def _thinned(maps: np.ndarray) -> np.ndarray:
    """Every location of maps [B, h, w, ...], or of fine maps every second one, third one, ..."""
    step = max(1, min(maps.shape[1:3]) // _SIDE)
    return maps[:, step // 2 :: step, step // 2 :: step]


@jax.jit
def _energies(y, bank):
    """Squared distances of [1, h, w, C] to the nearest row of a bank [M, C], per channel."""
    return nearest_squared_distances(y.astype(jnp.float32), bank) / y.shape[-1]


def _without_padding(energies: np.ndarray, seen: np.ndarray | None) -> np.ndarray:
    """Energies [N, h, w] with the mean of the other locations of the image in padding."""
    if seen is None:
        return energies
    seen = _thinned(seen)
    mean = energies.mean((1, 2), where=seen, keepdims=True)
    return np.where(seen, energies, mean)


def _calibrated(config: ConfigDict, maps: tuple[np.ndarray, ...]) -> KnnScorer:
    """The scorer of `CrossFitted`."""
    c, usual = config.copy_and_resolve_references(), default()
    with c.unlocked():
        c.detector, c.map, c.score = "knn", usual.map, usual.score
    return KnnScorer(c, {}, calibrate_on(c, maps, np.ones(len(maps), np.float32)))


def _deviations(scores: np.ndarray) -> np.ndarray:
    """Standard deviations above the median, by the median absolute deviation."""
    above = scores - np.median(scores)
    return above / (1.4826 * np.median(np.abs(above)) or 1.0)


def _score(scorer: KnnScorer, maps: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    return in_batches(scorer.score_maps, maps, scorer.config.batch_size)
