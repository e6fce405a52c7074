"""MVTec AD: fifteen categories of industrial objects and textures, with exact masks.

Bergmann et al., "The MVTec Anomaly Detection Dataset: A Comprehensive Real-World Dataset for
Unsupervised Anomaly Detection", IJCV 129 (2021). 5,354 images of 700 to 1,024 pixels a side; grid,
screw and zipper are grey. The licence (CC BY-NC-SA 4.0) requires a manual download.
"""

from fastflow_jax.data.dataset import Counts, DataConfig, Dataset
from fastflow_jax.data.tfds import manual, prepared

COUNTS: dict[str, Counts] = {  # training images, test images
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

_ARCHIVE = "mvtec_anomaly_detection.tar.xz"


class MvtecAd(prepared.Builder):
    """Builder of one category."""

    BUILDER_CONFIGS = prepared.builder_configs(CATEGORIES)
    DESCRIPTION = __doc__ or ""
    HOMEPAGE = "https://www.mvtec.com/company/research/datasets/mvtec-ad"
    CITATION = "doi:10.1007/s11263-020-01400-4"
    LICENCE = "CC BY-NC-SA 4.0"
    SIZE = "5.3 GB"
    ARCHIVES = (_ARCHIVE, "{category}.tar.xz")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Download {_ARCHIVE} ({SIZE}, {LICENCE}: not for commercial use) from MVTec, {HOMEPAGE}, "
        "and put it there, packed or unpacked; or set data.root to its directory."
    )


def open_dataset(config: DataConfig) -> Dataset:
    """Opens the category `config.category`.

    The raw files, `mvtec_anomaly_detection.tar.xz`, `<category>.tar.xz` or the directories of the
    categories, possibly one level deeper, are in `config.root` or in `downloads/manual/mvtec_ad`
    of the data directory.

    Raises:
        InputError: an unknown category, or missing or invalid data.
    """
    return manual.open_category(MvtecAd, config, COUNTS)
