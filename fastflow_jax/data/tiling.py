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


class Blender:
    """The map of an image, float32 [H, W], as the sum of the weighted maps of its tiles.

    Each pixel is a mean over the tiles that it lies in, whose weights fall towards the tiles'
    borders and sum to one: where maps agree nothing changes, where they differ one fades into the
    other. The memory is that of the map of the image and of one tile.

    Args:
        size: (H, W).
        where: of all tiles, see `places`.
    """

    def __init__(self, size: tuple[int, int], where: Sequence[tuple[slice, slice]]):
        self._map = np.zeros(size, np.float32)
        # Tiles form a grid, so that the weight of a pixel is that of its row times its column's.
        self._weights = [_weights(size[i], [place[i] for place in where]) for i in (0, 1)]

    def add(self, tile_map: np.ndarray, place: tuple[slice, slice]) -> None:
        """Adds the map of the tile at `place`, [h, w]; each tile is to be added once."""
        if tile_map.shape == self._map.shape:  # the only tile
            self._map = tile_map.astype(np.float32, copy=False)
            return
        rows, columns = (w[p.start] for w, p in zip(self._weights, place, strict=True))
        self._map[place] += tile_map * rows[:, None] * columns

    def result(self) -> np.ndarray:
        """The map of the image, once all tiles are added."""
        return self._map


def _starts(length: int, tile: int) -> list[int]:
    if tile >= length:
        return [0]
    step = max(1, int(tile * (1 - _OVERLAP)))
    steps = -(-(length - tile) // step)
    return np.round(np.linspace(0, length - tile, steps + 1)).astype(int).tolist()


def _weights(length: int, spans: Sequence[slice]) -> dict[int, np.ndarray]:
    """Of the tiles along one axis, by their starts: what each pixel of a tile weighs, float32."""
    windows = {span.start: _window(span.stop - span.start) for span in spans}
    total = np.zeros(length)
    for start, window in windows.items():
        total[start : start + len(window)] += window
    return {
        start: (window / total[start : start + len(window)]).astype(np.float32)
        for start, window in windows.items()
    }


def _window(length: int) -> np.ndarray:
    """A triangle, which is nowhere zero."""
    return np.minimum(np.arange(length) + 1, np.arange(length)[::-1] + 1) / length
