"""Profile of training images: formats, sizes and colours, to recognise new images that differ.

A detector scores traces of another compression, size or bit depth as anomalies. Trained on solar
cells in PNG files, it flagged three in four of them after JPEG compression of quality 75.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from fastflow_jax.data.dataset import Source
from fastflow_jax.data.formats import Header
from fastflow_jax.errors import InputError

_HEADERS, _DECODED = 1000, 16  # images sampled, evenly spaced
_QUALITY = 5  # tolerated difference in JPEG quality
_SIZE = 1.25  # tolerated factor if training images have several sizes


@dataclasses.dataclass(frozen=True)
class Profile:
    """Properties of the training images; JSON-able by `dataclasses.asdict`."""

    formats: tuple[str, ...]  # names in Pillow, sorted; empty for arrays in memory
    height: tuple[int, int]  # lowest and highest
    width: tuple[int, int]
    quality: tuple[int, int] | None  # of JPEG files, lowest and highest
    depths: tuple[int, ...]  # bits per channel, of files
    coloured: bool  # whether channels differ in an image

    @classmethod
    def from_plain(cls, plain: dict) -> "Profile":
        """Returns the profile from the fields of `dataclasses.asdict`, read back from JSON.

        Raises:
          InputError: a field is missing, unknown or of another type.
        """
        try:
            lists = {
                "formats": tuple(map(str, plain["formats"])),
                "height": _pair(plain["height"]),
                "width": _pair(plain["width"]),
                "quality": plain["quality"] and _pair(plain["quality"]),
                "depths": tuple(map(int, plain["depths"])),
            }
            return cls(**plain | lists)
        except (TypeError, ValueError, KeyError) as error:
            raise InputError(
                f"The record of the training images is damaged, or was written by another version "
                f"({error}). Install that version, or train again."
            ) from error

    def differences(self, header: Header, image: np.ndarray) -> dict[str, str]:
        """Returns the differences of an image from the training images, by field, as text.

        Args:
            header: header of its file.
            image: uint8 [H, W, 3].
        """
        found = {}
        own = f"{header.format} of quality {header.quality}" if header.quality else header.format
        quality = f" of quality {_range(self.quality)}" if self.quality else ""
        files = f"is {own}, training images are {' or '.join(self.formats)}{quality}"
        if self.formats and header.format and header.format not in self.formats:
            found["format"] = files
        elif self.quality and header.quality:
            low, high = self.quality
            if not low - _QUALITY <= header.quality <= high + _QUALITY:
                found["quality"] = files
        if self.depths and header.format and header.depth not in self.depths:
            depths = " or ".join(map(str, self.depths))
            found["depth"] = f"has {header.depth} bits per channel, training images have {depths}"
        if not self._fits(header.size):
            height, width = header.size
            found["size"] = (
                f"has {width} x {height} pixels, training images have {_range(self.width)} x "
                f"{_range(self.height)}"
            )
        if is_coloured(image) != self.coloured:
            found["colour"] = "is grey, training images have colours"
            if not self.coloured:
                found["colour"] = "has colours, training images are grey"
        return found

    def merged(self, other: "Profile") -> "Profile":
        """Returns the profile of the images of both."""

        def union(one: tuple, two: tuple) -> tuple:
            return tuple(sorted({*one, *two}))

        def reach(one: tuple[int, int], two: tuple[int, int]) -> tuple[int, int]:
            return min(one[0], two[0]), max(one[1], two[1])

        qualities = [each.quality for each in (self, other) if each.quality is not None]
        return Profile(
            union(self.formats, other.formats),
            reach(self.height, other.height),
            reach(self.width, other.width),
            functools.reduce(reach, qualities) if qualities else None,
            union(self.depths, other.depths),
            self.coloured or other.coloured,
        )

    def _fits(self, size: tuple[int, int]) -> bool:
        def fits(side: int, low: int, high: int) -> bool:
            slack = 1 if low == high else _SIZE
            return low / slack <= side <= high * slack

        return fits(size[0], *self.height) and fits(size[1], *self.width)


def profile_of(source: Source, rows: np.ndarray) -> Profile | None:
    """Returns the profile of the images at `rows`, or None if the source has no headers."""
    if source.header is None or not len(rows):
        return None
    headers = [source.header(int(i)) for i in _spread(rows, _HEADERS)]
    files = [header for header in headers if header.format is not None]
    qualities = [header.quality for header in files if header.quality is not None]
    heights, widths = zip(*(header.size for header in headers), strict=True)
    return Profile(
        tuple(sorted({header.format or "" for header in files})),
        (min(heights), max(heights)),
        (min(widths), max(widths)),
        (min(qualities), max(qualities)) if qualities else None,
        tuple(sorted({header.depth for header in files})),
        any(is_coloured(source[int(i)].image) for i in _spread(rows, _DECODED)),
    )


def is_coloured(image: np.ndarray) -> bool:
    """Whether the channels of uint8 [H, W, 3] differ."""
    return bool((image != image[..., :1]).any())


def _spread(rows: np.ndarray, n: int) -> np.ndarray:
    return rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)]


def _pair(values: Any) -> tuple[int, int]:
    low, high = map(int, values)
    return low, high


def _range(values: tuple[int, int]) -> str:
    low, high = values
    return str(low) if low == high else f"{low} to {high}"
