"""BTAD, beanTech anomaly detection: three industrial products, with masks.

Mishra et al., "VT-ADL: A Vision Transformer Network for Image Anomaly Detection and Localization",
ISIE 2021. 2,540 photographs, .bmp and .png; normal ones lie in folders named ok, defective ones in
ko, and a mask has the name of its image.
"""

import functools
from pathlib import Path

import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from fastflow_jax.data.dataset import Dataset, check_choice, check_counts
from fastflow_jax.data.layout import read_layout
from fastflow_jax.data.tfds import manual, prepared

COUNTS = {"01": (400, 70), "02": (399, 230), "03": (1000, 441)}  # training images, test images
CATEGORIES = tuple(COUNTS)

_ARCHIVE = "btad.zip"
_LICENCE = "none named by its authors; anomalib lists it as CC BY-NC-SA 4.0"
_DOWNLOAD = (
    f"Download {_ARCHIVE} (1.2 GB; licence: {_LICENCE}) from the University of Udine, "
    f"https://avires.dimi.uniud.it/papers/btad/{_ARCHIVE}, "
    "and put it there, packed or unpacked; or set data.root to the folder that holds it."
)


class Btad(tfds.core.GeneratorBasedBuilder):
    """`<manual_dir>` is the folder of the product."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in CATEGORIES]  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = _DOWNLOAD

    def _info(self) -> tfds.core.DatasetInfo:
        return prepared.dataset_info(
            self,
            masks=True,
            description=__doc__,
            homepage="https://avires.dimi.uniud.it/papers/btad/",
            citation="doi:10.1109/ISIE45552.2021.9576231",
        )

    def _split_generators(self, dl_manager):
        found = read_layout(Path(dl_manager.manual_dir), good="ok", mask_suffix="", complete=True)
        splits = {"train": found.train, "test": found.test}
        return {name: self._generate_examples(records) for name, records in splits.items()}

    def _generate_examples(self, records):
        return prepared.examples(records, f"btad/{self.builder_config.name}", masks=True)


def open_dataset(config: ConfigDict) -> Dataset:
    """Opens the product `config.category`: "01", "02" or "03".

    The raw files, `btad.zip` or the folders of the products (maybe one level deeper), lie in
    `config.root` or in `downloads/manual/btad` of the data directory.

    Raises:
        InputError: no such product, no such data, or something in it is not as it should be.
    """
    check_choice("data.category", config.category, CATEGORIES)
    find_raw = functools.partial(manual.find_raw, archives=(_ARCHIVE,), download=_DOWNLOAD)
    builder = prepared.prepare(Btad, config.category, config, find_raw)
    train, test = prepared.source(builder, "train"), prepared.source(builder, "test")
    check_counts(builder.info.full_name, (len(train), len(test)), COUNTS[config.category])
    provenance = prepared.provenance(builder)
    provenance |= {"category": config.category, "licence": _LICENCE}
    return Dataset("btad", train, test, provenance)
