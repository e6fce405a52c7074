"""Profile of training images: what their files are like, to notice new ones that differ.

A detector takes the traces of another compression, size or bit depth for anomalies: of solar cells
that it learnt from PNG files, it flagged three in four once they had been JPEG of quality 75.
"""

import dataclasses

import numpy as np

from fastflow_jax.data.dataset import Source
from fastflow_jax.data.formats import Header

_HEADERS, _DECODED = 1000, 16  # images that are looked at, evenly spread
_QUALITY = 5  # difference in JPEG quality that does not count
_SIZE = 1.25  # factor that does not count where training images have several sizes


@dataclasses.dataclass(frozen=True)
class Profile:
    """What the training images have in common; JSON-able by `dataclasses.asdict`."""

    formats: tuple[str, ...]  # Pillow's names, sorted; empty for arrays in memory
    height: tuple[int, int]  # lowest and highest
    width: tuple[int, int]
    quality: tuple[int, int] | None  # of JPEG files, lowest and highest
    depths: tuple[int, ...]  # bits a channel, of files
    coloured: bool  # some channels differ

    @classmethod
    def from_plain(cls, plain: dict) -> "Profile":
        """The profile that `dataclasses.asdict` and JSON made lists of."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()})

    def differences(self, header: Header, image: np.ndarray) -> dict[str, str]:
        """In what an image differs from the training images: field -> sentence.

        Args:
            header: of its file.
            image: uint8 [H, W, 3].
        """
        found = {}
        if self.formats and header.format and header.format not in self.formats:
            found["format"] = f"is {_described(header)}, they are {self._files()}"
        elif self.quality and header.quality and not _is_near(header.quality, self.quality):
            found["quality"] = f"is {_described(header)}, they are {self._files()}"
        if self.depths and header.format and header.depth not in self.depths:
            depths = " or ".join(map(str, self.depths))
            found["depth"] = f"has {header.depth} bits a channel, they have {depths}"
        if not self._fits(header.size):
            height, width = header.size
            found["size"] = (
                f"has {width} x {height} pixels, they have {_range(self.width)} x "
                f"{_range(self.height)}"
            )
        if is_coloured(image) != self.coloured:
            found["colour"] = (
                "is grey, they have colours" if self.coloured else "has colours, they are grey"
            )
        return found

    def _files(self) -> str:
        quality = f" of quality {_range(self.quality)}" if self.quality else ""
        return f"{' or '.join(self.formats)}{quality}"

    def _fits(self, size: tuple[int, int]) -> bool:
        for side, (low, high) in zip(size, (self.height, self.width), strict=True):
            slack = 1 if low == high else _SIZE
            if not low / slack <= side <= high * slack:
                return False
        return True


def profile_of(source: Source, rows: np.ndarray) -> Profile | None:
    """The profile of the images at `rows`; None if the source knows no headers."""
    if source.header is None or not len(rows):
        return None
    headers = [source.header(int(i)) for i in _spread(rows, _HEADERS)]
    files = [header for header in headers if header.format is not None]
    qualities = [header.quality for header in files if header.quality is not None]
    heights, widths = zip(*(header.size for header in headers), strict=True)
    return Profile(
        tuple(sorted({header.format for header in files})),
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


def _is_near(quality: int, known: tuple[int, int]) -> bool:
    return known[0] - _QUALITY <= quality <= known[1] + _QUALITY


def _described(header: Header) -> str:
    return header.format + (f" of quality {header.quality}" if header.quality else "")


def _range(values: tuple[int, int]) -> str:
    low, high = values
    return str(low) if low == high else f"{low} to {high}"
