"""Batches of normalised images, decoded by threads ahead of their use (grain)."""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from fastflow_jax.data.dataset import Source
from fastflow_jax.data.transforms import normalise, resize, resize_mask


class Batch(NamedTuple):
    """Examples side by side; the last batch may be short."""

    image: np.ndarray  # float32 [b, H, W, 3], normalised
    mask: np.ndarray | None  # bool [b, H, W]
    label: np.ndarray  # int32 [b]
    index: np.ndarray  # int32 [b], position in the source


def batches(
    source: Source,
    *,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    indices: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yields the examples of `source` in batches, in the order of `indices`.

    Args:
        source: where examples are read from.
        image_size: (height, width) that images and masks are resized to.
        mean: per channel, of images scaled to [0, 1].
        std: per channel, likewise.
        batch_size: examples a batch; the last batch holds what is left.
        indices: positions in `source`, in any order and repeated at will. None: each once.

    Raises:
        InputError: an image or mask cannot be decoded; raised when its batch is due.
    """
    image_size = tuple(image_size)
    indices = range(len(source)) if indices is None else indices

    def load(index) -> Batch:
        example = source[int(index)]
        mask = None if example.mask is None else resize_mask(example.mask, image_size)
        image = normalise(resize(example.image, image_size), mean, std)
        return Batch(image, mask, example.label, index)

    # Pillow and numpy release the interpreter's lock: threads keep all cores busy, and worker
    # processes would take seconds to start.
    threads = os.cpu_count() or 1
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(2 * batch_size, threads)
    )
    examples = grain.MapDataset.source(indices).map(load).to_iter_dataset(options)
    iterator = iter(examples.batch(batch_size, batch_fn=_stack))
    try:
        yield from iterator
    finally:
        iterator.close()


def _stack(examples: Sequence[Batch]) -> Batch:
    images, masks, labels, indices = zip(*examples, strict=True)
    return Batch(
        image=np.stack(images),
        mask=None if masks[0] is None else np.stack(masks),
        label=np.array(labels, np.int32),
        index=np.array(indices, np.int32),
    )
