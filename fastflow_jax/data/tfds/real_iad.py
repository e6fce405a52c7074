"""Real-IAD: thirty small products, each seen from five sides, with masks.

Wang et al., "Real-IAD: A Real-World Multi-View Dataset for Benchmarking Versatile Industrial
Anomaly Detection", CVPR 2024, arXiv:2403.12580. 151,050 images. `real_iad` reads the lists of
`realiad_jsons`, with all five views; `real_iad_sv` those of `realiad_jsons_sv`, with the view from
above. Images of one sample are a group, see `Source.groups`. The lists of noisy training images
(`realiad_jsons_fuiad_*`) are not supported. Layout and fields are those of the authors' repository,
the categories those of public readers (ADer); the lists define the numbers of images. This module
was never run on the official files.
"""

import dataclasses
import json
import re
import warnings
from pathlib import Path

from fastflow_jax.data.dataset import GOOD, DataConfig, Dataset, Source
from fastflow_jax.data.layout import Item, Splits, find_images, to_records
from fastflow_jax.data.tfds import manual, prepared
from fastflow_jax.errors import InputError

CATEGORIES = (
    *("audiojack", "bottle_cap", "button_battery", "end_cap", "eraser", "fire_hood", "mint"),
    *("mounts", "pcb", "phone_battery", "plastic_nut", "plastic_plug", "porcelain_doll"),
    *("regulator", "rolled_strip_base", "sim_card_set", "switch", "tape", "terminalblock"),
    *("toothbrush", "toy", "toy_brick", "transistor1", "usb", "usb_adaptor", "u_block", "vcpill"),
    *("wooden_beads", "woodstick", "zipper"),
)

_RESOLUTIONS = ("1024", "512", "256", "raw")  # the first that is present is read
_SAMPLE = re.compile(r".*S\d+(?=/)")  # directory of the views of a sample
_NORMAL = "OK"


class RealIad(prepared.Builder):
    """Builder of one product; `<manual_dir>` is `realiad_1024/<category>`, next to the lists."""

    BUILDER_CONFIGS = prepared.builder_configs(CATEGORIES)
    DESCRIPTION = __doc__ or ""
    HOMEPAGE = "https://realiad4ad.github.io/Real-IAD/"
    CITATION = "arXiv:2403.12580"
    LICENCE = "CC BY-NC-SA 4.0"
    IMAGES = "151,050 in all"
    PLACES = tuple(f"realiad_{size}/{{category}}" for size in _RESOLUTIONS)
    CONTAINS = _NORMAL
    LISTS = "realiad_jsons"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Ask for the set ({LICENCE}: not for commercial use) at {HOMEPAGE}, unpack "
        "realiad_jsons.zip there and the archive of each product in realiad_1024; or set data.root "
        "to the directory that has them."
    )

    def splits(self, folder: Path) -> Splits:
        """Returns the files of the lists of the product."""
        path = _find_list(folder.parents[1], self.LISTS, self.category)
        items = {split: _items(path, split, folder) for split in ("train", "test")}
        found = find_images(folder)
        if found.others:
            raise InputError(f"{found.others[0]} is not an image. Move it elsewhere.")
        listed = {
            file for split in items.values() for item in split for file in (item.image, *item.masks)
        }
        unlisted = [file for file in found.images if file not in listed]
        if unlisted and self.LISTS == RealIad.LISTS:
            warnings.warn(
                f"{len(unlisted)} files are not in {path}, such as {unlisted[0]}. They are not "
                "used.",
                stacklevel=2,
            )
        return {split: to_records(found) for split, found in items.items()}


class RealIadSv(RealIad):
    """Builder of one product seen from above."""

    BUILDER_CONFIGS = prepared.builder_configs(CATEGORIES)
    IMAGES = "as listed"
    LISTS = "realiad_jsons_sv"


def open_dataset(config: DataConfig) -> Dataset:
    """Opens the product `config.category` of `config.name`; see `manual.open_category`."""
    builder_class = RealIadSv if config.name == "real_iad_sv" else RealIad
    dataset = manual.open_category(builder_class, config)
    test = dataset.test and _grouped(dataset.test)
    return dataclasses.replace(dataset, train=_grouped(dataset.train), test=test)


def _grouped(source: Source) -> Source:
    """The source with the sample of each image as its group."""
    samples = [_SAMPLE.match(name) for name in source.names]
    if None in samples:
        return source
    return dataclasses.replace(source, groups=tuple(match[0] for match in samples if match))


def _find_list(root: Path, lists: str, category: str) -> Path:
    candidates = [
        root / lists / f"{category}.json",
        root / RealIad.LISTS / lists / f"{category}.json",
    ]
    for path in candidates:
        if path.is_file():
            return path
    raise InputError(f"{candidates[0]} does not exist. Unpack realiad_jsons.zip in {root}.")


def _items(path: Path, split: str, folder: Path) -> list[Item]:
    """Images of a split in a list; each entry has category, anomaly_class, image and mask."""
    items = []
    try:
        for entry in json.loads(path.read_text("utf-8"))[split]:
            image, mask, kind = entry["image_path"], entry["mask_path"], entry["anomaly_class"]
            if kind != _NORMAL and mask is None:
                raise InputError(f"{path} has no mask of {folder / image}. Unpack it again.")
            masks = (folder / mask,) if kind != _NORMAL else ()
            items.append(Item(folder / image, image, GOOD if kind == _NORMAL else kind, masks))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error!r}). Unpack it again.") from error
    return items
