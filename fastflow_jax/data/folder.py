"""A directory of images, read in place: in the layout of `layout.py`, bare, or in a list.

A bare directory has only normal images. `config.manifest` lists the images, see `manifest.py`. All
headers are read when it is opened, so that most problems are found before training; damaged pixels
are found when they are decoded.
"""

from pathlib import Path

import numpy as np

from fastflow_jax.data import manifest, masks
from fastflow_jax.data.dataset import GOOD, DataConfig, Dataset, Record, Source
from fastflow_jax.data.formats import Header, read_header
from fastflow_jax.data.groups import BY_DIRECTORY
from fastflow_jax.data.layout import Splits, list_folder, list_images, pages, read_layout
from fastflow_jax.data.levels import Levels
from fastflow_jax.data.transforms import decode_image, decode_stored, read_file
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded


def open_dataset(config: DataConfig) -> Dataset:
    """Opens the directory `config.root`, or the list `config.manifest`; there are no categories.

    Raises:
        InputError: the directory or list is missing or empty, or has unexpected files.
    """
    if config.category is not None:
        raise InputError(
            f"data.category is {config.category!r}, but a directory has no categories. "
            "Set data.root to the directory of one category."
        )
    root = None if config.root is None else expanded(config.root)
    if root is not None and not root.is_dir():
        problem = "is not a directory" if root.exists() else "does not exist"
        raise InputError(f"data.root {root} {problem}. Set it to the directory of your images.")
    if config.manifest is not None:
        place = expanded(config.manifest)
        splits = manifest.read(place, root)
    elif root is not None:
        place = root
        splits = _splits(root, config)
    else:
        raise InputError("data.root is not set. Set it to the directory of your images.")
    levels = _levels(config, splits["train"])
    sources = {split: source(records, levels) for split, records in splits.items() if records}
    counts = {f"{split}_images": len(sources.get(split, ())) for split in ("train", "test")}
    provenance: dict = {"source": str(place.resolve())} | counts
    if "calibration" in sources:
        provenance["calibration_images"] = len(sources["calibration"])
    test, calibration = sources.get("test"), sources.get("calibration")
    return Dataset("folder", sources["train"], test, provenance, calibration, levels=levels)


def _levels(config: DataConfig, train: list[Record]) -> Levels | None:
    def read(index: int) -> np.ndarray:
        record = train[index]
        return decode_stored(read_file(record.image), str(record.image), record.page)

    levels = Levels.of(config)
    return None if levels is None else levels.resolved([str(r.image) for r in train], read)


def _splits(root: Path, config: DataConfig) -> Splits:
    folders, _ = list_folder(root)
    if "train" in folders:
        return read_layout(root)
    if folders and root.name != GOOD and config.groups != BY_DIRECTORY:
        # Sub-directories may be `good` and `broken`.
        raise InputError(
            f"{root} has directories ({', '.join(folders)}), but no train. Arrange your images as "
            "train/good, test/good, test/<defect> and ground_truth/<defect>, or pass a directory "
            "of normal images. It may have sub-directories if it is named good."
        )
    return {"train": _bare(root)}


def _bare(root: Path) -> list[Record]:
    return [
        record
        for path in list_images(root)
        for record in pages(path, read_header(path), f"{GOOD}/{path.relative_to(root).as_posix()}")
    ]


def source(records: list[Record], levels: Levels | None = None) -> Source:
    """Returns the source of `records`, which must have headers if headers are used.

    Args:
        records: files of the examples.
        levels: see `transforms.decode_image`.
    """
    has_masks = any(record.masks for record in records)
    cut: set[str] = set()

    def header(index: int) -> Header:
        found = records[index].header
        assert found is not None
        return found

    def load(index: int) -> tuple[np.ndarray, np.ndarray | None]:
        record = records[index]
        image = decode_image(read_file(record.image), str(record.image), record.page, levels)
        if not has_masks:
            return image, None
        mask = masks.read(record, image.shape[:2], cut.add)
        if record.defect == GOOD and mask.any():
            raise InputError(
                f"{record.masks[0]} marks a defect in a good image, {record.image}. Remove it."
            )
        return image, mask

    return Source(
        tuple(record.name for record in records),
        tuple(record.defect for record in records),
        load,
        files=tuple(record.image.stat() for record in records),
        header=header,
        cut_masks=cut,
    )
