"""Levels of images of more than 8 bits that become black and white.

Images are scored as uint8. A file of 16 bits may be from a camera of 10 or 12, and 32-bit integers
and floats have no white level at all: `config.data.bits` states the depth, and
`config.data.window` takes the levels from percentiles of the training images. All images of a
detector have the same levels. Levels of each single image would hide that it is too dark.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from fastflow_jax.errors import InputError

_MIN_BITS, _MAX_BITS = 9, 16
_IMAGES, _PIXELS = 100, 2**16  # of the training images, sampled for a window

_log = logging.getLogger(__name__)


class LevelsConfig(Protocol):
    """Fields of `config.data` that set the levels."""

    bits: int | None
    window: tuple | None
    levels: tuple | None


@dataclasses.dataclass(frozen=True)
class Levels:
    """Maps pixels of more than 8 bits to uint8, the same way in all images.

    A level x becomes floor(256 (x - black) / (white - black)), clipped to 0 to 255. With `bits`
    these are the highest 8 bits. NaN becomes black.
    """

    black: float | None = None  # highest level that is black; None if it is not known yet
    white: float | None = None  # lowest level that is clipped
    bits: int | None = None  # stated depth, for unsigned integers of up to 16 bits
    window: tuple[float, float] | None = None  # percentiles of the training images
    _warned: list[str] = dataclasses.field(default_factory=list, compare=False, repr=False)

    @classmethod
    def of(cls, config: LevelsConfig) -> "Levels | None":
        """Returns the levels of `config.data`; None for the high byte of 16 bits.

        With a window whose levels are not known yet, they are pending, see `resolved`.

        Raises:
            InputError: a field is out of bounds, or both a depth and levels are stated.
        """
        _check(config)
        if config.bits is not None:
            return cls(0, 2**config.bits, config.bits)
        window = None if config.window is None else (config.window[0], config.window[1])
        if config.levels is not None:
            return cls(float(config.levels[0]), float(config.levels[1]), window=window)
        return None if window is None else cls(window=window)

    @classmethod
    def from_plain(cls, plain: dict[str, Any] | None) -> "Levels | None":
        """Returns the levels of `plain`, read back from JSON."""
        if plain is None:
            return None
        window = plain["window"] and tuple(plain["window"])
        return cls(float(plain["black"]), float(plain["white"]), plain["bits"], window)

    @property
    def plain(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: getattr(self, name) for name in ("black", "white", "bits", "window")}

    @property
    def is_pending(self) -> bool:
        """Whether the levels of the window are not known yet."""
        return self.black is None or self.white is None

    def __str__(self) -> str:
        if self.bits is not None:
            return f"{self.bits} bits"
        pair = "" if self.black is None else f"{self.black:g} to {self.white:g}"
        if self.window is None:
            return pair
        low, high = self.window
        return f"percentiles {low:g} to {high:g} of the training images" + (pair and f": {pair}")

    def resolved(self, names: Sequence[str], read: Callable[[int], np.ndarray]) -> "Levels":
        """Returns the levels with those of the window.

        They are the percentiles of 65,536 random pixels of each of up to 100 images, which are
        evenly spaced. Colours share their levels. Values that are not finite do not count.

        Args:
            names: of the training images, in messages.
            read: index -> pixels as stored, see `transforms.decode_stored`.

        Raises:
            InputError: an image has 8 bits, or both levels are equal.
        """
        if self.window is None or not self.is_pending:
            return self
        rng, found, n = np.random.default_rng(0), [], len(names)
        for i in np.linspace(0, n - 1, min(n, _IMAGES)).astype(int).tolist():
            values = read(i)
            self.check(values.dtype, names[int(i)])
            values = values.ravel()
            found.append(values if len(values) <= _PIXELS else rng.choice(values, _PIXELS))
        values = np.concatenate(found).astype(np.float64)
        values = values[np.isfinite(values)]
        if not len(values):
            raise InputError("The training images have no finite values. Check how they are saved.")
        black, white = np.percentile(values, self.window).tolist()
        if not black < white:
            raise InputError(
                f"The percentiles {self.window[0]:g} and {self.window[1]:g} of the training images "
                f"are both {black:g}. Set config.data.window to percentiles that are further apart."
            )
        _log.info("Levels up to %g become black, and from %g on white.", black, white)
        return dataclasses.replace(self, black=black, white=white)

    def check(self, dtype: np.dtype, name: str) -> None:
        """Raises an InputError if values of this type cannot be mapped."""
        if self.bits is None and dtype == np.uint8:
            raise InputError(
                f"{name} has 8 bits per channel, and config.data.window is for more. Pass images "
                "as the camera gives them, or train without config.data.window."
            )
        if self.bits is not None and dtype not in (np.uint8, np.uint16):
            raise unknown_white(f"{name} has {kind_of(dtype)}", dtype)

    def apply(self, values: np.ndarray, name: str) -> np.ndarray:
        """Maps pixels to uint8 of the same shape; pixels of pending levels are unchanged.

        With `bits`, values of 8 bits are unchanged. Logs a warning for the first image with a level
        above the stated depth.

        Args:
            values: of any type that `check` allows.
            name: name of the image in messages.
        """
        self.check(values.dtype, name)
        if self.bits is not None:
            return values if values.dtype == np.uint8 else self._high_bits(values, self.bits, name)
        if self.black is None or self.white is None:
            return values
        kind = np.float32 if values.dtype in (np.uint16, np.float32) else np.float64
        scaled = (values.astype(kind) - kind(self.black)) * kind(256 / (self.white - self.black))
        return np.clip(np.nan_to_num(scaled, nan=0), 0, 255).astype(np.uint8)

    def _high_bits(self, values: np.ndarray, bits: int, name: str) -> np.ndarray:
        highest, white = int(values.max(initial=0)), 2**bits - 1
        if highest > white and not self._warned:
            self._warned.append(name)
            _log.warning(
                "%s has levels up to %d, and config.data.bits=%d ends at %d: higher levels are "
                "clipped, here and in other images. Check config.data.bits.",
                name,
                highest,
                bits,
                white,
            )
        return (np.minimum(values, white) >> (bits - 8)).astype(np.uint8)


def _check(config: LevelsConfig) -> None:
    """Raises the InputError of `Levels.of`."""
    bits, ranges = config.bits, {"window": (0, 100), "levels": (-math.inf, math.inf)}
    if bits is not None and not _MIN_BITS <= bits <= _MAX_BITS:
        raise InputError(f"config.data.bits must be from {_MIN_BITS} to {_MAX_BITS}, not {bits}.")
    for field, (lowest, highest) in ranges.items():
        pair = getattr(config, field)
        if pair is None:
            continue
        if bits is not None:
            raise InputError(
                f"config.data.bits and config.data.{field} are both set. Set one of them."
            )
        if not _is_increasing(pair, lowest, highest):
            raise InputError(
                f"config.data.{field} must be (low, high), such as (1,99), not {tuple(pair)}."
            )


def _is_increasing(pair: Sequence, lowest: float, highest: float) -> bool:
    """Whether two numbers are in increasing order within bounds."""
    if len(pair) != 2 or not all(isinstance(value, int | float) for value in pair):
        return False
    return lowest <= pair[0] < pair[1] <= highest


def kind_of(dtype: np.dtype) -> str:
    """Returns the name of the type of stored values for messages."""
    if dtype == np.uint16:
        return "16-bit integers"
    return "floats" if dtype.kind == "f" else "32-bit or signed integers"


def unknown_white(
    subject: str, dtype: np.dtype, remedy: str = "Save it with 8 or 16 unsigned bits per channel"
) -> InputError:
    """Returns the error for values whose white level is unknown; `subject` begins it."""
    remedy += ", or train with percentiles of the training images, --config.data.window=(1,99)"
    if dtype == np.uint16:
        remedy = "Set config.data.bits to the bits of the camera, such as --config.data.bits=12"
    return InputError(f"{subject}, whose white level is unknown. {remedy}.")
