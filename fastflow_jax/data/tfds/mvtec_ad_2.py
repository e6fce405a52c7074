"""MVTec AD 2: eight scenes with transparent, overlapping and varying objects, with masks.

Heckler-Kram et al., "The MVTec AD 2 Dataset: Advanced Scenarios for Unsupervised Anomaly
Detection", arXiv:2503.21622. 8,004 images. The test images are those of `test_public`; `validation`
has the calibration images. `test_private` and `test_private_mixed` have no labels: `submission`
writes their results for the evaluation server. The layout is that of public readers (anomalib,
MVTec's public code utilities); the numbers of public test images are those of a public evaluation
(repository mvtec-ad2-inspection-platform). This module was never run on the official files.
"""

from fastflow_jax.data.dataset import Counts, DataConfig, Dataset
from fastflow_jax.data.layout import Layout
from fastflow_jax.data.tfds import manual, prepared

COUNTS: dict[str, Counts] = {  # training images, unknown; test images
    "can": (None, 162),
    "fabric": (None, 156),
    "fruit_jelly": (None, 80),
    "rice": (None, 132),
    "sheet_metal": (None, 114),
    "vial": (None, 140),
    "wallplugs": (None, 150),
    "walnuts": (None, 150),
}
CATEGORIES = tuple(COUNTS)
PRIVATE = ("test_private", "test_private_mixed")
# Images in each directory of PRIVATE, from MVTec's public code utilities.
PRIVATE_COUNTS = {
    "can": 321,
    "fabric": 314,
    "fruit_jelly": 255,
    "rice": 277,
    "sheet_metal": 142,
    "vial": 276,
    "wallplugs": 232,
    "walnuts": 228,
}

_ARCHIVE = "mvtec_ad_2.tar.gz"


class MvtecAd2(prepared.Builder):
    """Builder of one category."""

    name = "mvtec_ad_2"
    BUILDER_CONFIGS = prepared.builder_configs(CATEGORIES)
    DESCRIPTION = __doc__ or ""
    HOMEPAGE = "https://www.mvtec.com/company/research/datasets/mvtec-ad-2"
    CITATION = "arXiv:2503.21622"
    LICENCE = "CC BY-NC-SA 4.0"
    SIZE = "33 GB"
    LAYOUT = Layout(
        calibration="validation",
        test="test_public",
        ground_truth="test_public/ground_truth",
        ignored=PRIVATE,
        is_complete=True,
    )
    ARCHIVES = (_ARCHIVE, "{category}.tar.gz")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Download {_ARCHIVE} ({SIZE}, {LICENCE}: not for commercial use) from MVTec, {HOMEPAGE}, "
        "and put it there, packed or unpacked; or set data.root to its directory."
    )


def open_dataset(config: DataConfig) -> Dataset:
    """Opens the category `config.category`; see `manual.open_category`."""
    return manual.open_category(MvtecAd2, config, COUNTS)
