"""Regions of interest: the pixels of an image that count, given by masks.

A mask is an image, white (above 0, see `transforms.decode_mask`) where pixels count. There is one
for all images, of aligned parts, or one for each image. Pixels outside a region are context: they
keep their values, and neither train nor score nor count.
"""

import base64
import dataclasses
import io
import json
import logging
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastflow_jax.data.dataset import GOOD, Dataset, Source
from fastflow_jax.data.layout import page_of
from fastflow_jax.data.transforms import decode_mask, read_file, resize_mask
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded

AUTO = "auto"  # the foreground of each image, see `features.foreground`
# (name of an image, its (height, width)) -> bool [H, W], True in pixels that count
Region = Callable[[str, tuple[int, int]], np.ndarray]

_log = logging.getLogger(__name__)
_SUFFIXES = (".png", "_mask.png")  # of mask files, after the name of the image


@dataclasses.dataclass(frozen=True, eq=False)
class CommonRegion:
    """The region of all images, for aligned parts."""

    mask: np.ndarray  # bool [h, w], True where pixels count
    name: str = "the region of interest"  # in messages

    def __post_init__(self) -> None:
        if not self.mask.any():
            raise _black(self.name)

    def to_plain(self) -> dict[str, str]:
        """The mask as a JSON value, for `from_plain`."""
        content = io.BytesIO()
        Image.fromarray(self.mask).save(content, "PNG")
        return {"png": base64.b64encode(content.getvalue()).decode()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, str]) -> "CommonRegion":
        """The inverse of `to_plain`.

        Raises:
          InputError: it is damaged.
        """
        return cls(decode_mask(base64.b64decode(plain["png"]), "the region of interest"))

    def __call__(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """Returns the region of an image: the mask, resized to its (height, width).

        Args:
          name: of the image in messages.
          size: (height, width) of the image.

        Raises:
          InputError: the image has another aspect ratio than the mask.
        """
        self.check(name, size)
        if size == self.mask.shape:
            return self.mask
        return _checked(resize_mask(self.mask, size), self.name)

    def check(self, name: str, size: tuple[int, int]) -> None:
        """Raises the InputError of `__call__` for an image of another aspect ratio."""
        (height, width), (rows, columns) = self.mask.shape, size
        # One of the two may have been resized from the other, and rounded to whole pixels.
        rounding = max(height + width, rows + columns) / 2
        if abs(columns * height - rows * width) > rounding:
            raise InputError(
                f"{name} has {columns} x {rows} pixels, but {self.name} has {width} x {height}. "
                "Both must have the same aspect ratio: use images that are cut alike, or a mask "
                "per image, see config.data.roi_dir."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class RegionFolder:
    """A directory with the region of each image, named after the image."""

    folder: Path

    def __call__(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """Returns the region of an image from its mask file, `<name>.png` or `<name>_mask.png`.

        Args:
          name: path of the image, relative to its directory; all pages of a file have one mask.
          size: (height, width) of the image.

        Raises:
          InputError: the mask is missing, black everywhere or damaged, or has another aspect ratio
            than the image.
        """
        file = self.file_of(name)
        return CommonRegion(decode_mask(read_file(file), str(file)), str(file))(name, size)

    def file_of(self, name: str) -> Path:
        """Returns the mask file of an image; for the argument and the error see `__call__`."""
        path, _ = page_of(name)
        found = [self.folder / path.with_name(path.stem + suffix) for suffix in _SUFFIXES]
        for each in found:
            if each.is_file():
                return each
        raise InputError(
            f"{found[0]} does not exist. Put the mask of {name} there, white where pixels count."
        )


def open_region(given: Any) -> CommonRegion | RegionFolder:
    """Returns the region of a mask file, of a directory of masks, or of a mask in memory.

    Args:
      given: a path, or an array [H, W] of bool or uint8, not 0 where pixels count.

    Raises:
      InputError: the path does not exist, or the mask is damaged or black everywhere.
    """
    if hasattr(given, "__array__"):
        mask = np.asarray(given)
        if mask.ndim != 2 or mask.dtype not in (np.bool_, np.uint8):
            raise InputError(
                f"The region of interest is an array {list(mask.shape)} of {mask.dtype}. It must "
                "be [H, W], of bool or uint8."
            )
        return CommonRegion(mask > 0)
    path = expanded(given)
    if path.is_dir():
        return RegionFolder(path)
    if not path.is_file():
        raise InputError(
            f"The region of interest {path} does not exist. Pass an image that is white where "
            "pixels count, and black elsewhere."
        )
    return CommonRegion(decode_mask(read_file(path), str(path)), str(path))


def common_region(config: Any) -> CommonRegion | None:
    """The region of all images that `config.data` names; None if it names none.

    Raises:
      InputError: see `open_region`; or the path is a directory.
    """
    if config.roi in (None, AUTO):
        return None
    found = open_region(config.roi)
    if isinstance(found, RegionFolder):
        raise InputError(
            f"config.data.roi is the directory {found.folder}. Pass a mask for all images, or the "
            "directory of a mask per image as --config.data.roi_dir."
        )
    return found


def identity(config: Any) -> list[str]:
    """Describes the masks that `config.data` names, to detect others; empty without masks."""
    if config.roi not in (None, AUTO):
        return [f"region of interest: {zlib.crc32(read_file(expanded(config.roi))):08x}"]
    if config.roi_dir is None:
        return []
    folder = expanded(config.roi_dir)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    about = [f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in files]
    return [f"regions of interest: {zlib.crc32(json.dumps(about).encode()):08x}"]


def with_regions(dataset: Dataset, config: Any) -> Dataset:
    """Returns a data set whose sources have the regions that `config.data` names.

    Masks of `roi_dir` have the names of their images, relative to the directory of the data set:
    `train/good/003.png`. Without a directory `train`, that directory is left out, as `good` is in
    a bare directory of images.

    Raises:
      InputError: see `common_region`; an image has another aspect ratio than the mask, as far as
        headers tell; the directory or a mask in it does not exist; or images of two splits would
        have one mask.
    """
    splits = {
        name: getattr(dataset, name)
        for name in ("train", "calibration", "test", "defects")
        if getattr(dataset, name) is not None
    }
    if (common := common_region(config)) is not None:
        if common.mask.all():
            _log.warning(
                "%s is white everywhere, so all pixels count, as without it. Paint what is outside "
                "of the region of interest black.",
                common.name,
            )
        for source in splits.values():
            if source.header is not None:
                for i, name in enumerate(source.names):
                    common.check(name, source.header(i).size)
        regions = {name: _with(source, common) for name, source in splits.items()}
        return dataclasses.replace(dataset, **regions)
    if config.roi_dir is None:
        return dataset
    folder = expanded(config.roi_dir)
    if not folder.is_dir():
        raise InputError(
            f"config.data.roi_dir {folder} is not a directory. Pass one with a mask per image."
        )
    _check_names(folder, splits)
    regions = {name: _with_masks(source, folder, name) for name, source in splits.items()}
    return dataclasses.replace(dataset, **regions)


def _with(source: Source, region: Region) -> Source:
    return dataclasses.replace(source, roi=lambda i, size: region(source.names[i], size))


def _with_masks(source: Source, folder: Path, split: str) -> Source:
    """The images of a split with the masks in a directory; raises InputError if one is missing."""
    of_split = folder / split if (folder / split).is_dir() else folder
    masks, has_good = RegionFolder(of_split), (of_split / GOOD).is_dir()

    def own(name: str) -> str:
        name = name if has_good else name.removeprefix(f"{GOOD}/")
        # Images that were passed as paths have these as names.
        return Path(name).name if Path(name).is_absolute() else name

    for name in source.names:
        masks.file_of(own(name))
    return _with(source, lambda name, size: masks(own(name), size))


def _check_names(folder: Path, splits: Mapping[str, Source]) -> None:
    """Raises InputError if two images of splits without a directory have the same name."""
    seen: dict[str, str] = {}
    for split, source in splits.items():
        if (folder / split).is_dir():
            continue
        for name in source.names:
            if (other := seen.setdefault(name, split)) != split:
                raise InputError(
                    f"{folder} has one mask for {other}/{name} and {split}/{name}. Put the masks "
                    f"of each split into its directory, {folder / other} and {folder / split}."
                )


def _black(name: str) -> InputError:
    return InputError(
        f"{name} is black everywhere, so no pixel would count. Paint the region of interest white."
    )


def _checked(region: np.ndarray, name: str) -> np.ndarray:
    if not region.any():
        raise InputError(
            f"The region of {name} has no pixel left in the size of the image. Draw it larger, or "
            "in the size of the images."
        )
    return region
