"""Features of the frozen backbone, computed once for each image."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from fastflow_jax import parallel
from fastflow_jax.backbones import Backbone
from fastflow_jax.data.pipeline import Batch

Features = tuple[np.ndarray, ...]  # one [N, h, w, C] a scale


def extractor(backbone: Backbone, kind: str, batch_size: int) -> Callable[[np.ndarray], Features]:
    """Images [b, H, W, 3] -> the backbone's feature maps, on all devices; b up to `batch_size`."""
    run = parallel.per_example(backbone.module.apply, kind, batch_size)
    return lambda images: run(backbone.variables, images)


def cache(extract: Callable, batches: Iterable, n: int, *, progress: str) -> Features:
    """All features of `n` images in host memory, in the order of the batches."""
    arrays = None
    done = 0
    with tqdm(total=n, desc=progress, unit="img", leave=False, dynamic_ncols=True) as bar:
        for batch in batches:
            maps = extract(batch.image)
            if arrays is None:
                arrays = tuple(np.empty((n, *m.shape[1:]), m.dtype) for m in maps)
            for array, m in zip(arrays, maps, strict=True):
                array[done : done + len(m)] = m
            done += len(batch.image)
            bar.update(len(batch.image))
    return arrays


@dataclasses.dataclass(frozen=True)
class TrainingFeatures:
    """The features of the training images, computed once or again in every epoch."""

    n: int
    shapes: tuple[tuple[int, ...], ...]  # (h, w, C) of each scale
    statistics: dict  # see `channel_statistics`
    # (epoch, rows [steps, B]) -> the features of each row's images, step by step
    stream: Callable[[int, np.ndarray], Iterator[Features]]
    cached: Features | None  # all of them, where they do not change from epoch to epoch


def cached_features(maps: Features) -> TrainingFeatures:
    """Training features that lie in memory."""

    def stream(epoch, index):
        return (tuple(m[rows] for m in maps) for rows in index)

    shapes = tuple(m.shape[1:] for m in maps)
    return TrainingFeatures(len(maps[0]), shapes, channel_statistics([maps]), stream, maps)


def recomputed_features(
    n: int, batches_of: Callable[[int, np.ndarray, int], Iterable[Batch]], extract: Callable
) -> TrainingFeatures:
    """Training features that come from the images again in every epoch.

    Args:
      n: number of training images.
      batches_of: (epoch, rows [M], batch size) -> batches of those images, as they are to be seen
        in that epoch.
      extract: see `extractor`.
    """

    def stream(epoch, index):
        for batch in batches_of(epoch, index.ravel(), index.shape[1]):
            yield extract(batch.image)

    def once():
        for batch in batches_of(0, np.arange(n), min(n, 32)):
            yield extract(batch.image)

    shapes = tuple(m.shape[1:] for m in next(once()))
    return TrainingFeatures(n, shapes, channel_statistics(once()), stream, None)


def channel_statistics(parts: Iterable[Features]) -> dict:
    """Mean and deviation of each channel over all images and places, in one pass.

    Returns:
      The collection "statistics" of `model.FastFlow`, float32. A channel that never changes gets
      the deviation 1.
    """
    scalers = None
    for maps in parts:
        scalers = scalers or [StandardScaler() for _ in maps]
        for scaler, m in zip(scalers, maps, strict=True):
            for image in m:
                scaler.partial_fit(image.reshape(-1, m.shape[-1]).astype(np.float64))
    return {
        f"norm_{i}": {"mean": np.float32(scaler.mean_), "std": np.float32(scaler.scale_)}
        for i, scaler in enumerate(scalers)
    }
