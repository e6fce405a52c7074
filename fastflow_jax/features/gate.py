"""The product that an image shows, found by image-level features."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy

from fastflow_jax.errors import InputError
from fastflow_jax.features.shift import Reference, chosen

# An image shows none of the products if it is nearly as far from the nearest one as from the next,
# and further from it than its training images are from each other. On five data sets, the ratio of
# the two distances is at most .75 for test images, and at least .78 for images of a set left out.
_RATIO, _FURTHER = 0.75, 1.5
_FEWEST = 10  # images of a group
_DISTINCT = 1.4  # smallest ratio of distances between and within groups


class Recognised(NamedTuple):
    """Products of images."""

    product: np.ndarray  # int [B], the nearest product
    is_known: np.ndarray  # bool [B], False if an image shows none of the products


@dataclasses.dataclass(frozen=True, eq=False)
class Gate:
    """Finds the nearest of several products.

    An image is represented by `extract.image_means`, divided by their standard deviation within the
    products. It shows the product of the nearest training image.
    """

    rows: tuple[np.ndarray, ...]  # float32 [N, C] per product, scaled
    scale: np.ndarray  # float32 [C]
    spread: np.ndarray  # float32 [P], largest distance of a row to the nearest other row

    @classmethod
    def fit(cls, references: Sequence[Reference]) -> "Gate":
        """Makes the gate of several products from references of their training images.

        Raises:
          InputError: there are fewer than two products.
        """
        if len(references) < 2:
            raise InputError("There is one product only. Pass images of at least two products.")
        return cls.of_means([r.rows.astype(np.float32) * r.scale + r.center for r in references])

    @classmethod
    def of_means(cls, raw: Sequence[np.ndarray]) -> "Gate":
        """Makes the gate from `image_means` [N, C] of each product."""
        within = np.concatenate([rows - rows.mean(0) for rows in raw])
        scale = within.std(0)
        scale[scale == 0] = 1
        rows = tuple(each / scale for each in raw)
        return cls(rows, scale, np.array([_spread(each) for each in rows], np.float32))

    def __call__(self, means: np.ndarray) -> Recognised:
        """Recognises the products of images with these `image_means` [B, C]."""
        x = means / self.scale
        nearest = [scipy.spatial.distance.cdist(x, rows).min(1) for rows in self.rows]
        distances = np.stack(nearest, 1)  # [B, P]
        product = distances.argmin(1)
        nearest, second = np.sort(distances, 1)[:, :2].T
        is_unlike = (nearest > _RATIO * second) & (nearest > _FURTHER * self.spread[product])
        return Recognised(product, ~is_unlike)


def _spread(rows: np.ndarray) -> float:
    """Largest distance of a row [N, C] to the nearest other row; infinite for a single row."""
    distances = scipy.spatial.distance.cdist(rows, rows)
    np.fill_diagonal(distances, np.inf)
    return float(distances.min(1).max())


def find_products(means: np.ndarray) -> np.ndarray:
    """Groups images that seem to show the same product.

    Single linkage joins the nearest images and groups first. Products are the groups of at least
    ten images whose number stays the same over the longest range of distances, in their ratio.
    Groups of any size and shape are found, also if k-means would join the small ones.

    Args:
      means: `image_means` of training images, [N, C].

    Returns:
      int [N], the group of each image, from 0 on in the order of the first images. All images are
      in one group if no two products are distinct. An image outside the groups is in that of the
      nearest grouped image.
    """
    scale = means.std(0)
    scale[scale == 0] = 1
    x = (means - means.mean(0)) / scale
    used = np.flatnonzero(chosen(len(x)))
    labels = np.full(len(x), -1)
    labels[used] = _distinct(x[used])
    grouped = labels >= 0
    if not grouped.any():
        return np.zeros(len(x), int)
    nearest = scipy.spatial.distance.cdist(x[~grouped], x[grouped]).argmin(1)
    labels[~grouped] = labels[grouped][nearest]
    _, first, group = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[group]


def _distinct(x: np.ndarray) -> np.ndarray:
    """Groups of x [N, C], int [N]; -1 outside the groups, and if there are no two groups."""
    outside = np.full(len(x), -1)
    if len(x) < 2 * _FEWEST:
        return outside
    tree = scipy.cluster.hierarchy.linkage(x, "single")
    n_groups, sizes = 0, [1] * len(x)
    best, cut, start = _DISTINCT, None, 0.0  # start: where the number of groups last changed
    for one, other, distance, size in tree:
        is_group = [int(n >= _FEWEST) for n in (size, sizes[int(one)], sizes[int(other)])]
        sizes.append(int(size))
        change = is_group[0] - is_group[1] - is_group[2]
        if change and n_groups >= 2 and distance > best * start:
            best, cut = distance / start, np.sqrt(distance * start)
        n_groups, start = n_groups + change, distance if change else start
    if cut is None:
        return outside
    labels = scipy.cluster.hierarchy.fcluster(tree, cut, "distance")
    found, counts = np.unique(labels, return_counts=True)
    return np.where(np.isin(labels, found[counts >= _FEWEST]), labels, -1)
