"""VisA: twelve categories of circuit boards, capsules, pasta and snacks, with masks.

Zou et al., "SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and
Segmentation", ECCV 2022. 10,821 images in directories `<category>/Data/Images/{Normal,Anomaly}`
with masks of classes in `<category>/Data/Masks/Anomaly`. The split is that of the data set for one
class, `split_csv/1cls.csv`. Layout and counts are those of the authors' repository; this module was
never run on the official images.
"""

import csv
from pathlib import Path

from fastflow_jax.data.dataset import GOOD, Counts, DataConfig, Dataset
from fastflow_jax.data.layout import Item, Splits, check_listed, list_images, to_records
from fastflow_jax.data.tfds import manual, prepared
from fastflow_jax.errors import InputError

COUNTS: dict[str, Counts] = {  # training images, test images
    "candle": (900, 200),
    "capsules": (542, 160),
    "cashew": (450, 150),
    "chewinggum": (453, 150),
    "fryum": (450, 150),
    "macaroni1": (900, 200),
    "macaroni2": (900, 200),
    "pcb1": (904, 200),
    "pcb2": (901, 200),
    "pcb3": (905, 201),
    "pcb4": (904, 201),
    "pipe_fryum": (450, 150),
}
CATEGORIES = tuple(COUNTS)

_ARCHIVE = "VisA_20220922.tar"
_SPLIT = Path("split_csv/1cls.csv")  # columns object, split, label, image, mask
_DEFECTS = {"normal": GOOD, "anomaly": "bad"}


class Visa(prepared.Builder):
    """Builder of one category; `<manual_dir>` is its directory, next to `split_csv`."""

    BUILDER_CONFIGS = prepared.builder_configs(CATEGORIES)
    DESCRIPTION = __doc__ or ""
    HOMEPAGE = "https://github.com/amazon-science/spot-diff"
    CITATION = "arXiv:2207.14315"
    LICENCE = "CC BY 4.0"
    ARCHIVES = (_ARCHIVE,)
    CONTAINS = "Data/Images"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Download {_ARCHIVE} ({LICENCE}) from the link in {HOMEPAGE} and put it there, "
        "packed or unpacked; or set data.root to its directory."
    )

    def splits(self, folder: Path) -> Splits:
        """Returns the files of the category in the split for one class."""
        items: dict[str, list[Item]] = {"train": [], "test": []}
        for split, label, image, mask in _read(folder.parent / _SPLIT, self.category):
            defect = _DEFECTS[label]
            masks = (folder.parent / mask,) if defect != GOOD else ()
            name = f"{defect}/{Path(image).name}"
            items[split].append(Item(folder.parent / image, name, defect, masks))
        every = [item for split in items.values() for item in split]
        check_listed(
            list_images(folder / "Data/Images") + list_images(folder / "Data/Masks"),
            [path for item in every for path in (item.image, *item.masks)],
            folder.parent / _SPLIT,
        )
        return {split: to_records(sorted(found)) for split, found in items.items()}


def open_dataset(config: DataConfig) -> Dataset:
    """Opens the category `config.category`; see `manual.open_category`."""
    return manual.open_category(Visa, config, COUNTS)


def _read(path: Path, category: str) -> list[tuple[str, str, str, str]]:
    """Split, label, image and mask of each image of a category."""
    try:
        rows = list(csv.reader(path.read_text("utf-8").splitlines()))
        lines = [tuple(row[1:]) for row in rows[1:] if row and row[0] == category]
        for number, (split, label, _, mask) in enumerate(lines):
            if split not in ("train", "test") or bool(mask) == (_DEFECTS[label] == GOOD):
                raise ValueError(f"{category}, image {number + 1}")
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}). Unpack {_ARCHIVE} again.") from error
    return [(split, label, image, mask) for split, label, image, mask in lines]
