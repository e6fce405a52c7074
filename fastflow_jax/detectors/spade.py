"""SPADE: distances to the nearest normal images, and of each pixel to the pixels of these images.

Cohen and Hoshen, Sub-Image Anomaly Detection with Deep Pyramid Correspondences (arXiv 2005.02357).
The reference code is github.com/byungjae89/SPADE-pytorch.

The image score is the mean distance to the nearest training images, by the mean of the last level
over its locations (section 3.2). The score of a pixel is the mean distance to the kappa nearest of
all pixels of these images (section 3.3). As in the reference: five nearest images (50 in the
paper), Euclidean distances that are not squared, and a blurred mean of one map per level. Unlike
the reference, all rows of the gallery are used, and the blur grows with the size of the maps. Of a
transformer a single map is used, both as the level and for the vector of the image.
"""

import dataclasses
import functools
import operator
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fastflow_jax import parallel
from fastflow_jax.backbones import deepest_maps
from fastflow_jax.detectors.base import CompiledScorer, Method, Rows
from fastflow_jax.detectors.maps import resize_map, where_counted
from fastflow_jax.detectors.nearest import nearest
from fastflow_jax.features.extract import Features, inside, without_padding
from fastflow_jax.files import create_folder, read_arrays, write_arrays
from fastflow_jax.state import Slot, State, check
from fastflow_jax.training.context import FitContext

_GALLERY = "checkpoints/gallery.npz"


def layers(config: ConfigDict, spec: Any) -> tuple[str, ...]:
    """The maps of strides 4, 8 and 16, and that of stride 32 for the vector of the image."""
    return deepest_maps(spec, (4, 8, 16, 32))


def fit(context: FitContext) -> "SpadeScorer":
    """Saves the features of all training images as `checkpoints/gallery.npz`."""
    config, features, file = context.config, context.train, context.directory / _GALLERY
    if parallel.on_main(file.exists):
        return load(config, features.shapes, read(config, context.directory))
    maps = features.cached
    if maps is None:
        parts = [part for part, _ in features.parts()]
        maps = tuple(map(np.concatenate, zip(*parts, strict=True)))
    scorer = SpadeScorer(config, maps, features.valid)
    create_folder(file.parent)
    write_arrays(file, scorer.state_dict())
    return scorer


def read(config, directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads what `fit` has saved, see `Method.read`."""
    gallery = read_arrays(directory / _GALLERY).items()
    # numpy files store bfloat16 as raw bytes.
    return {name: x.view(jnp.bfloat16) if x.dtype.kind == "V" else x for name, x in gallery}


def load(config, shapes, state: State) -> "SpadeScorer":
    """Rebuilds a scorer, see `Method.load`."""
    names = [f"maps_{i}" for i in range(len(shapes))]
    (n, *_) = (*state[names[0]].shape, None) if names[0] in state else (None,)
    slots = {name: Slot((n or None, *shape)) for name, shape in zip(names, shapes, strict=True)}
    if "valid" in state:
        slots["valid"] = Slot((n, *config.image_size), np.bool_)
    check(state, slots)
    return SpadeScorer(config, tuple(state[name] for name in names), state.get("valid"))


def _retrieve(config, known, vectors):
    """Scores [B], and indices [B, K] of the nearest training images, of vectors [B, C]."""
    centre = known.mean(0)
    k = min(config.spade.images, len(known))
    distances, index = nearest(vectors - centre, known - centre, k)
    return distances.mean(-1), index


def _compare(config, _, batch):
    """The kappa smallest distances so far of each level, [B, h, w, kappa]."""
    (maps, _), (gallery, gallery_valid), found = batch
    counts = None

    def of_image(arrays):  # image by image: the distances of all images would need much memory
        query, known, counts, found = arrays
        query, known = (m.reshape(-1, m.shape[-1]).astype(jnp.float32) for m in (query, known))
        centre = known.mean(0)
        kappa = found.shape[-1]
        new, _ = nearest(query - centre, known - centre, min(kappa, len(known)), counts)
        both = jnp.concatenate([found.reshape(-1, kappa), new], 1)
        return jnp.sort(both)[:, :kappa].reshape(found.shape)

    levels = []
    for query, known, distances in zip(maps, gallery, found, strict=True):
        if gallery_valid is not None:
            counts = inside(gallery_valid, known.shape[1:3]).reshape(len(known), -1)
        levels.append(jax.lax.map(of_image, (query, known, counts, distances)))
    return tuple(levels)


def _draw(config, size, _, batch):
    """The anomaly maps [B, *size] of the distances that `_compare` has found."""
    found, valid = batch
    total = 0.0
    for distances in found:
        scores = distances.mean(-1)
        if valid is not None:
            scores = without_padding(scores, inside(valid, scores.shape[1:]))
        total += resize_map(scores, size, config.map.sigma)
    return where_counted(jnp.asarray(total / len(found)), valid)


@dataclasses.dataclass(frozen=True)
class SpadeScorer(CompiledScorer):
    """Scores by distances to the features of the nearest training images."""

    config: ConfigDict  # filled
    maps: Features  # of the training images
    valid: np.ndarray | None  # bool [N, H, W], False in padded pixels; None without padding

    def score(
        self,
        features: Features,
        valid: np.ndarray | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores features, see `Scorer.score`."""
        scores, images = self._program(_retrieve)(self._vectors, _vectors(features, valid))
        levels = slice(max(1, len(features) - 1))  # the last level is for the image's vector only
        query = features[levels], valid

        def infinite(maps):
            pixels = images.shape[1] * maps.shape[1] * maps.shape[2]
            kappa = min(self.config.spade.kappa, pixels)
            return np.full((*maps.shape[:3], kappa), np.inf, np.float32)

        found = tuple(map(infinite, query[0]))
        compare = self._program(_compare)
        for rank in range(images.shape[1]):  # a batch of gallery images at a time
            rows = operator.itemgetter(images[:, rank])
            gallery = jax.tree.map(rows, (self.maps[levels], self.valid))
            found = compare(None, (query, gallery, found))
        draw = self._program(_draw, tuple(size or self.config.image_size))
        return scores, draw(None, (found, valid))

    def state_dict(self) -> dict[str, np.ndarray]:
        """See `Scorer.state_dict`."""
        state = {f"maps_{i}": np.asarray(m) for i, m in enumerate(self.maps)}
        return state if self.valid is None else state | {"valid": self.valid}

    def new_rows(self, features: Features, valid: np.ndarray | None, share: float) -> Rows:
        """All images, whatever the share, see `TeachableScorer.new_rows`."""
        del share
        return dataclasses.replace(self, maps=features, valid=valid).state_dict()

    def extended(self, rows: Sequence[Rows]) -> "SpadeScorer":
        """See `TeachableScorer.extended`; the gallery grows by each image."""
        state = {
            name: np.concatenate([gallery, *(each[name] for each in rows)])
            for name, gallery in self.state_dict().items()
        }
        maps = tuple(state[f"maps_{i}"] for i in range(len(self.maps)))
        return dataclasses.replace(self, maps=maps, valid=state.get("valid"))

    @functools.cached_property
    def _vectors(self) -> jax.Array:
        """Vectors of the training images, [N, C]."""
        return parallel.on_devices(_vectors(self.maps, self.valid))


def _vectors(features: Features, valid: np.ndarray | None) -> np.ndarray:
    """Mean of the last level over unpadded locations, [B, C]."""
    last = np.asarray(features[-1])
    if valid is None:
        return last.mean((1, 2), dtype=np.float32)
    seen = np.asarray(inside(valid, last.shape[1:3]))[..., None]
    return last.mean((1, 2), where=seen, dtype=np.float32)


METHOD = Method(
    title="SPADE",
    fit=fit,
    read=read,
    load=load,
    layers=layers,
    fields={
        "spade": {
            "images": 5,  # nearest training images, as in the reference; 50 in the paper
            "kappa": 1,  # nearest pixels of these images; their mean distance is a pixel's score
        }
    },
    recipe={"length_power": 1.0, "data": {"holdout": 0.0}},
    reads=("spade",),
    scoring=("spade",),
    bounds={"spade.images": (1, 10**6), "spade.kappa": (1, 1000)},
)
