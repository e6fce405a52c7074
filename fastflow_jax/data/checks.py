"""Checks of a data set for probable mistakes; each returns a message or None."""

import os
import zlib
from collections.abc import Sequence

import numpy as np

from fastflow_jax.data.dataset import Source
from fastflow_jax.errors import InputError

_BRIGHTNESS_SAMPLE = 8  # training images
_DARK = 32  # of 255; 10 and 12 bits in files of 16 reach 3 and 15
_MAX_COMPARED = 500  # images of each split that are decoded to find equal ones


def dark_images(source: Source) -> str | None:
    """Reports training images that are all dark, such as 12 camera bits in files of 16 bits."""
    brightest = 0
    for i in range(min(_BRIGHTNESS_SAMPLE, len(source))):
        brightest = max(brightest, int(source[i].image.max()))
        if brightest >= _DARK:  # usually the first one
            return None
    return (
        f"the first training images have no value above {brightest} of 255. If they have 10 or 12 "
        "camera bits in files of 16 bits, pass --config.data.bits=10 or 12."
    )


def blank_masks(masks: np.ndarray, source: Source) -> str | None:
    """Reports defective images whose masks, bool [N, H, W], are empty."""
    blank = np.flatnonzero((source.labels == 1) & ~masks.any((1, 2)))
    if not len(blank):
        return None
    height, width = masks.shape[1:]
    return (
        f"at {width}x{height} the masks of {len(blank)} defective images are empty, such as that "
        f"of {source.names[blank[0]]}. All their pixels count as normal."
    )


def inverted_masks(masks: np.ndarray, source: Source) -> str | None:
    """Reports masks, bool [N, H, W], if most mark more than half of a defective image."""
    shares = masks.mean((1, 2))[source.labels == 1]
    if not len(shares) or np.median(shares) <= 0.5:
        return None
    return (
        f"the masks of {(shares > 0.5).sum()} of {len(shares)} defective images mark more than "
        "half of the image. Pixels that are not black are defective. If white means normal, invert "
        "the masks."
    )


def cut_masks(source: Source) -> str | None:
    """Reports masks with a halo of grey levels, see `transforms.decode_mask`."""
    if not source.cut_masks:
        return None
    return (
        f"{len(source.cut_masks)} masks have grey levels around their defects, such as "
        f"{min(source.cut_masks)}. Only pixels from half of the highest level on (or from 1/8 on "
        "if there are classes of lower levels) count as defective. Save masks without lossy "
        "compression or antialiasing to set the edges yourself."
    )


def tested_on_training_images(train: Source, test: Source) -> str | None:
    """Reports test images that are also training images.

    The pixels of files of equal size are compared, up to 500 of each split.

    Raises:
        InputError: a defective test image is also a training image.
    """
    if train.files is None or test.files is None:
        return None
    rows_by_length = [_rows_by_length(files) for files in (train.files, test.files)]
    shared = rows_by_length[0].keys() & rows_by_length[1].keys()
    of_train, of_test = (
        sorted(row for length in shared for row in rows[length])[:_MAX_COMPARED]
        for rows in rows_by_length
    )
    known = {_fingerprint(train, row): row for row in of_train}
    pairs = [(row, known.get(_fingerprint(test, row))) for row in of_test] if known else []
    pairs = [(test_row, row) for test_row, row in pairs if row is not None]
    for test_row, row in pairs:
        if test.labels[test_row]:
            raise InputError(
                f"The defective test image {test.names[test_row]} is equal to the training image "
                f"{train.names[row]}. Remove it from the training images, which must be normal."
            )
    if not pairs:
        return None
    test_row, row = pairs[0]
    return (
        f"{len(pairs)} test images are equal to training images, such as {test.names[test_row]} "
        f"and {train.names[row]}. They make results too good. Remove them from one of the two."
    )


def _rows_by_length(files: Sequence[os.stat_result | None]) -> dict[int, list[int]]:
    rows = {}
    for row, file in enumerate(files):
        if file is not None:
            rows.setdefault(file.st_size, []).append(row)
    return rows


def _fingerprint(source: Source, row: int) -> tuple[Sequence[int], int]:
    image = np.ascontiguousarray(source[row].image)
    return image.shape, zlib.crc32(image.data)
