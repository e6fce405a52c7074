"""BTAD (beanTech Anomaly Detection): three industrial products, with masks.

Mishra et al., "VT-ADL: A Vision Transformer Network for Image Anomaly Detection and Localization",
ISIE 2021. 2,540 images, .bmp and .png. Normal images are in directories named ok, defective ones
in ko; a mask has the name of its image.
"""

from fastflow_jax.data.dataset import Counts, DataConfig, Dataset
from fastflow_jax.data.layout import Layout
from fastflow_jax.data.tfds import manual, prepared

COUNTS: dict[str, Counts] = {
    "01": (400, 70),
    "02": (399, 230),
    "03": (1000, 441),
}  # training images, test images
CATEGORIES = tuple(COUNTS)

_ARCHIVE = "btad.zip"


class Btad(prepared.Builder):
    """Builder of one product."""

    BUILDER_CONFIGS = prepared.builder_configs(CATEGORIES)
    DESCRIPTION = __doc__ or ""
    HOMEPAGE = "https://avires.dimi.uniud.it/papers/btad/"
    CITATION = "doi:10.1109/ISIE45552.2021.9576231"
    LAYOUT = Layout(good="ok", mask_suffix="", calibration=None, is_complete=True)
    ARCHIVES = (_ARCHIVE,)
    SIZE = "1.2 GB"
    LICENCE = "none named by its authors; anomalib lists it as CC BY-NC-SA 4.0"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Download {_ARCHIVE} ({SIZE}; licence: {LICENCE}) from the University of Udine, "
        f"{HOMEPAGE}{_ARCHIVE}, and put it there, packed or unpacked; or set data.root to its "
        "directory."
    )


def open_dataset(config: DataConfig) -> Dataset:
    """Opens the product `config.category`: "01", "02" or "03".

    The raw files, `btad.zip` or the directories of the products, possibly one level deeper, are in
    `config.root` or in `downloads/manual/btad` of the data directory.

    Raises:
        InputError: an unknown product, or missing or invalid data.
    """
    return manual.open_category(Btad, config, COUNTS)
