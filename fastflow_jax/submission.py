"""Results of the private test images of MVTec AD 2, in the layout of its evaluation server.

    <output>/anomaly_images/<category>/<split>/<name>.tiff              anomaly maps, float16
    <output>/anomaly_images_thresholded/<category>/<split>/<name>.png   masks, 0 or 255

Splits are `test_private` and `test_private_mixed`. The layout is that of MVTec's public code
utilities, whose program `check_and_prepare_data_for_upload.py` verifies and packs the directory.
"""

import io
import logging
import os
from pathlib import Path

import numpy as np
from PIL import Image

from fastflow_jax.data.layout import list_images
from fastflow_jax.data.tfds.mvtec_ad_2 import CATEGORIES, PRIVATE, PRIVATE_COUNTS
from fastflow_jax.detector import Detector
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded, make_folder, replacing

_log = logging.getLogger(__name__)

_TIFF_SAMPLE_FORMAT = 339  # 3: floats
_LARGEST = float(np.finfo(np.float16).max)


def submit(
    workdir: str | os.PathLike,
    root: str | os.PathLike,
    output: str | os.PathLike,
    *,
    weights: str | os.PathLike | None = None,
) -> int:
    """Scores the private test images of all categories and writes maps and masks.

    A mask is True above the detector's pixel threshold, which comes from validation images.

    Args:
      workdir: run directory of `configs/mvtec_ad_2.py`, with a directory for each category.
      root: directory of MVTec AD 2, with a directory for each category.
      output: directory for the results. Files of an earlier call are replaced.
      weights: weight file of the backbone, see `Detector.load`.

    Returns:
      Number of images.

    Raises:
      InputError: a detector, its threshold or a directory of images is missing, or an image cannot
        be read.
    """
    workdir, root, output = expanded(workdir), expanded(root), expanded(output)
    for folder in (workdir / category for category in CATEGORIES):
        if not folder.is_dir():
            raise InputError(
                f"{folder} does not exist. The server needs all categories: train them with "
                "--config=configs/mvtec_ad_2.py, or pass another --workdir."
            )
    images = {
        (category, split): _private_images(root, category, split)
        for category in CATEGORIES
        for split in PRIVATE
    }
    for category in CATEGORIES:
        detector = Detector.load(workdir / category, weights=weights)
        if detector.pixel_threshold is None:
            raise InputError(
                f"The detector of {workdir / category} has no pixel threshold. Train it with the "
                "images of validation."
            )
        for split in PRIVATE:
            paths = images[category, split]
            _log.info("%s/%s: %d images", category, split, len(paths))
            for path, found in zip(paths, detector.stream(map(str, paths)), strict=True):
                assert found.mask is not None
                name = f"{category}/{split}/{path.stem}"
                _write(output / f"anomaly_images/{name}.tiff", encode_tiff(found.anomaly_map))
                mask = Image.fromarray(found.mask * np.uint8(255))
                _write(output / f"anomaly_images_thresholded/{name}.png", _content(mask, "PNG"))
    return sum(map(len, images.values()))


def encode_tiff(anomaly_map: np.ndarray) -> bytes:
    """Encodes an anomaly map [H, W] as a TIFF file of float16."""
    halves = np.clip(anomaly_map, -_LARGEST, _LARGEST).astype("<f2")
    # Pillow has no mode for float16, so their bits are stored as integers, with a tag.
    image = Image.fromarray(halves.view("<u2"))
    return _content(image, "TIFF", tiffinfo={_TIFF_SAMPLE_FORMAT: 3})


def _private_images(root: Path, category: str, split: str) -> list[Path]:
    folder = root / category / split
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist. Pass the directory of MVTec AD 2 as --input.")
    paths = list_images(folder)
    if len(paths) != PRIVATE_COUNTS[category]:
        _log.warning(
            "%s has %d images, but the server expects %d.",
            folder,
            len(paths),
            PRIVATE_COUNTS[category],
        )
    return paths


def _content(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _write(path: Path, content: bytes) -> None:
    make_folder(path.parent)
    with replacing(path, "wb") as file:
        file.write(content)
