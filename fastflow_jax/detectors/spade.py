"""SPADE: distances to the most similar normal images, and of each pixel to the pixels of those.

Cohen and Hoshen, Sub-Image Anomaly Detection with Deep Pyramid Correspondences (arXiv 2005.02357);
the code that its figures are compared with is github.com/byungjae89/SPADE-pytorch.

As in the paper: an image's score is its mean distance to the nearest training images, by the mean
of the last level (section 3.2); a pixel's is the mean distance to its kappa nearest among all
pixels of those images (section 3.3). As in the reference: five images, not fifty; Euclidean
distances, not squared; each level by itself, the mean of their maps, then a blur. Ours: no gallery
row is dropped, and the blur grows with the maps. Of a transformer the one map serves as the level,
and its mean token as the image's vector.
"""

import dataclasses
import functools
import operator
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax import parallel
from fastflow_jax.backbones import deepest_maps
from fastflow_jax.detectors.fastflow.model import resize_map
from fastflow_jax.detectors.nearest import nearest
from fastflow_jax.detectors.pickling import PickledByFields
from fastflow_jax.detectors.scorer import without_likelihood
from fastflow_jax.features.extract import Features, TrainingFeatures, inside, without_padding
from fastflow_jax.files import read_arrays, write_arrays

_GALLERY = "checkpoints/gallery.npz"

# Fields of the configuration that differ from the default.
RECIPE = {"length_power": 1.0, "data": {"holdout": 0.0}}


def layers(spec) -> tuple[str, ...]:
    """Levels 1 to 3 of the paper, by their strides, and the last one for the image's vector."""
    return deepest_maps(spec, (4, 8, 16, 32))


def fit(
    config,
    features: TrainingFeatures,
    holdout: Features | None,
    holdout_valid: np.ndarray | None = None,
    *,
    seed: int,
    folder: pathlib.Path,
    beside: Sequence[tuple[int, pathlib.Path]] = (),
    on_epoch: Callable | None = None,
    progress: str = "train",
) -> "SpadeScorer":
    """Keep the features of all training images, where they are and in the folder.

    Args:
      config: filled, see `config.fill`.
      features: of the training images.
      holdout: not used.
      holdout_valid: not used.
      seed: not used: nothing is drawn.
      folder: gets the features, as `checkpoints/gallery.npz`.
      beside: not used.
      on_epoch: not used: there are no epochs.
      progress: not used.
    """
    if parallel.on_main((folder / _GALLERY).exists):
        return load(config, features.shapes, folder)
    maps = features.cached
    if maps is None:
        parts = [part for part, _ in features.parts()]
        maps = tuple(map(np.concatenate, zip(*parts, strict=True)))
    gallery = {f"maps_{i}": m for i, m in enumerate(maps)}
    if features.valid is not None:
        gallery["valid"] = features.valid
    (folder / _GALLERY).parent.mkdir(parents=True, exist_ok=True)
    write_arrays(folder / _GALLERY, gallery)
    return SpadeScorer(config, maps, features.valid)


def load(config, shapes, folder: pathlib.Path) -> "SpadeScorer":
    """The scorer that `fit` left in a folder, see `fastflow.scorer.load`."""
    gallery = read_arrays(folder / _GALLERY)
    maps = (gallery[f"maps_{i}"] for i in range(len(shapes)))
    # A file of numpy's knows bfloat16 by its bits alone.
    maps = tuple(m.view(jnp.bfloat16) if m.dtype.kind == "V" else m for m in maps)
    return SpadeScorer(config, maps, gallery.get("valid"))


@dataclasses.dataclass(frozen=True)
class SpadeScorer(PickledByFields):
    """Scores features; higher is more anomalous."""

    config: object  # filled, see `config.fill`
    maps: Features  # of the training images
    valid: np.ndarray | None  # bool [N, H, W], False in their padding; None without padding

    def score_features(
        self,
        features: Features,
        valid: np.ndarray | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features of images -> scores [B] and anomaly maps [B, H, W].

        Args: see `FastFlowScorer.score_features`.
        """
        scores, images = self._retrieve(self._vectors, _vectors(features, valid))
        levels = slice(max(1, len(features) - 1))  # the last is the image's vector alone
        query = features[levels], valid

        def nothing_yet(maps):
            pixels = images.shape[1] * maps.shape[1] * maps.shape[2]
            kappa = min(self.config.spade.kappa, pixels)
            return np.full((*maps.shape[:3], kappa), np.inf, np.float32)

        found = tuple(map(nothing_yet, query[0]))
        for rank in range(images.shape[1]):  # a batch of the gallery at a time
            rows = operator.itemgetter(images[:, rank])
            gallery = jax.tree.map(rows, (self.maps[levels], self.valid))
            found = self._compare(None, (query, gallery, found))
        draw = self._programs(tuple(size or self.config.image_size))
        return scores, draw(None, (found, valid))

    predict_features = without_likelihood

    @functools.cached_property
    def _vectors(self) -> jax.Array:
        """Of the training images, [N, C]."""
        return parallel.on_devices(_vectors(self.maps, self.valid))

    @functools.cached_property
    def _retrieve(self):
        """(training vectors, vectors [B, C]) -> scores [B], indices [B, K] of training images."""
        images = self.config.spade.images

        def retrieve(known, vectors):
            centre = known.mean(0)
            k = min(images, len(known))
            distances, index = nearest(vectors - centre, known - centre, k)
            return distances.mean(-1), index

        return _compiled(self.config, retrieve)

    @functools.cached_property
    def _compare(self):
        """(None, (query, gallery, distances so far)) -> the kappa smallest, [B, h, w, kappa]."""

        def compare(_, batch):
            (maps, _), (gallery, gallery_valid), found = batch

            def level(query, known, found):
                counts = None
                if gallery_valid is not None:
                    counts = inside(gallery_valid, known.shape[1:3]).reshape(len(known), -1)

                def one(pair):  # image at a time: the distances of all would take much memory
                    query, known, counts, found = pair
                    query, known = (
                        m.reshape(-1, m.shape[-1]).astype(jnp.float32) for m in (query, known)
                    )
                    centre = known.mean(0)
                    kappa = found.shape[-1]
                    k = min(kappa, len(known))
                    new, _ = nearest(query - centre, known - centre, k, counts)
                    both = jnp.concatenate([found.reshape(-1, kappa), new], 1)
                    return jnp.sort(both)[:, :kappa].reshape(found.shape)

                return jax.lax.map(one, (query, known, counts, found))

            return tuple(map(level, maps, gallery, found))

        return _compiled(self.config, compare)

    @functools.cached_property
    def _programs(self):
        """From the size of images to what makes maps of distances."""
        config = self.config  # not `self`: what holds itself is freed late

        def program(size):
            def draw(_, batch):
                found, valid = batch
                total = 0.0
                for distances in found:
                    scores = distances.mean(-1)
                    if valid is not None:
                        scores = without_padding(scores, inside(valid, scores.shape[1:]))
                    total += resize_map(scores, size, config.map.sigma)
                return total / len(found)

            return _compiled(config, draw)

        return functools.cache(program)


def _compiled(config, function: Callable) -> Callable:
    return parallel.per_example(function, config.parallel, config.batch_size)


def _vectors(features: Features, valid: np.ndarray | None) -> np.ndarray:
    """The mean of the last level over what is no padding, [B, C]."""
    last = np.asarray(features[-1])
    if valid is None:
        return last.mean((1, 2), dtype=np.float32)
    seen = np.asarray(inside(valid, last.shape[1:3]))[..., None]
    return last.mean((1, 2), where=seen, dtype=np.float32)
