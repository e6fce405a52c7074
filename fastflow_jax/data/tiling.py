"""Overlapping tiles of images that are larger than the input, and blending of their maps."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fastflow_jax.data.dataset import DataConfig

OVERLAP = 0.25  # smallest fraction of a tile shared with the next one

Place = tuple[slice, slice]  # rows and columns of a tile in its image


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How images are cut into tiles."""

    side: tuple[int, int]  # (height, width) of the tiles, in pixels of the resized image
    resolution: int | None = None  # longer side of the resized image; None: its own

    @classmethod
    def of(cls, section: DataConfig) -> "Tiling | None":
        """That of `config.data`; None if its images are not cut."""
        side = section.tile
        return None if side is None else cls((side, side), section.resolution)

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size (height, width) of an image of a size after it is resized."""
        if self.resolution is None:
            return size
        longest = max(size)
        height, width = (max(1, round(side * self.resolution / longest)) for side in size)
        return height, width


def places(size: tuple[int, int], tile: tuple[int, int], overlap: float = OVERLAP) -> list[Place]:
    """Returns evenly spaced tiles that cover an image.

    Args:
        size: (height, width) of the image.
        tile: (height, width) of the tiles; limited to the size of the image.
        overlap: smallest fraction of a tile shared with the next one, from 0 to below 1.
    """
    rows, columns = (_starts(*sides, overlap) for sides in zip(size, tile, strict=True))
    height, width = np.minimum(size, tile).tolist()
    return [(slice(r, r + height), slice(c, c + width)) for r in rows for c in columns]


class Places:
    """Statistics of the tiles at each place of normal images that show aligned parts.

    A tile with an edge of the part has higher scores and maps than one of its inside. Those of new
    tiles are standardised by the mean and the standard deviation of normal tiles at their place.
    The estimates are shrunk: a standard deviation towards that of all places, which counts as five
    images, and a mean towards the mean of all places, as far as its error explains the difference.

    Attributes:
        table: float64 [P, 6], a row per place: its first row and column in the image, mean and
            standard deviation of scores, mean and standard deviation of the pixels of maps.
    """

    _PRIOR = 5

    def __init__(self, table: np.ndarray):
        self.table = table
        self._rows = {(int(top), int(left)): i for i, (top, left) in enumerate(table[:, :2])}

    @classmethod
    def fit(cls, places: Sequence[Place], scores: np.ndarray, maps: np.ndarray) -> "Places":
        """Estimates the statistics.

        Args:
            places: the tiles of an image, P.
            scores: of the tiles of M images, [M, P].
            maps: mean and mean square of the pixels of their anomaly maps, [M, P, 2].
        """
        n, mean = len(scores), scores.mean(0)
        pooled = scores.var(0).mean() * n / max(1, n - 1)
        variance = (n * scores.var(0) + cls._PRIOR * pooled) / (n + cls._PRIOR)
        error = pooled / n
        between = max(0.0, mean.var() - error)
        share = between / (between + error) if between + error > 0 else 0.0
        level, square = maps.mean(0).T
        spread = np.sqrt(np.maximum(square - level**2, 1e-12))
        starts = [(rows.start, columns.start) for rows, columns in places]
        mean = mean.mean() + share * (mean - mean.mean())
        columns = (*zip(*starts, strict=True), mean, np.sqrt(variance), level, spread)
        return cls(np.stack(columns, 1, dtype=np.float64))

    def fits(self, places: Sequence[Place]) -> bool:
        """Whether these are the places of the tiles of an image."""
        return {(rows.start, columns.start) for rows, columns in places} == self._rows.keys()

    def standardise(
        self, place: Place, score: np.ndarray, anomaly_map: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the score and the map of a tile in standard deviations of its place."""
        row = self.table[self._rows[place[0].start, place[1].start]]
        _, _, mean, std, level, spread = row.astype(np.float32)
        return (score - mean) / std, (anomaly_map - level) / spread


class Blender:
    """Anomaly map of an image, float32 [H, W], blended from the maps of its tiles.

    Each pixel is a weighted mean over the tiles that contain it. Weights decrease towards the
    borders of a tile and sum to one per pixel. Only the image's map and one tile's are in memory.

    Args:
        size: (H, W).
        where: all tiles, see `places`.
    """

    def __init__(self, size: tuple[int, int], where: Sequence[Place]):
        self._map = np.zeros(size, np.float32)
        # Tiles form a grid, so the weight of a pixel is a product of row weight and column weight.
        self._weights = [_weights(size[i], [place[i] for place in where]) for i in (0, 1)]

    def add(self, tile_map: np.ndarray, place: Place) -> None:
        """Adds the map [h, w] of the tile at `place`. Each tile must be added once."""
        if tile_map.shape == self._map.shape:  # the only tile
            self._map = tile_map.astype(np.float32, copy=False)
            return
        rows, columns = (w[p.start] for w, p in zip(self._weights, place, strict=True))
        self._map[place] += tile_map * rows[:, None] * columns

    def result(self) -> np.ndarray:
        """Returns the map, float32 [H, W], after all tiles are added."""
        return self._map


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    if tile >= length:
        return [0]
    step = max(1, int(tile * (1 - overlap)))
    steps = -(-(length - tile) // step)
    return np.round(np.linspace(0, length - tile, steps + 1)).astype(int).tolist()


def _weights(length: int, spans: Sequence[slice]) -> dict[int, np.ndarray]:
    """Weights, float32, of the pixels of the tiles along one axis, by start of the tile."""
    windows = {span.start: _window(span.stop - span.start) for span in spans}
    total = np.zeros(length)
    for start, window in windows.items():
        total[start : start + len(window)] += window
    return {
        start: (window / total[start : start + len(window)]).astype(np.float32)
        for start, window in windows.items()
    }


def _window(length: int) -> np.ndarray:
    """Triangular window, positive everywhere."""
    return np.minimum(np.arange(length) + 1, np.arange(length)[::-1] + 1) / length
