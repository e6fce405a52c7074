"""Features of the images of several products, for a training that they share."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from fastflow_jax.errors import InputError
from fastflow_jax.features.cache import Rows
from fastflow_jax.features.extract import Features, TrainingFeatures, cached_features


class _Concatenated:
    """Arrays one after another along the first axis, which are read when indexed."""

    def __init__(self, arrays: Sequence[Any]):
        self._arrays, self.dtype = arrays, arrays[0].dtype
        self._ends = np.cumsum([len(array) for array in arrays])
        self.shape = (int(self._ends[-1]), *arrays[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        rows = np.arange(len(self))[rows]
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        owners = np.searchsorted(self._ends, rows, "right")
        for i in np.unique(owners):
            own, start = owners == i, self._ends[i] - len(self._arrays[i])
            found[own] = self._arrays[i][rows[own] - start]
        return found

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def joined(members: Sequence[TrainingFeatures], on_device: bool = False) -> TrainingFeatures:
    """The training features of several products as those of one training.

    The scales are followed by the product of each image, int32 [N]. Images of a product that has
    fewer than the mean number of images are repeated up to that number.

    Args:
      members: the features of each product.
      on_device: see `TrainingFeatures`.

    Raises:
      InputError: features are computed in every epoch.
    """
    cached = [member.cached for member in members if member.cached is not None]
    if len(cached) < len(members):
        raise InputError(
            "One model of several products needs cached features. Set config.augment.copies for "
            "augmentation, and leave config.train.cache=none out."
        )
    counts = np.array([member.n for member in members])
    lengths = np.maximum(counts, round(counts.mean()))
    firsts = np.cumsum(counts) - counts
    repeated = [
        first + np.arange(length) % n
        for first, length, n in zip(firsts, lengths, counts, strict=True)
    ]
    rows = np.concatenate(repeated)

    def whole(arrays: Sequence[Any]) -> Any:
        return Rows(cast(np.ndarray, _Concatenated(arrays)), rows)

    maps = [whole(scale) for scale in zip(*cached, strict=True)]
    masks = [member.valid for member in members if member.valid is not None]
    product = _products(lengths.tolist())
    return cached_features((*maps, product), whole(masks) if masks else None, on_device)


def joined_held_out(
    members: Sequence[tuple[Features | None, np.ndarray | None]],
) -> tuple[Features | None, np.ndarray | None]:
    """Features and padding masks of the held-out images of several products, as in `joined`.

    Args:
      members: features [n, h, w, C] per scale of each product, or None without held-out images;
        and bool [n, H, W], False in padded pixels, or None.
    """
    counts = [0 if maps is None else len(maps[0]) for maps, _ in members]
    if not any(counts):
        return None, None
    scales = zip(*(maps for maps, _ in members if maps is not None), strict=True)
    masks = [valid for _, valid in members if valid is not None]
    maps = tuple(np.concatenate([np.asarray(m) for m in scale]) for scale in scales)
    return (*maps, _products(counts)), np.concatenate(masks) if masks else None


def split_products(features: Any) -> tuple[tuple[Any, ...], Any]:
    """The scales of features, and the product of each image, int [B], if they are `joined`."""
    *maps, last = features
    return (tuple(maps), last.astype(np.int32)) if last.ndim == 1 else (tuple(features), None)


def _products(counts: Sequence[int]) -> np.ndarray:
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)
