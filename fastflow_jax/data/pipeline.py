"""Batches of normalised images, decoded ahead of their use by threads."""

import collections
import concurrent.futures
import functools
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from fastflow_jax.data.dataset import Regions, Source
from fastflow_jax.data.transforms import (
    CONTEXT,
    Placement,
    counted,
    normalise,
    placement,
    resize,
    resize_mask,
)
from fastflow_jax.errors import InputError

T = TypeVar("T")


class Batch(NamedTuple):
    """Stacked examples; the last batch may be shorter."""

    image: np.ndarray  # float32 [b, H, W, 3], normalised; 0 in padding
    mask: np.ndarray | None  # bool [b, H, W]
    label: np.ndarray  # int32 [b]
    index: np.ndarray  # int32 [b], position in the source
    # bool [b, H, W], False in padding and outside of the region of interest; None if all count
    valid: np.ndarray | None = None


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
        source: source of the examples.
        image_size: (height, width) of the resized images and masks.
        mean: per channel, of images scaled to [0, 1].
        std: per channel, of images scaled to [0, 1].
        batch_size: examples per batch; the last batch has the remainder.
        indices: positions in `source`, in any order, repetitions allowed. None: each once.
        resize_by: "square", "crop" or "pad", see `transforms.placement`.
        mask_resize: "nearest", "floor" or "threshold", see `transforms.resize_mask`.

    Raises:
        InputError: an image or mask cannot be decoded, or see `check_region`; raised when its batch
            is requested.
    """
    height, width = image_size

    def load(index: int) -> tuple[np.ndarray, np.ndarray | None, int, int, np.ndarray | None]:
        example = source[index]
        region = None if source.roi is None else source.roi(index, example.image.shape[:2])
        image, valid, placed = as_input(example.image, (height, width), resize_by, region)
        check_region(valid, example.name)
        image = normalise(image, mean, std, valid)
        mask = None
        if example.mask is not None:
            resized = resize_mask(example.mask, placed.resized, mask_resize)
            mask = _put(resized, placed, (height, width))
        return image, mask, example.label, index, counted(valid)

    rows = range(len(source)) if indices is None else indices
    calls = (functools.partial(load, int(index)) for index in rows)
    threads = n_threads()
    examples = prefetch(calls, threads, max(2 * batch_size, threads))
    try:
        while examples_of_batch := list(itertools.islice(examples, batch_size)):
            images, masks, labels, numbers, valids = zip(*examples_of_batch, strict=True)
            yield Batch(
                image=np.stack(images),
                mask=None if masks[0] is None else np.stack(masks),
                label=np.array(labels, np.int32),
                index=np.array(numbers, np.int32),
                valid=None if valids[0] is None else np.stack(valids),
            )
    finally:
        examples.close()


def n_threads() -> int:
    """Number of CPU threads to use: $NPROC, which XLA reads as well, or one per core."""
    given = os.environ.get("NPROC", "")
    return int(given) if given.isdecimal() and int(given) else os.cpu_count() or 1


def prefetch(
    calls: Iterable[Callable[[], T]], threads: int | None = None, size: int | None = None
) -> Generator[T, None, None]:
    """Yields the results of `calls` in order, computed ahead of their use by threads.

    Pillow and numpy release the interpreter lock while they decode and resize. An error of a call
    or of the iterable is raised after the results before it.

    Args:
        calls: functions without arguments.
        threads: number of threads, by default `n_threads()`. 0: no threads, each call is made when
            its result is requested.
        size: number of calls started ahead, by default two per thread.
    """
    if threads == 0:
        yield from (call() for call in calls)
        return
    threads = threads or n_threads()
    size = size or 2 * threads
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    waiting, remaining, error = collections.deque(), iter(calls), None
    try:
        while waiting or error is None:
            while error is None and len(waiting) <= size:
                try:
                    waiting.append(pool.submit(next(remaining)))
                except Exception as end:  # StopIteration or an error of the iterable
                    error = end
            if waiting:
                yield waiting.popleft().result()
        if error is not None and not isinstance(error, StopIteration):
            raise error
    finally:
        pool.shutdown(cancel_futures=True)


def as_input(
    image: np.ndarray,
    image_size: tuple[int, int],
    resize_by: str,
    region: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None, Placement]:
    """Resizes an image to a model input.

    Args:
        image: uint8 [h, w, 3].
        image_size: see `batches`.
        resize_by: see `batches`.
        region: bool [h, w], True in pixels that count; None if all do.

    Returns:
        The input, uint8 [H, W, 3]; which pixels count, as in `transforms.normalise`: None if all
        do, bool [H, W] with padding, or uint8 [H, W] with a region; and the placement of the image
        in the input.
    """
    height, width = image.shape[:2]
    placed = placement((height, width), image_size, resize_by)
    whole = _put(resize(image, placed.resized), placed, image_size)
    if region is not None:
        return whole, kinds_of_pixels(region, image_size, resize_by), placed
    if resize_by != "pad":
        return whole, None, placed
    return whole, _put(np.ones(placed.resized, bool), placed, image_size), placed


def kinds_of_pixels(region: np.ndarray, image_size: tuple[int, int], resize_by: str) -> np.ndarray:
    """Returns the kinds of the pixels of a model input, uint8 [H, W], see `transforms`.

    Args:
        region: bool [h, w], True in the pixels of the image that count.
        image_size: see `batches`.
        resize_by: see `batches`.
    """
    placed = placement(region.shape[:2], image_size, resize_by)
    kinds = CONTEXT + resize_mask(region, placed.resized).astype(np.uint8)
    return _put(kinds, placed, image_size)


def check_region(valid: np.ndarray | None, name: str) -> None:
    """Raises InputError if no pixel of a model input counts; for `valid` see `as_input`."""
    if valid is not None and not counted(valid).any():
        raise nothing_counts(name)


def nothing_counts(name: str) -> InputError:
    """Returns the error for an image without a pixel that counts."""
    return InputError(
        f"No pixel of {name} counts: its region of interest has no pixel in the model input. Draw "
        "it larger, or train with a higher config.image_size."
    )


def regions_as_input(
    regions: Regions, image_size: tuple[int, int], resize_by: str, mask_resize: str
) -> Regions:
    """Resizes regions of defects as `batches` resizes masks; for the arguments see there.

    Regions without pixels after resizing are dropped.
    """
    placed = placement(regions.masks.shape[1:], image_size, resize_by)
    resized = (resize_mask(mask, placed.resized, mask_resize) for mask in regions.masks)
    masks = np.array([_put(mask, placed, image_size) for mask in resized], bool)
    masks = masks.reshape(-1, *image_size)
    remain = masks.any((1, 2))
    return Regions(masks[remain], regions.saturation[remain])


def _put(array: np.ndarray, placed: Placement, image_size: tuple[int, int]) -> np.ndarray:
    canvas = np.zeros((*image_size, *array.shape[2:]), array.dtype)
    canvas[placed.place] = array[placed.crop]
    return canvas
