"""Data sets as the rest of the package uses them: labelled images, read on demand."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from fastflow_jax.data.formats import Header
from fastflow_jax.data.levels import Levels, LevelsConfig
from fastflow_jax.errors import InputError

GOOD = "good"  # the defect of an image without one

Counts = tuple[int | None, int]  # published numbers of training and test images, None if unknown


class DataConfig(LevelsConfig, Protocol):
    """Fields of `config.data` that select images, see `data.open_dataset`, and cut them."""

    name: str
    category: str | None
    root: str | None
    manifest: str | None
    dir: str | None
    groups: str | None
    tile: int | None
    resolution: int | None
    roi: str | None
    roi_dir: str | None


class Example(NamedTuple):
    """One image with its labels."""

    image: np.ndarray  # uint8 [H, W, 3]
    mask: np.ndarray | None  # bool [H, W], True where defective; None if the set has no masks
    label: int  # 0 good, 1 defective
    defect: str  # "good" or the kind of defect
    name: str  # unique in its source, such as "crack/003.png"


class Regions(NamedTuple):
    """Defective regions of an image, for metrics of regions such as sPRO; they may overlap."""

    masks: np.ndarray  # bool [R, H, W]; their union is the mask of the image
    # float32 [R], in (0, 1]: share of the pixels of a region that counts as all of it
    saturation: np.ndarray


class Record(NamedTuple):
    """Files of one example."""

    image: Path
    masks: tuple[Path, ...]  # their union is the mask, see `masks.read`
    defect: str
    name: str  # unique in its source
    page: int = 0  # of image and masks, in files with several images
    header: Header | None = None  # of the image


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One split: names and defects are in memory, `source[i]` decodes an image.

    Either all examples of a source have masks or none has.
    """

    names: tuple[str, ...]  # of the examples, unique
    defects: tuple[str, ...]  # kind of defect of each example, or `GOOD`
    load: Callable[[int], tuple[np.ndarray, np.ndarray | None]]  # index -> image, mask
    # For a subset: the whole source, without masks, and the rows of the images in it. Features of
    # the whole source serve all its subsets.
    part_of: tuple["Source", np.ndarray | slice] | None = None
    # Names of the masks decoded so far that were cut, see `transforms.decode_mask`.
    cut_masks: set[str] = dataclasses.field(default_factory=set)
    # File status of each image, None for images in memory; detects replaced files.
    files: tuple[os.stat_result | None, ...] | None = None
    # index -> header of the image, without decoding. None if images have no headers.
    header: Callable[[int], Header] | None = None
    # Images with equal labels show the same part. None: `data.groups.labels_of` uses the names.
    groups: tuple[str, ...] | None = None
    # index -> regions of the defects; [0, H, W] in good images. None if the set defines none.
    regions: Callable[[int], Regions] | None = None
    # (index, (height, width) of the image) -> bool [H, W], True in the region of interest, see
    # `data.roi`. None: all pixels count.
    roi: Callable[[int, tuple[int, int]], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, rows: np.ndarray, *, share: bool = False) -> "Source":
        """The examples at `rows`, int [M].

        Args:
          rows: of the examples.
          share: sets `part_of`, so that subsets share their features; for sources without masks.
        """

        def of(values):
            return None if values is None else tuple(values[i] for i in rows)

        header, regions, roi = self.header, self.regions, self.roi
        return Source(
            names=tuple(self.names[i] for i in rows),
            defects=tuple(self.defects[i] for i in rows),
            load=lambda index: self.load(rows[index]),
            part_of=(self, rows) if share else None,
            cut_masks=self.cut_masks,
            files=of(self.files),
            header=None if header is None else lambda index: header(rows[index]),
            groups=of(self.groups),
            regions=None if regions is None else lambda index: regions(rows[index]),
            roi=None if roi is None else lambda index, size: roi(rows[index], size),
        )

    def __getitem__(self, index: int) -> Example:
        defect = self.defects[index]
        image, mask = self.load(index)
        return Example(image, mask, int(defect != GOOD), defect, self.names[index])

    @functools.cached_property
    def contents(self) -> tuple[str, ...]:
        """Identity of each image wherever it is stored: name and file size.

        Two files of equal name and size count as the same image.
        """
        return self._identities(lambda file: f"{file.st_size} bytes")

    @functools.cached_property
    def versions(self) -> tuple[str, ...]:
        """`contents` and modification time: identity of each image on this disk."""
        return self._identities(lambda file: f"{file.st_size} bytes, {file.st_mtime_ns}")

    def _identities(self, describe: Callable[[os.stat_result], str]) -> tuple[str, ...]:
        files = self.files or [None] * len(self)
        pairs = zip(self.names, files, strict=True)
        return tuple(name if file is None else f"{name}, {describe(file)}" for name, file in pairs)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int32 [N], 0 good and 1 defective. Decodes nothing."""
        return np.array([defect != GOOD for defect in self.defects], np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Normal images for training, test images, and where they are from (JSON-able)."""

    name: str  # in tables and messages
    train: Source  # normal images
    test: Source | None  # None without test images
    provenance: dict  # source, category, licence and numbers of images, for results.json
    # Normal images for calibration and thresholds. None: some training images are held out.
    calibration: Source | None = None
    # Images with labelled defects to learn from, see `evaluation.labelled`.
    defects: Source | None = None
    levels: Levels | None = None  # by which images of more than 8 bits are read


def check_choice(field: str, value: str | None, choices: Iterable[str]) -> str:
    """Returns `value`, or raises an InputError that lists the choices if it is not one of them."""
    choices = tuple(choices)
    if value is None or value not in choices:
        problem = f"is {value!r}" if value is not None else "is not set"
        raise InputError(f"{field} {problem}. Choose one of {', '.join(choices)}.")
    return value


def check_counts(title: str, counts: tuple[int, int], official: Counts) -> None:
    """Warns unless (training images, test images) are the published counts."""
    pairs = zip(("training", "test"), counts, official, strict=True)
    known = [(kind, number, stated) for kind, number, stated in pairs if stated is not None]
    if any(number != stated for _, number, stated in known):
        found = " and ".join(f"{number} {kind}" for kind, number, _ in known)
        warnings.warn(
            f"{title} has {found} images, but officially "
            f"{' and '.join(str(stated) for *_, stated in known)}. Do not compare its results with "
            "published ones.",
            stacklevel=3,
        )
