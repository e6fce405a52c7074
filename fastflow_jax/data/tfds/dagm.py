"""DAGM 2007: ten artificial textures with one kind of defect each, and rough masks (ellipses).

Wieler and Hahn, "Weakly Supervised Learning for Industrial Optical Inspection", DAGM symposium
2007. 16,100 grey images of 512x512 pixels, with the split of the competition: the normal images of
`Train` are training images, its defective ones are not used, and all of `Test` are test images. A
defective image `0001.PNG` has a mask `Label/0001_label.PNG`. Layout and counts are those of a
public reader and its paper (Božič et al. 2021, repository mixed-segdec-net-comind2021); this module
was never run on the official files.
"""

import re
from pathlib import Path

from fastflow_jax.data.dataset import GOOD, Counts, DataConfig, Dataset
from fastflow_jax.data.layout import Item, Splits, list_images, pair, to_records
from fastflow_jax.data.tfds import manual, prepared
from fastflow_jax.errors import InputError

COUNTS: dict[str, Counts] = {  # training images, test images
    "Class1": (496, 575),
    "Class2": (509, 575),
    "Class3": (509, 575),
    "Class4": (493, 575),
    "Class5": (505, 575),
    "Class6": (492, 575),
    **{f"Class{i}": (1000, 1150) for i in range(7, 11)},
}
CATEGORIES = tuple(COUNTS)

_LIST = "Labels.txt"


class Dagm(prepared.Builder):
    """Builder of one texture."""

    BUILDER_CONFIGS = prepared.builder_configs(CATEGORIES)
    DESCRIPTION = __doc__ or ""
    HOMEPAGE = "https://zenodo.org/records/12750201"
    CITATION = "doi:10.5281/zenodo.12750201"
    LICENCE = "see Zenodo"
    ARCHIVES = ("{category}.zip", "DAGM_KaggleUpload.zip")
    CONTAINS = "Train"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Download the set (licence: {LICENCE}) from {HOMEPAGE}, and put the directories "
        "Class1 to Class10 there; or set data.root to the directory that has them."
    )

    def splits(self, folder: Path) -> Splits:
        """Returns the files of the split of the competition."""
        train = [item for item in _items(folder / "Train") if item.defect == GOOD]
        return {"train": to_records(train), "test": to_records(_items(folder / "Test"))}


def open_dataset(config: DataConfig) -> Dataset:
    """Opens the texture `config.category`; see `manual.open_category`."""
    return manual.open_category(Dagm, config, COUNTS)


def _items(folder: Path) -> list[Item]:
    """Images of a split and their masks, which the list in `Label` names as well."""
    labels = folder / "Label"
    if not labels.is_dir():
        raise InputError(f"{folder} has no directory Label. Unpack the set again.")
    masks = list_images(labels, skip=_LIST)
    listed = labels / _LIST
    names = {path.name.lower() for path in masks}
    content = listed.read_text("utf-8", "replace") if listed.exists() else ""
    for name in re.findall(r"\d+_label\.png", content, re.IGNORECASE):
        if name.lower() not in names:
            raise InputError(
                f"{labels / name} is in {listed}, but does not exist. Unpack it again."
            )
    pairs = pair([*list_images(folder, skip="Label"), *masks], "_label")
    return [
        Item(image, image.name, "defect" if mask else GOOD, (mask,) if mask else ())
        for image, mask in pairs.items()
    ]
