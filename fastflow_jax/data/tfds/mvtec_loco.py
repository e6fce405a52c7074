"""MVTec LOCO AD: five categories with logical and structural anomalies, and their regions.

Bergmann et al., "Beyond Dents and Scratches: Logical Constraints in Unsupervised Anomaly Detection
and Localization", IJCV 130 (2022). 3,644 images. The kinds of defects are `logical_anomalies` and
`structural_anomalies`; `validation` has the calibration images. Each mask file of an image is a
region, and `defects_config.json` has the saturation of its kind. Layout and saturations are those
of public readers (anomalib, MVTec's evaluation code); this module was never run on the official
files.
"""

import json
from pathlib import Path

import numpy as np

from fastflow_jax.data.dataset import Counts, DataConfig, Dataset, Record
from fastflow_jax.data.formats import open_image
from fastflow_jax.data.layout import Layout
from fastflow_jax.data.tfds import manual, prepared
from fastflow_jax.errors import InputError

COUNTS: dict[str, Counts] = {  # training images, test images
    "breakfast_box": (351, 275),
    "juice_bottle": (335, 330),
    "pushpins": (372, 310),
    "screw_bag": (360, 341),
    "splicing_connectors": (354, 312),
}
CATEGORIES = tuple(COUNTS)

_ARCHIVE = "mvtec_loco_anomaly_detection.tar.xz"
_DEFECTS = "defects_config.json"


class MvtecLoco(prepared.Builder):
    """Builder of one category; `<manual_dir>/ground_truth/<defect>/<name>/*.png` are regions."""

    BUILDER_CONFIGS = prepared.builder_configs(CATEGORIES)
    DESCRIPTION = __doc__ or ""
    HOMEPAGE = "https://www.mvtec.com/company/research/datasets/mvtec-loco"
    CITATION = "doi:10.1007/s11263-022-01578-9"
    LICENCE = "CC BY-NC-SA 4.0"
    LAYOUT = Layout(mask_suffix="", calibration="validation", is_complete=True)
    ARCHIVES = (_ARCHIVE, "{category}.tar.xz")
    HAS_REGIONS = True
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Download {_ARCHIVE} ({LICENCE}: not for commercial use) from MVTec, {HOMEPAGE}, "
        "and put it there, packed or unpacked; or set data.root to its directory."
    )

    def saturations(self, record: Record) -> list[float]:
        """Returns the share of each region that counts as all of it.

        The level of a mask is the kind of its defect. The threshold of a kind is a share of the
        region (`relative_saturation`) or a number of pixels, at most all of the region.
        """
        shares = []
        for path in record.masks:
            # <category>/ground_truth/<defect>/<name>/<region>.png
            kinds = _read_kinds(path.parents[3] / _DEFECTS)
            with open_image(path, str(path)) as image:
                levels = np.asarray(image)
            level, area = int(levels.max()), np.count_nonzero(levels)
            if level not in kinds or len(np.unique(levels[levels > 0])) > 1:
                raise InputError(
                    f"{path} does not have one level of {path.parents[3] / _DEFECTS}. "
                    "Unpack the data set again."
                )
            threshold, is_relative = kinds[level]
            pixels = int(threshold * area) if is_relative else min(threshold, area)
            shares.append(max(1, pixels) / area)
        return shares


def open_dataset(config: DataConfig) -> Dataset:
    """Opens the category `config.category`; see `manual.open_category`."""
    return manual.open_category(MvtecLoco, config, COUNTS)


def _read_kinds(path: Path) -> dict[int, tuple[float, bool]]:
    """Level in masks -> saturation threshold, whether it is a share of the region."""
    try:
        return {
            entry["pixel_value"]: (entry["saturation_threshold"], entry["relative_saturation"])
            for entry in json.loads(path.read_text("utf-8"))
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read ({error!r}). Unpack the data set again."
        ) from error
