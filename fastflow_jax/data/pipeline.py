"""Batches of normalised images, decoded by threads ahead of their use (grain)."""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from fastflow_jax.data.dataset import Source
from fastflow_jax.data.transforms import Placement, normalise, placement, resize, resize_mask


class Batch(NamedTuple):
    """Examples side by side; the last batch may be short."""

    image: np.ndarray  # float32 [b, H, W, 3], normalised; 0 in padding
    mask: np.ndarray | None  # bool [b, H, W]
    label: np.ndarray  # int32 [b]
    index: np.ndarray  # int32 [b], position in the source
    valid: np.ndarray | None = None  # bool [b, H, W], false in padding; None without padding


def batches(
    source: Source,
    *,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    indices: Sequence[int] | None = None,
    resize_by: str = "square",
    mask_resize: str = "nearest",
) -> Iterator[Batch]:
    """Yields the examples of `source` in batches, in the order of `indices`.

    Args:
        source: where examples are read from.
        image_size: (height, width) that images and masks are resized to.
        mean: per channel, of images scaled to [0, 1].
        std: per channel, likewise.
        batch_size: examples a batch; the last batch holds what is left.
        indices: positions in `source`, in any order and repeated at will. None: each once.
        resize_by: how images come to that size, see `transforms.placement`.
        mask_resize: how masks do, see `transforms.resize_mask`.

    Raises:
        InputError: an image or mask cannot be decoded; raised when its batch is due.
    """
    image_size = tuple(image_size)
    indices = range(len(source)) if indices is None else indices

    def load(index) -> Batch:
        example = source[int(index)]
        how = {"image_size": image_size, "mean": mean, "std": std, "resize_by": resize_by}
        image, valid, placed = as_input(example.image, **how)
        mask = None
        if example.mask is not None:
            mask = _put(resize_mask(example.mask, placed.resized, mask_resize), placed, image_size)
        return Batch(image, mask, example.label, index, valid)

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


def as_input(
    image: np.ndarray,
    *,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    resize_by: str,
) -> tuple[np.ndarray, np.ndarray | None, Placement]:
    """One image uint8 [h, w, 3] as a backbone takes it; for the arguments see `batches`.

    Returns:
        As in `Batch`: the image [H, W, 3] and what of it is valid, [H, W]; and where it lies.
    """
    placed = placement(image.shape[:2], image_size, resize_by)
    seen = _put(normalise(resize(image, placed.resized), mean, std), placed, image_size)
    if resize_by != "pad":
        return seen, None, placed
    return seen, _put(np.ones(placed.resized, bool), placed, image_size), placed


def _put(array: np.ndarray, placed: Placement, image_size: tuple[int, int]) -> np.ndarray:
    canvas = np.zeros((*image_size, *array.shape[2:]), array.dtype)
    canvas[placed.place] = array[placed.crop]
    return canvas


def _stack(examples: Sequence[Batch]) -> Batch:
    images, masks, labels, indices, valids = zip(*examples, strict=True)
    return Batch(
        image=np.stack(images),
        mask=None if masks[0] is None else np.stack(masks),
        label=np.array(labels, np.int32),
        index=np.array(indices, np.int32),
        valid=None if valids[0] is None else np.stack(valids),
    )
