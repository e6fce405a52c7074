"""Split of normal images into those to train on and those held out."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from fastflow_jax import data
from fastflow_jax.data import roi
from fastflow_jax.data.changes import with_copies
from fastflow_jax.data.groups import labels_of
from fastflow_jax.data.tiles import Tiles
from fastflow_jax.data.tiling import Tiling
from fastflow_jax.errors import InputError


def split_holdout(
    n: int, part: float, groups: Sequence[str] | np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Splits images into those to train on and those to hold out.

    The file order is divided into equal stretches, because images may drift from the first file to
    the last. One image of each is held out at random, because cameras may take turns. The split is
    the same for all seeds, and holds out at least one image unless `part` is 0 or `n` below 2.

    Args:
      n: number of images.
      part: fraction of images to hold out; 0 holds out none.
      groups: label of each image. Images with equal labels are on the same side. `part` is then a
        fraction of the groups, which are ordered by their first images.

    Returns:
      Indices to train on and indices held out, int [N] and [M].

    Raises:
      InputError: there is only one group.
    """
    if groups is not None:
        _, first, group = np.unique(groups, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))[group]  # position of each image's group
        if part > 0 and len(first) < 2:
            raise InputError(
                "All training images belong to one group, so none can be held out. Check "
                "data.groups, put images of other parts into calibration/good, or pass "
                "--config.data.holdout=0."
            )
        held = np.isin(rank, split_holdout(len(first), part)[1])
        return np.flatnonzero(~held), np.flatnonzero(held)
    if part == 0 or n < 2:
        return np.arange(n), np.arange(0)
    edges = np.linspace(0, n, min(max(round(part * n), 1), n - 1) + 1).round().astype(int)
    held = np.random.default_rng(0).integers(edges[:-1], edges[1:])
    return np.delete(np.arange(n), held), held


@dataclasses.dataclass(frozen=True)
class Split:
    """Normal images to train on, and those held out for calibration and thresholds."""

    source: data.Source  # of the images to train on
    train: np.ndarray  # int [N], rows of `source`
    held_out_source: data.Source  # `source`, or the images given for calibration
    held_out: np.ndarray  # int [M], rows of `held_out_source`
    held_out_groups: np.ndarray | None  # int [M], see `HeldOut.groups`
    # int [N], equal for training images of the same part; None if parts are unknown, or if images
    # were given for calibration.
    groups: np.ndarray | None
    defects: data.Source | None = None  # images with labelled defects
    held_out_tiles: Tiles | None = None  # rows of `held_out_source`, if they are tiles
    image: np.ndarray | None = None  # int [N], of each training tile: index of its image
    masks: Callable[[], list[str]] = list  # of the region of interest, see `roi.identity`

    @property
    def contents(self) -> list[str]:
        """`data.Source.contents` of the images to train on, for calibration, and with defects.

        Held-out training images are not included; masks of the region of interest are.
        """
        contents = [self.source.contents[i] for i in self.train]
        if self.held_out_source is not self.source:
            contents += [f"calibration: {content}" for content in self.held_out_source.contents]
        if self.defects is not None:
            contents += [f"defect: {content}" for content in self.defects.contents]
        return contents + self.masks()

    def with_copies(self, augment: ConfigDict) -> "Split":
        """The split with all copies of the training images, and one of each held-out image.

        A single copy of a held-out image keeps the held-out scores independent. The copies of a
        training image show the same part. See `changes.with_copies`; the unchanged training images
        come first.
        """
        source = held_out_source = with_copies(self.source, augment)
        if self.held_out_source is not self.source:
            held_out_source = with_copies(self.held_out_source, augment)
        times = augment.copies + 1
        groups = np.arange(len(self.train)) if self.groups is None else self.groups
        return Split(
            source=source,
            train=np.concatenate([self.train + k * len(self.source) for k in range(times)]),
            held_out_source=held_out_source,
            held_out=self.held_out + len(self.held_out_source),
            held_out_groups=self.held_out_groups,
            groups=np.tile(groups, times),
        )

    def tiled(self, config) -> "Split":
        """The split with tiles of the images, see `config.data.tile`.

        Tiles to train on do not overlap more than they must. If there are more than
        `config.data.train_tiles`, a random one of each of as many equal stretches is used.
        """
        tiling = Tiling.of(config.data)
        assert tiling is not None
        how = tiling, config.image_size, config.data.resize
        tiles = Tiles.of(self.source.subset(self.train), *how, overlap=0.0)
        held_out = Tiles.of(self.held_out_source.subset(self.held_out), *how)
        n, most = len(tiles.image), config.data.train_tiles
        edges = np.linspace(0, n, min(n, most) + 1).round().astype(int)
        train = np.random.default_rng(0).integers(edges[:-1], edges[1:])
        groups = np.arange(len(self.train)) if self.groups is None else self.groups
        return Split(
            source=tiles.source,
            train=train,
            held_out_source=held_out.source,
            held_out=np.arange(len(held_out.image)),
            held_out_groups=self.held_out_groups,
            groups=groups[tiles.image[train]],
            held_out_tiles=held_out,
            image=tiles.image[train],
        )


def split(config, dataset: data.Dataset) -> Split:
    """Splits normal images; all images given for calibration, if any, are held out.

    Raises:
      InputError: see `split_holdout` and `data.groups.labels_of`.
    """
    source, held_out_source = dataset.train, dataset.calibration or dataset.train
    groups = held_out_source.groups or labels_of(held_out_source.names, config.data.groups)
    if dataset.calibration is not None:
        train, held_out = np.arange(len(source)), np.arange(len(held_out_source))
    else:
        train, held_out = split_holdout(len(source), config.data.holdout, groups)

    def labels(rows: np.ndarray) -> np.ndarray | None:
        if groups is None:
            return None
        return np.unique(np.asarray(groups)[rows], return_inverse=True)[1]

    of_train = labels(train) if held_out_source is source else None
    return Split(
        source,
        train,
        held_out_source,
        held_out,
        labels(held_out),
        of_train,
        dataset.defects,
        masks=functools.partial(roi.identity, config.data),
    )
