"""Tiles of the images of a source, as a source, and whole images from the results of tiles."""

import collections
import concurrent.futures
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fastflow_jax.data.dataset import Regions, Source
from fastflow_jax.data.inputs import at_own_size, places
from fastflow_jax.data.pipeline import n_threads
from fastflow_jax.data.tiling import OVERLAP, Blender, Place, Places, Tiling
from fastflow_jax.data.transforms import placement, resize, resize_mask
from fastflow_jax.errors import InputError


class Whole(NamedTuple):
    """Score and anomaly map of an image, from those of its tiles."""

    index: int  # of the image in its source
    score: float  # the highest score of a tile
    anomaly_map: np.ndarray  # float32 [H, W], of the size of the image


@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles of N images, in the order of the images.

    Attributes:
      images: source of the images, at the resolution of the tiles, see `resized`.
      sizes: (height, width) of each image.
      places: the tiles of each image.
      image_size: (height, width) of model inputs.
      resize_by: how tiles become model inputs, see `transforms.placement`.
    """

    images: Source
    sizes: tuple[tuple[int, int], ...]
    places: tuple[tuple[Place, ...], ...]
    image_size: tuple[int, int]
    resize_by: str

    @classmethod
    def of(
        cls,
        images: Source,
        tiling: Tiling,
        image_size: tuple[int, int],
        resize_by: str,
        overlap: float = OVERLAP,
    ) -> "Tiles":
        """Cuts the images of a source, without decoding those that have headers.

        Args:
          images: the images, at the resolution of the tiles.
          tiling: how they are cut.
          image_size: (height, width) of model inputs.
          resize_by: how tiles become model inputs, see `transforms.placement`.
          overlap: smallest fraction of a tile shared with the next one.
        """
        sizes = tuple(tiling.size(_size(images, i)) for i in range(len(images)))
        where = (tuple(places(size, tiling, resize_by, overlap)) for size in sizes)
        return cls(images, sizes, tuple(where), image_size, resize_by)

    @functools.cached_property
    def image(self) -> np.ndarray:
        """Index of the image of each tile, int [T]."""
        return np.repeat(np.arange(len(self.places)), [len(each) for each in self.places])

    @functools.cached_property
    def canvas(self) -> tuple[int, int]:
        """(height, width) of the smallest rectangle that holds any of the images."""
        heights, widths = zip(*self.sizes, strict=True)
        return max(heights), max(widths)

    @functools.cached_property
    def source(self) -> Source:
        """The tiles as examples without masks, `<image>, <top>-<bottom> x <left>-<right>`."""
        images, where = self.images, [place for each in self.places for place in each]
        load = _keeping_last(lambda index: images.load(index)[0], n_threads() + 1)

        def load_tile(index: int) -> tuple[np.ndarray, None]:
            image = load(int(self.image[index]))
            self._check_size(int(self.image[index]), image)
            return image[where[index]], None

        def of(values: Sequence | None) -> tuple | None:
            return None if values is None else tuple(values[i] for i in self.image)

        names = (
            f"{images.names[i]}, {rows.start}-{rows.stop} x {columns.start}-{columns.stop}"
            for i, (rows, columns) in zip(self.image, where, strict=True)
        )
        return Source(
            names=tuple(names),
            defects=tuple(images.defects[i] for i in self.image),
            load=load_tile,
            files=of(images.files),
            groups=of(images.groups),
        )

    def rows(self, indices: Iterable[int]) -> np.ndarray:
        """Rows of the tiles of images, int [M], image by image."""
        ends = np.cumsum([len(each) for each in self.places])
        spans = [np.arange(ends[i] - len(self.places[i]), ends[i]) for i in indices]
        return np.concatenate([np.arange(0), *spans])

    def whole(
        self,
        rows: Iterable[int],
        scored: Iterable[tuple[np.ndarray, np.ndarray]],
        statistics: Places | None = None,
    ) -> Iterator[Whole]:
        """Yields the images whose tiles are scored, as soon as they are complete.

        Args:
          rows: of the tiles, all tiles of an image after each other.
          scored: scores [B] and anomaly maps [B, H, W] of these tiles, in batches.
          statistics: of the places of tiles, by which scores and maps are standardised; None: they
            are as they are.
        """
        tiles = ((s, m) for scores, maps in scored for s, m in zip(scores, maps, strict=True))
        first, image, highest, blender = 0, -1, -np.inf, None
        for row, (score, anomaly_map) in zip(rows, tiles, strict=True):
            if blender is None:
                image, highest = int(self.image[row]), -np.inf
                first = int(np.searchsorted(self.image, image))
                blender = Blender(self.sizes[image], self.places[image])
            place = self.places[image][row - first]
            if statistics is not None:
                score, anomaly_map = statistics.standardise(place, score, anomaly_map)
            side = place[0].stop - place[0].start, place[1].stop - place[1].start
            placed = placement(side, self.image_size, self.resize_by)
            blender.add(at_own_size(anomaly_map, placed, place), place)
            highest = np.maximum(highest, score)  # NaN stays
            if row - first == len(self.places[image]) - 1:
                yield Whole(image, float(highest), blender.result())
                blender = None

    def statistics(
        self, rows: np.ndarray, scored: Iterable[tuple[np.ndarray, np.ndarray]]
    ) -> Places:
        """Statistics of the places of the tiles of normal images of one size.

        Args:
          rows: as in `whole`.
          scored: as in `whole`.
        """
        found = [
            (scores, np.stack([maps.mean((1, 2)), np.square(maps).mean((1, 2))], -1))
            for scores, maps in scored
        ]
        scores, moments = (
            np.concatenate(each).astype(np.float64) for each in zip(*found, strict=True)
        )
        n = len(np.unique(self.image[rows]))
        return Places.fit(self.places[0], scores.reshape(n, -1), moments.reshape(n, -1, 2))

    def on_canvas(self, index: int, array: np.ndarray) -> np.ndarray:
        """Pads an array of the size of an image, [..., H, W], with 0 to the size of `canvas`."""
        height, width = self.sizes[index]
        ends = self.canvas[0] - height, self.canvas[1] - width
        return np.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, ends[0]), (0, ends[1])])

    def _check_size(self, index: int, image: np.ndarray) -> None:
        """Raises InputError if an image has another size than its header states."""
        (height, width), (known, wide) = image.shape[:2], self.sizes[index]
        if (height, width) != (known, wide):
            raise InputError(
                f"{self.images.names[index]} has {width} x {height} pixels, but {wide} x {known} "
                "when it was first read. Do not change images during a run."
            )


def image_means_of(of_tiles: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Means of vectors of tiles, [T, C], over the tiles of each image, [N, C].

    Args:
      of_tiles: a vector of each tile.
      image: index of the image of each tile, int [T]; images without tiles are left out.
    """
    _, image, counts = np.unique(image, return_inverse=True, return_counts=True)
    total = np.zeros((len(counts), of_tiles.shape[1]))
    np.add.at(total, image, of_tiles)
    return total / counts[:, None]


def resized(source: Source, resolution: int | None, mask_resize: str) -> Source:
    """Returns `source` with images and masks resized to a longer side; None: unchanged.

    Headers remain those of the files.
    """
    if resolution is None:
        return source
    size_of = Tiling((1, 1), resolution).size

    def load(index: int) -> tuple[np.ndarray, np.ndarray | None]:
        image, mask = source.load(index)
        size = size_of((image.shape[0], image.shape[1]))
        return resize(image, size), None if mask is None else resize_mask(mask, size, mask_resize)

    def regions(index: int) -> Regions:
        assert source.regions is not None
        masks, saturation = source.regions(index)
        size = size_of((masks.shape[1], masks.shape[2]))
        smaller = [resize_mask(mask, size, mask_resize) for mask in masks]
        found = np.array(smaller, bool).reshape(-1, *size)
        remain = found.any((1, 2))
        return Regions(found[remain], saturation[remain])

    return dataclasses.replace(
        source,
        load=load,
        part_of=None,
        regions=source.regions and regions,
    )


def _size(source: Source, index: int) -> tuple[int, int]:
    """(height, width) of an image, of its file if that has a header."""
    if source.header is not None:
        return source.header(index).size
    image = source.load(index)[0]
    return image.shape[0], image.shape[1]


def _keeping_last(load: Callable[[int], np.ndarray], n: int) -> Callable[[int], np.ndarray]:
    """Returns `load` for several threads; it is called once for each of the last n indices."""
    lock, held = threading.Lock(), collections.OrderedDict()

    def get(index: int) -> np.ndarray:
        with lock:
            future, is_new = held.get(index), index not in held
            if future is None:
                future = held[index] = concurrent.futures.Future()
                while len(held) > n:
                    held.popitem(last=False)
        if is_new:
            try:
                future.set_result(load(index))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    return get
