"""KolektorSDD and KolektorSDD2: surfaces of electrical parts with cracks and spots, with masks.

`kolektor_sdd`: Tabernik et al., "Segmentation-based deep-learning approach for surface-defect
detection", Journal of Intelligent Manufacturing 31 (2020). 399 grey images of eight surfaces of
each of 50 commutators; 52 have a defect. The set has no split for training on normal images. Here
all images of every fifth commutator are test images; of the others, the normal images are training
images and the defective ones are test images.

`kolektor_sdd2`: Božič et al., "Mixed supervision for surface-defect detection: from weakly to fully
supervised learning", Computers in Industry 129 (2021). 3,335 images. The test images are those of
the official split; its 246 defective training images are not used.

An image is defective if its mask is not black. Layouts are those of the authors' reader (repository
mixed-segdec-net-comind2021) and counts those of the papers; this module was never run on the
official files.
"""

import warnings
from pathlib import Path

from fastflow_jax.data.dataset import GOOD, Counts, DataConfig, Dataset
from fastflow_jax.data.layout import Item, Splits, list_folder, list_images, pair, to_records
from fastflow_jax.data.tfds import manual, prepared
from fastflow_jax.data.transforms import decode_mask, read_file
from fastflow_jax.errors import InputError

COUNT = 399  # images of KolektorSDD
COUNTS: dict[str, Counts] = {"": (2085, 1004)}  # training images and test images of KolektorSDD2

_LICENCE = "CC BY-NC-SA 4.0"
_INSTRUCTIONS = (
    f"Download {{archive}} ({_LICENCE}: not for commercial use) from ViCoS, {{homepage}}, and put "
    "it there, packed or unpacked; or set data.root to its directory."
)


class KolektorSdd(prepared.Builder):
    """Builder of KolektorSDD: `<manual_dir>/kos01/Part0.jpg` and `Part0_label.bmp`."""

    DESCRIPTION = __doc__ or ""
    HOMEPAGE = "https://www.vicos.si/resources/kolektorsdd/"
    CITATION = "doi:10.1007/s10845-019-01476-x"
    LICENCE = _LICENCE
    IMAGES = f"{COUNT} in all"
    ARCHIVES = ("KolektorSDD.zip",)
    PLACES, CONTAINS = (".",), "kos01"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _INSTRUCTIONS.format(archive=ARCHIVES[0], homepage=HOMEPAGE)

    def splits(self, folder: Path) -> Splits:
        """Returns the files of the split at the top of this module."""
        train, test = [], []
        parts = [path for name, path in list_folder(folder)[0].items() if name.startswith("kos")]
        for number, part in enumerate(parts):
            for item in _labelled(list_images(part), "_label", folder):
                is_test = number % 5 == 4 or item.defect != GOOD
                (test if is_test else train).append(item)
        return {"train": to_records(train), "test": to_records(test)}


class KolektorSdd2(prepared.Builder):
    """Builder of KolektorSDD2: `<manual_dir>/train/10000.png` and `10000_GT.png`."""

    DESCRIPTION = __doc__ or ""
    HOMEPAGE = "https://www.vicos.si/resources/kolektorsdd2/"
    CITATION = "doi:10.1016/j.compind.2021.103459"
    LICENCE = _LICENCE
    ARCHIVES = ("KolektorSDD2.zip",)
    PLACES = (".",)
    MANUAL_DOWNLOAD_INSTRUCTIONS = _INSTRUCTIONS.format(archive=ARCHIVES[0], homepage=HOMEPAGE)

    def splits(self, folder: Path) -> Splits:
        """Returns the files of the official split, without defective training images."""
        # The archive has a copy of a training image and of its mask, with "copy" in their names.
        files = {
            split: [path for path in list_images(folder / split) if "copy" not in path.stem]
            for split in ("train", "test")
        }
        items = {split: _labelled(files[split], "_GT", folder) for split in files}
        items["train"] = [item for item in items["train"] if item.defect == GOOD]
        return {split: to_records(found) for split, found in items.items()}


def open_dataset(config: DataConfig) -> Dataset:
    """Opens the set `config.name`; see `manual.open_category`."""
    if config.name == "kolektor_sdd2":
        return manual.open_category(KolektorSdd2, config, COUNTS)
    dataset = manual.open_category(KolektorSdd, config)
    count = len(dataset.train) + len(dataset.test or ())
    if count != COUNT:
        warnings.warn(f"kolektor_sdd has {count} images, but officially {COUNT}.", stacklevel=2)
    dataset.provenance["split"] = (
        "all images of every fifth commutator are test images; of the others, normal images are "
        "training images and defective ones are test images"
    )
    return dataset


def _labelled(files: list[Path], suffix: str, folder: Path) -> list[Item]:
    """Images with their masks; the defect is "defect" where the mask is not black."""
    items = []
    for image, mask in pair(files, suffix).items():
        if mask is None:
            raise InputError(f"{image} has no mask {image.stem}{suffix}. Unpack the set again.")
        is_defective = decode_mask(read_file(mask), str(mask)).any()
        defect = "defect" if is_defective else GOOD
        items.append(Item(image, image.relative_to(folder).as_posix(), defect, (mask,)))
    return items
