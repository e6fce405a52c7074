"""Mask files of images: matching by name, checks of sizes, and reading.

A mask is an image, see `transforms.decode_mask`, or a file of polygons, see `polygons`. The mask of
an image with several mask files is their union.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from fastflow_jax.data import polygons
from fastflow_jax.data.dataset import Record
from fastflow_jax.data.formats import Header, read_header
from fastflow_jax.data.transforms import decode_mask, read_file
from fastflow_jax.errors import InputError

POLYGONS = ".json"


def match(
    images: Sequence[Path],
    defective: Collection[Path],
    found: Sequence[Path],
    suffix: str,
    folder: Path,
    ground_truth: Path,
) -> dict[Path, tuple[Path, ...]]:
    """Returns the masks of each image that has some.

    A mask is named `<name><suffix>.*` after its image, is in a directory `<name><suffix>`, or is
    a LabelMe file `<name>.json`. A JSON file in `ground_truth` itself has COCO annotations of any
    images.

    Args:
        images: images below `folder`.
        defective: those that need masks.
        found: mask files below `ground_truth`, sorted by path.
        suffix: of the names of masks.
        folder: directory of images.
        ground_truth: directory of masks, with the same sub-directories.

    Raises:
        InputError: a mask without an image, or a defective image without a mask.
    """
    by_mask = {path.relative_to(folder).with_name(path.stem + suffix): path for path in images}
    matched: dict[Path, tuple[Path, ...]] = {}
    for mask in found:
        relative = mask.relative_to(ground_truth)
        if mask.suffix.lower() == POLYGONS and mask.parent == ground_truth:
            of_mask = polygons.annotated(mask, images)
        else:
            keys = (
                relative.with_suffix(""),
                relative.parent,
                relative.with_name(relative.stem + suffix),
            )
            keys = keys if mask.suffix.lower() == POLYGONS else keys[:2]
            of_mask = [by_mask[key] for key in keys if key in by_mask][:1]
            if not of_mask:
                raise InputError(
                    f"{mask} is a mask without an image. Name it after an image in "
                    f"{folder.name}/{relative.parent}: <name>{suffix}{mask.suffix}."
                )
        for image in of_mask:
            matched[image] = (*matched.get(image, ()), mask)
    missing = [path for path in defective if path not in matched]
    if missing:
        first = missing[0].relative_to(folder)
        raise InputError(
            f"{missing[0]} has no mask (missing: {len(missing)} of {len(defective)}). Add it as "
            f"{ground_truth.name}/{first.with_name(first.stem + suffix)}.png, or remove "
            f"{ground_truth.name} to use no masks."
        )
    return matched


def check_header(mask: Path, image: Path, header: Header) -> None:
    """Raises an InputError unless a mask file has the size and the pages of its image."""
    if mask.suffix.lower() == POLYGONS:
        polygons.shapes_of(mask, image, header.size)
        return
    mask_header = read_header(mask)
    check_sizes(image, header.size, mask, mask_header.size)
    if mask_header.pages != header.pages:
        raise InputError(
            f"{mask} has {mask_header.pages} pages, but its image {image} has "
            f"{header.pages}. Both must have the same number."
        )


def check_sizes(image: Path, size: tuple[int, int], mask: Path, mask_size: tuple[int, int]) -> None:
    """Raises an InputError unless a mask has the (height, width) of its image."""
    if mask_size != size:
        raise InputError(
            f"{mask} has {mask_size[1]} x {mask_size[0]} pixels, but its image {image} has "
            f"{size[1]} x {size[0]}. Both must have the same size, as viewers show them."
        )


def read(
    record: Record, size: tuple[int, int], on_cut: Callable[[str], object] | None = None
) -> np.ndarray:
    """Reads the masks of an image.

    Args:
        record: of the image.
        size: (height, width) of the image.
        on_cut: see `transforms.decode_mask`.

    Returns:
        bool [H, W], the union of the masks; False everywhere if there are none.

    Raises:
        InputError: an unreadable mask, or one of another size.
    """
    union = np.zeros(size, bool)
    for path in record.masks:
        if path.suffix.lower() == POLYGONS:
            mask = polygons.draw(path, record.image, size)
        else:
            mask = decode_mask(read_file(path), str(path), record.page, on_cut)
        check_sizes(record.image, size, path, mask.shape)
        union |= mask
    return union
