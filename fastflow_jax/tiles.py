"""Images larger than the input, cut into tiles that overlap, and their maps put together again."""

from collections.abc import Sequence

import numpy as np

_OVERLAP = 0.25  # part of a tile that it shares with the next one, at least


def places(size: tuple[int, int], tile: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Where tiles of `tile` = (height, width) lie in an image of `size`, evenly spread.

    All have that size, or the image's side where it is shorter.
    """
    rows, columns = map(_starts, size, tile)
    height, width = np.minimum(size, tile).tolist()
    return [(slice(r, r + height), slice(c, c + width)) for r in rows for c in columns]


def blend(
    maps: Sequence[np.ndarray], where: Sequence[tuple[slice, slice]], size: tuple[int, int]
) -> np.ndarray:
    """Maps of tiles -> the map of the image, float32 [H, W].

    Each pixel is a mean over the tiles that it lies in, whose weights fall towards the tiles'
    borders and sum to one: where maps agree nothing changes, where they differ one fades into the
    other.

    Args:
        maps: [h, w] a tile.
        where: see `places`.
        size: (H, W).
    """
    total, weights = np.zeros(size), np.zeros(size)
    for tile, place in zip(maps, where, strict=True):
        weight = np.outer(*map(_window, tile.shape))
        total[place] += weight * tile
        weights[place] += weight
    return (total / weights).astype(np.float32)


def _starts(length: int, tile: int) -> list[int]:
    if tile >= length:
        return [0]
    step = max(1, int(tile * (1 - _OVERLAP)))
    steps = -(-(length - tile) // step)
    return np.round(np.linspace(0, length - tile, steps + 1)).astype(int).tolist()


def _window(length: int) -> np.ndarray:
    """A triangle, which is nowhere zero."""
    return np.minimum(np.arange(length) + 1, np.arange(length)[::-1] + 1) / length
