"""MPDD: painted metal parts under changing positions, distances and light, with masks.

Jezek et al., "Deep learning-based defect detection of metal parts: evaluating current methods in
complex conditions", ICUMT 2021. 1,346 images in the layout of MVTec AD. Categories and layout are
those of a public reader (ADer, data/gen_benchmark/mpdd.py) and the counts those of the paper; this
module was never run on the official files.
"""

from fastflow_jax.data.dataset import Counts, DataConfig, Dataset
from fastflow_jax.data.tfds import manual, prepared

COUNTS: dict[str, Counts] = {  # training images, test images
    "bracket_black": (289, 79),
    "bracket_brown": (185, 77),
    "bracket_white": (110, 60),
    "connector": (128, 44),
    "metal_plate": (54, 97),
    "tubes": (122, 101),
}
CATEGORIES = tuple(COUNTS)

_ARCHIVE = "MPDD.zip"


class Mpdd(prepared.Builder):
    """Builder of one category."""

    BUILDER_CONFIGS = prepared.builder_configs(CATEGORIES)
    DESCRIPTION = __doc__ or ""
    HOMEPAGE = "https://github.com/stepanje/MPDD"
    CITATION = "doi:10.1109/ICUMT54235.2021.9631567"
    LICENCE = "CC BY-NC-SA 4.0"
    ARCHIVES = (_ARCHIVE,)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Download the data set ({LICENCE}: not for commercial use) from the link in {HOMEPAGE}, "
        f"and put its directory or {_ARCHIVE} there; or set data.root to its directory."
    )


def open_dataset(config: DataConfig) -> Dataset:
    """Opens the category `config.category`; see `manual.open_category`."""
    return manual.open_category(Mpdd, config, COUNTS)
