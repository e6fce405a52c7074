"""Siblings: held-out images that show the same part as training images.

Copies, bursts, video frames and several exposures of one part are not independent. A held-out image
with siblings among the training images scores lower than an image of a new part, so that thresholds
are too low.
"""

import dataclasses

import numpy as np
import scipy

from fastflow_jax.features.extract import Features, image_means

# Median distance of the nearest neighbour, relative to that of the tenth nearest and to the median
# distance of all pairs. Measured on five data sets with 40 or more images: at least .49 and .31 for
# images of different parts; at most .51 (mostly below .4) and .15 to .4 for four images per part.
_OF_TENTH, _OF_MEDIAN = 0.5, 0.25
_NEIGHBOUR = 10
_MIN_TRAINING = 24  # training images
_MIN_QUERIES = 8  # images whose neighbours are searched
_MAX_QUERIES = 500
_MAX_OTHERS = 2000  # training images of the median distance
_BLOCK = 32  # images that are compared with all others at a time
_SAME = 1e-3  # distance of equal images, which differ by rounding, relative to the median distance


@dataclasses.dataclass(frozen=True)
class Siblings:
    """Evidence of siblings, with the closest pair as an example."""

    kind: str  # description for a message
    held_out: int  # row of the held-out image
    trained_on: int  # row of the training image


def nearest_rows(images: Features, others: Features) -> np.ndarray:
    """Row of the nearest one of the other images by the means of channels, int [B].

    Args:
      images: features [B, h, w, C] per scale.
      others: features of the other images, [N, h, w, C] per scale.
    """
    return _neighbours(image_means(images), image_means(others))[1]


def find(trained_on: Features, held_out: Features, *, same_source: bool) -> Siblings | None:
    """Finds siblings by comparing the distances of nearest neighbours with those of other images.

    Each image is represented by the mean of each channel over its locations, standardised over the
    training images. Distances are Euclidean.

    Args:
      trained_on: features of the training images, [N, h, w, C] per scale.
      held_out: features of the held-out images, [M, h, w, C] per scale.
      same_source: True if held-out images were drawn from the training images, so that siblings
        among the training images count too. False if they were chosen to show other parts.

    Returns:
      None if images seem independent, or if there are too few.
    """
    train, held = image_means(trained_on), image_means(held_out)[:_MAX_QUERIES]
    center, scale = train.mean(0), train.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    for means in (train, held):
        means -= center
        means /= scale
    others = train[_spread(len(train), _MAX_OTHERS)]
    median = np.median(scipy.spatial.distance.cdist(held, others))
    if len(train) < 2 or median == 0:
        return None
    distances, rows = _neighbours(held, train)
    closest = int(distances[:, 0].argmin())
    pair = closest, int(rows[closest])
    if copies := int((distances[:, 0] < _SAME * median).sum()):
        return Siblings(f"{copies} of the held-out images are equal to training images", *pair)
    if same_source:
        own = _spread(len(train), _MAX_QUERIES)
        distances = np.concatenate([distances, _neighbours(train[own], train, own)[0]])
    if len(train) < _MIN_TRAINING or len(distances) < _MIN_QUERIES:
        return None
    nearest, tenth = distances.T
    if np.median(nearest / tenth) >= _OF_TENTH and np.median(nearest) / median >= _OF_MEDIAN:
        return None
    return Siblings("many images are much closer to another one than to the rest", *pair)


def _neighbours(
    images: np.ndarray, others: np.ndarray, own: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the nearest and the tenth nearest other image, [M, 2]; rows of the nearest, [M].

    Args:
      images: means of channels, [M, C].
      others: those of the other images, [N, C].
      own: rows of the images among the others, int [M], if they are; they are not compared then.
    """
    distances, rows = [], []
    for i in range(0, len(images), _BLOCK):
        found = scipy.spatial.distance.cdist(images[i : i + _BLOCK], others)
        if own is not None:
            found[np.arange(len(found)), own[i : i + _BLOCK]] = np.inf
        rows.append(found.argmin(1))
        ends = [0, min(_NEIGHBOUR, len(others)) - 1]
        distances.append(np.partition(found, ends, axis=1)[:, ends])
    return np.concatenate(distances), np.concatenate(rows)


def _spread(n: int, most: int) -> np.ndarray:
    """At most `most` of n rows, evenly spaced."""
    return np.linspace(0, n - 1, min(n, most)).astype(int)
