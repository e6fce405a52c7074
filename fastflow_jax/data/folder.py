"""A folder of one's own images, read where it lies: in the layout of `layout.py`, or bare.

A bare folder holds images alone, all of them normal. All headers are read at once, so that what
is amiss is found before any training; what only the pixels tell is found when they are decoded.
"""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from fastflow_jax.data.dataset import GOOD, Dataset, Record, Source
from fastflow_jax.data.layout import check_sizes, list_folder, list_images, read_layout
from fastflow_jax.data.transforms import decode_image, decode_mask, image_size, read_file
from fastflow_jax.errors import InputError
from fastflow_jax.paths import expanded


def open_dataset(config: ConfigDict) -> Dataset:
    """Opens the folder `config.root`; there are no categories.

    Raises:
        InputError: the folder is missing or empty, or something in it is not as it should be.
    """
    if config.root is None:
        raise InputError("data.root is not set: give the folder of your images.")
    if config.category is not None:
        raise InputError(
            f"data.category is {config.category!r}, but a folder has no categories: "
            "give the folder of one category as data.root."
        )
    root = expanded(config.root)
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"data.root {root} {problem}: give the folder of your images.")
    folders, _ = list_folder(root)
    if "train" in folders:
        train, test = read_layout(root)
    elif folders:
        raise InputError(
            f"{root} holds folders ({', '.join(folders)}) but no train: lay your images out as "
            "train/good, test/good, test/<defect> and ground_truth/<defect>, "
            "or give a folder of images alone, all of them normal."
        )
    else:
        train, test = _bare(root), []
    provenance = {
        "source": str(root.resolve()),
        "train_images": len(train),
        "test_images": len(test),
    }
    return Dataset("folder", _source(train), _source(test) if test else None, provenance)


def _bare(root: Path) -> list[Record]:
    images = list_images(root)
    for path in images:
        image_size(path)
    return [Record(path, None, GOOD, f"{GOOD}/{path.name}") for path in images]


def _source(records: list[Record]) -> Source:
    has_masks = any(record.mask for record in records)
    cut: set[str] = set()

    def load(index: int) -> tuple[np.ndarray, np.ndarray | None]:
        record = records[index]
        image = decode_image(read_file(record.image), str(record.image))
        if not has_masks:
            return image, None
        if record.mask is None:
            return image, np.zeros(image.shape[:2], bool)
        mask = decode_mask(read_file(record.mask), str(record.mask), cut.add)
        check_sizes(record.image, image.shape[:2], record.mask, mask.shape)
        if record.defect == GOOD and mask.any():
            raise InputError(f"{record.mask} marks a defect in a good image: remove it.")
        return image, mask

    names = tuple(record.name for record in records)
    files = tuple(record.image.stat() for record in records)
    defects = tuple(record.defect for record in records)
    return Source(names, defects, load, files=files, cut_masks=cut)
