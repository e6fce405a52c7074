"""A directory of the user's own images, read in place: in the layout of `layout.py`, or bare.

A bare directory has normal images only. All headers are read when it is opened, so that most
problems are found before any training; the rest is found when pixels are decoded.
"""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from fastflow_jax.data.dataset import GOOD, Dataset, Record, Source
from fastflow_jax.data.formats import read_header
from fastflow_jax.data.groups import BY_DIRECTORY
from fastflow_jax.data.layout import (
    Layout,
    check_sizes,
    list_folder,
    list_images,
    pages,
    read_layout,
)
from fastflow_jax.data.transforms import decode_image, decode_mask, read_file
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded


def open_dataset(config: ConfigDict) -> Dataset:
    """Opens the directory `config.root`; there are no categories.

    Raises:
        InputError: the directory is missing or empty, or something in it does not belong there.
    """
    if config.root is None:
        raise InputError("data.root is not set: give the directory of your images.")
    if config.category is not None:
        raise InputError(
            f"data.category is {config.category!r}, but a folder has no categories: "
            "give the directory of one category as data.root."
        )
    root = expanded(config.root)
    if not root.is_dir():
        problem = "is not a directory" if root.exists() else "does not exist"
        raise InputError(f"data.root {root} {problem}: give the directory of your images.")
    folders, _ = list_folder(root)
    if "train" in folders:
        found = read_layout(root, calibration=True)
    elif folders and root.name != GOOD and config.groups != BY_DIRECTORY:
        # Sub-directories may well be `good` and `broken`: nobody said that all are normal.
        raise InputError(
            f"{root} has directories ({', '.join(folders)}) but no train: lay your images out as "
            "train/good, test/good, test/<defect> and ground_truth/<defect>, or give a directory "
            "of normal images; sub-directories are allowed if it is named good."
        )
    else:
        found = Layout(_bare(root), [], [])
    provenance = {
        "source": str(root.resolve()),
        "train_images": len(found.train),
        "test_images": len(found.test),
    }
    if found.calibration:
        provenance["calibration_images"] = len(found.calibration)
    return Dataset(
        "folder",
        source(found.train),
        source(found.test) if found.test else None,
        provenance,
        source(found.calibration) if found.calibration else None,
    )


def _bare(root: Path) -> list[Record]:
    return [
        record
        for path in list_images(root)
        for record in pages(path, read_header(path), f"{GOOD}/{path.relative_to(root).as_posix()}")
    ]


def source(records: list[Record]) -> Source:
    """The examples of some files, decoded when they are asked for."""
    has_masks = any(record.mask for record in records)
    cut: set[str] = set()

    def load(index: int) -> tuple[np.ndarray, np.ndarray | None]:
        record = records[index]
        image = decode_image(read_file(record.image), str(record.image), record.page)
        if not has_masks:
            return image, None
        if record.mask is None:
            return image, np.zeros(image.shape[:2], bool)
        mask = decode_mask(read_file(record.mask), str(record.mask), record.page, cut.add)
        check_sizes(record.image, image.shape[:2], record.mask, mask.shape)
        if record.defect == GOOD and mask.any():
            raise InputError(f"{record.mask} marks a defect in a good image: remove it.")
        return image, mask

    return Source(
        tuple(record.name for record in records),
        tuple(record.defect for record in records),
        load,
        files=tuple(record.image.stat() for record in records),
        header=lambda index: records[index].header,
        cut_masks=cut,
    )
