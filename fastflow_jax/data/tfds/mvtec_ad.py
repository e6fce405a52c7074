"""MVTec AD: fifteen categories of industrial objects and textures, with exact masks.

Bergmann et al., "The MVTec Anomaly Detection Dataset: A Comprehensive Real-World Dataset for
Unsupervised Anomaly Detection", IJCV 129 (2021). 5,354 photographs of 700 to 1,024 pixels a side;
grid, screw and zipper are grey. Its licence (CC BY-NC-SA 4.0) has everybody download it oneself.
"""

import functools
from pathlib import Path

import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from fastflow_jax.data.dataset import Dataset, check_choice, check_counts
from fastflow_jax.data.layout import read_layout
from fastflow_jax.data.tfds import manual, prepared

COUNTS = {  # training images, test images
    "bottle": (209, 83),
    "cable": (224, 150),
    "capsule": (219, 132),
    "carpet": (280, 117),
    "grid": (264, 78),
    "hazelnut": (391, 110),
    "leather": (245, 124),
    "metal_nut": (220, 115),
    "pill": (267, 167),
    "screw": (320, 160),
    "tile": (230, 117),
    "toothbrush": (60, 42),
    "transistor": (213, 100),
    "wood": (247, 79),
    "zipper": (240, 151),
}
CATEGORIES = tuple(COUNTS)

_HOMEPAGE = "https://www.mvtec.com/company/research/datasets/mvtec-ad"
_LICENCE = "CC BY-NC-SA 4.0"
_ARCHIVE = "mvtec_anomaly_detection.tar.xz"
_DOWNLOAD = (
    f"Download {_ARCHIVE} (5.3 GB, {_LICENCE}: not for commercial use) from MVTec, {_HOMEPAGE}, "
    "and put it there, packed or unpacked; or set data.root to the folder that holds it."
)


class MvtecAd(tfds.core.GeneratorBasedBuilder):
    """`<manual_dir>` is the folder of the category."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in CATEGORIES]  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = _DOWNLOAD

    def _info(self) -> tfds.core.DatasetInfo:
        return prepared.dataset_info(
            self,
            masks=True,
            description=__doc__,
            homepage=_HOMEPAGE,
            citation="doi:10.1007/s11263-020-01400-4",
        )

    def _split_generators(self, dl_manager):
        found = read_layout(Path(dl_manager.manual_dir), complete=True)
        splits = {"train": found.train, "test": found.test}
        return {name: self._generate_examples(records) for name, records in splits.items()}

    def _generate_examples(self, records):
        return prepared.examples(records, f"mvtec_ad/{self.builder_config.name}", masks=True)


def open_dataset(config: ConfigDict) -> Dataset:
    """Opens the category `config.category`.

    The raw files, `mvtec_anomaly_detection.tar.xz` or the folders of the categories (maybe one
    level deeper), lie in `config.root` or in `downloads/manual/mvtec_ad` of the data directory.

    Raises:
        InputError: no such category, no such data, or something in it is not as it should be.
    """
    check_choice("data.category", config.category, CATEGORIES)
    archives = (_ARCHIVE, f"{config.category}.tar.xz")
    find_raw = functools.partial(manual.find_raw, archives=archives, download=_DOWNLOAD)
    builder = prepared.prepare(MvtecAd, config.category, config, find_raw)
    train, test = prepared.source(builder, "train"), prepared.source(builder, "test")
    check_counts(builder.info.full_name, (len(train), len(test)), COUNTS[config.category])
    provenance = prepared.provenance(builder)
    provenance |= {"category": config.category, "licence": _LICENCE}
    return Dataset("mvtec_ad", train, test, provenance)
