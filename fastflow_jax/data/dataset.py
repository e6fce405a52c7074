"""What a data set is to the rest of the package: images with labels, read when asked for."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastflow_jax.data.formats import Header
from fastflow_jax.errors import InputError

GOOD = "good"  # the defect of an image without one


class Example(NamedTuple):
    """One image and what is known of it."""

    image: np.ndarray  # uint8 [H, W, 3]
    mask: np.ndarray | None  # bool [H, W], true where defective; None where the set has none
    label: int  # 0 good, 1 defective
    defect: str  # "good" or the kind of defect
    name: str  # unique in its source, such as "crack/003.png"


class Record(NamedTuple):
    """The files of one example."""

    image: Path
    mask: Path | None
    defect: str
    name: str  # unique in its source
    page: int = 0  # of image and mask, for files that hold several
    header: Header | None = None  # of the image


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One split: names and defects at hand, images decoded by `source[i]`.

    Either all examples of a source have masks or none has.
    """

    names: tuple[str, ...]
    defects: tuple[str, ...]
    load: Callable[[int], tuple[np.ndarray, np.ndarray | None]]  # index -> image, mask
    # Of a part: the source, without masks, that it is a part of, and the places of its images
    # there. What is computed once for all images of that source serves every part of it.
    part_of: tuple["Source", np.ndarray | slice] | None = None
    # Mask files read so far that were cut, see `transforms.decode_mask`.
    cut_masks: set[str] = dataclasses.field(default_factory=set)
    # Of files that may be replaced under their names: what the system says of each.
    files: tuple[os.stat_result | None, ...] | None = None
    # The header of an image's file, for data that are or were files. Decodes nothing.
    header: Callable[[int], Header] | None = None
    # Images with equal labels show the same part; None: `data.groups.labels_of` decides by names.
    groups: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        defect = self.defects[index]
        image, mask = self.load(index)
        return Example(image, mask, int(defect != GOOD), defect, self.names[index])

    @functools.cached_property
    def contents(self) -> tuple[str, ...]:
        """What tells images from others, wherever they lie: their names and the sizes of files.

        Other content that takes as many bytes passes for the same.
        """
        return self._with_files(lambda file: f"{file.st_size} bytes")

    @functools.cached_property
    def versions(self) -> tuple[str, ...]:
        """`contents`, and when files were last written to: what lies on this disk now."""
        return self._with_files(lambda file: f"{file.st_size} bytes, {file.st_mtime_ns}")

    def _with_files(self, told: Callable[[os.stat_result], str]) -> tuple[str, ...]:
        """Names, and of those of files what is told of them."""
        files = self.files or [None] * len(self)
        pairs = zip(self.names, files, strict=True)
        return tuple(name if file is None else f"{name}, {told(file)}" for name, file in pairs)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """0 good, 1 defective: int32 [N], without decoding an image."""
        return np.array([defect != GOOD for defect in self.defects], np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Normal images to train on, images to test on, and where they came from (JSON-able)."""

    name: str
    train: Source
    test: Source | None
    provenance: dict
    # Normal images for calibration and thresholds; None: some training images are held out.
    calibration: Source | None = None


def check_choice(field: str, value: str | None, choices: Iterable[str]) -> None:
    """Raises an InputError that lists the choices unless `value` is one of them."""
    choices = tuple(choices)
    if value not in choices:
        given = f"is {value!r}" if value is not None else "is not set"
        raise InputError(f"{field} {given}; choose one of {', '.join(choices)}.")


def check_counts(title: str, counts: tuple[int, int], official: tuple[int, int]) -> None:
    """Warns unless a data set has as many training and test images as were published."""
    if counts != official:
        warnings.warn(
            f"{title} has {counts[0]} training and {counts[1]} test images, officially "
            f"{official[0]} and {official[1]}: figures on it do not compare to published ones.",
            stacklevel=3,
        )
