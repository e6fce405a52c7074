"""Siblings: held-out images that show the same part as images that are trained on.

Copies, bursts, video frames and several exposures of one part are not independent: a held-out image
whose siblings are trained on scores lower than one of a new part, and thresholds come out too low.
"""

import dataclasses

import numpy as np

from fastflow_jax.features.extract import Features

# Of 40 or more images of different parts, on the five sets that this was tried on, the nearest
# image is typically at .49 of the distance of the tenth nearest or more, and at .31 of the median
# distance or more; of images among which each part comes four times, at most at .51, mostly below
# .4, and at .15 to .4.
_OF_TENTH, _OF_MEDIAN = 0.5, 0.25
_NEIGHBOUR = 10
_FEWEST = 24  # training images
_FEWEST_ROWS = 8  # images whose neighbours are looked at
_SAME = 1e-3  # of the median distance: the same image, but for rounding
_AT_MOST = 500  # images whose neighbours are looked at


@dataclasses.dataclass(frozen=True)
class Siblings:
    """What was found, with the closest pair for an example."""

    kind: str  # what a message says of it
    held_out: int  # row of the held-out image
    trained_on: int  # row of the training image


def find(trained_on: Features, held_out: Features, *, same_source: bool) -> Siblings | None:
    """Compares the distances of nearest neighbours with those of other images.

    Images are represented by the mean of each channel, in units of its deviation over the training
    images; distances are Euclidean.

    Args:
      trained_on: features of the training images, [N, h, w, C] a scale.
      held_out: features of the held-out images, likewise.
      same_source: held-out images were drawn from the training images, so that siblings among these
        are as telling; False if they were chosen to show other parts.

    Returns:
      None if images look independent, or if they are too few to tell.
    """
    train, held = _means(trained_on), _means(held_out)[:_AT_MOST]
    center, scale = train.mean(0), train.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    train, held = (train - center) / scale, (held - center) / scale
    distances = _distances(held, train)
    median = np.median(distances)
    if len(train) < 2 or median == 0:
        return None
    nearest = distances.min(1)
    closest = int(nearest.argmin())
    pair = closest, int(distances[closest].argmin())
    if copies := int((nearest < _SAME * median).sum()):
        return Siblings(f"{copies} of the held-out images are equal to training images", *pair)
    if same_source:
        rows = np.linspace(0, len(train) - 1, min(len(train), _AT_MOST)).astype(int)
        among = _distances(train[rows], train)
        among[np.arange(len(rows)), rows] = np.inf
        distances = np.concatenate([distances, among])
    if len(train) < _FEWEST or len(distances) < _FEWEST_ROWS:
        return None
    sorted_ = np.partition(distances, (0, _NEIGHBOUR - 1), axis=1)
    of_tenth = np.median(sorted_[:, 0] / sorted_[:, _NEIGHBOUR - 1])
    if of_tenth >= _OF_TENTH and np.median(sorted_[:, 0]) / median >= _OF_MEDIAN:
        return None
    return Siblings("many images are much closer to another one than to the rest", *pair)


def _distances(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    squares = (some**2).sum(1)[:, None] + (others**2).sum(1) - 2 * some @ others.T
    return np.sqrt(squares.clip(0))


def _means(features: Features) -> np.ndarray:
    """The mean of each channel of all scales, float64 [N, C]."""
    step = 32  # images in memory in float32
    return np.concatenate(
        [
            np.concatenate(
                [
                    np.asarray(m[i : i + step], np.float32).mean((1, 2), dtype=np.float64)
                    for i in range(0, len(m), step)
                ]
            )
            for m in features
        ],
        axis=1,
    )
