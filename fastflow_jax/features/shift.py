"""Shift: images that differ as a whole from the training images.

After a change of camera, lighting or position, all new images score high, as defective images do. A
two-sample test on image-level features distinguishes the two cases without labels.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np
import scipy

from fastflow_jax.data.groups import labels_of
from fastflow_jax.errors import InputError
from fastflow_jax.features.split import split_holdout
from fastflow_jax.files import read_arrays, write_arrays
from fastflow_jax.state import Slot, State, check

_NORMAL = 0.25  # smallest share of new parts that are assumed to be normal
_LEVEL = 0.01  # largest p-value of a shift
_MAX_IMAGES = 2000  # training images used
_QUANTILES = (np.arange(1000) + 0.5) / 1000


@dataclasses.dataclass(frozen=True)
class Shift:
    """Result of the test, JSON-able by `dataclasses.asdict`."""

    of: str  # what is counted: "images", or "parts" if `config.data.groups` names them
    tested: int  # number of them
    further: int  # of them, further from the training images than half of the normal ones are
    p_value: float  # if a quarter of them are like the training images
    message: str | None  # a warning if the p-value is at most 1 %


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Image-level features of training images, which other images are compared with.

    An image is represented by `extract.image_means`, standardised. Its distance is that to the
    nearest row, relative to the median distance of other normal images.
    """

    rows: np.ndarray  # float16 [N, C], standardised
    center: np.ndarray  # float32 [C], mean before standardisation
    scale: np.ndarray  # float32 [C], standard deviation before standardisation
    median: float  # distance of the other normal images to the rows, above 0
    n_parts: int  # number of parts that the median is taken over

    @classmethod
    def fit(
        cls,
        train: np.ndarray,
        held_out: np.ndarray | None = None,
        *,
        groups: np.ndarray | None = None,
        held_out_groups: np.ndarray | None = None,
        held_out_only: bool = False,
    ) -> "Reference | None":
        """Returns the reference, or None if there are too few images or all are equal.

        The rows are those of half of the training parts. The median is taken over the other half
        and the held-out parts, so that it is exchangeable with the distances of new normal parts.

        Args:
          train: `image_means` of training images, [N, C].
          held_out: `image_means` of held-out images, [M, C], or None.
          groups: int [N], equal for images of the same part; None if each shows another part.
          held_out_groups: the same for held-out images, int [M].
          held_out_only: take all training parts as rows, and the median over held-out parts. For
            training images that are not like new normal images, or that show the same parts.
        """
        spare = np.zeros((0, train.shape[1]))
        if not held_out_only:
            if len(train if groups is None else np.unique(groups)) < 2:
                return None
            kept, other = split_holdout(len(train), 0.5, groups)
            first = _first_of_parts(len(other), None if groups is None else groups[other])
            spare = train[other][first]
            train = train[kept]
        if held_out is not None:
            first = _first_of_parts(len(held_out), held_out_groups)
            spare = np.concatenate([spare, held_out[first]])
        if not len(spare):
            return None
        center, scale = train.mean(0).astype(np.float32), train.std(0).astype(np.float32)
        scale[scale == 0] = 1
        rows = ((train - center) / scale).astype(np.float16)
        reference = cls(rows, center, scale, 1.0, len(spare))
        median = float(np.sort(reference.distances(spare))[len(spare) // 2])
        return dataclasses.replace(reference, median=median) if median > 0 else None

    def distances(self, means: np.ndarray) -> np.ndarray:
        """Distances of images with these `image_means` [B, C], float64 [B]; 1 is typical."""
        rows = (means - self.center) / self.scale
        return scipy.spatial.distance.cdist(rows, self.rows).min(1) / self.median

    def extended(
        self, means: np.ndarray, groups: np.ndarray | None = None, *, as_kind: bool
    ) -> "Reference":
        """Returns the reference with the rows of new normal images.

        Args:
          means: `image_means` of the images, [N, C].
          groups: int [N], equal for images of the same part; None if each shows another part.
          as_kind: whether other images of their kind must not look shifted either. The median is
            then that of the images to the rows of other parts, if it is larger.
        """
        rows = ((means - self.center) / self.scale).astype(np.float16)
        grown = dataclasses.replace(self, rows=np.concatenate([self.rows, rows]))
        first = _first_of_parts(len(means), groups)
        if not as_kind or len(first) < 2:
            return grown
        to_others = scipy.spatial.distance.cdist(rows[first], rows)
        own = np.arange(len(means)) if groups is None else groups
        to_others[own[first][:, None] == own] = np.inf
        to_training = scipy.spatial.distance.cdist(rows[first], self.rows)
        nearest = np.minimum(to_others.min(1), to_training.min(1))
        median = float(np.sort(nearest)[len(first) // 2])
        if median <= self.median:
            return grown
        return dataclasses.replace(grown, median=median, n_parts=len(first))

    def state_dict(self) -> dict[str, np.ndarray]:
        """The fields by name, for `from_state`."""
        return {name: np.asarray(value) for name, value in vars(self).items()}

    @classmethod
    def from_state(cls, state: State) -> "Reference":
        """The inverse of `state_dict`; raises InputError if it has other arrays."""
        channels = state["center"].size if "center" in state else None
        slots = {name: Slot((channels,)) for name in ("center", "scale")}
        slots |= {
            "rows": Slot((None, channels)),
            "median": Slot(()),
            "n_parts": Slot((), np.integer),
        }
        check(state, slots)
        arrays = dict(state)
        median, n_parts = float(arrays.pop("median")), int(arrays.pop("n_parts"))
        return cls(**arrays, median=median, n_parts=n_parts)

    def save(self, file: pathlib.Path) -> None:
        """Writes an .npz file for `load`."""
        write_arrays(file, self.state_dict())

    @classmethod
    def load(cls, file: pathlib.Path) -> "Reference":
        """Reads a file of `save`; raises InputError if it is damaged."""
        return cls.from_state(read_arrays(file))


def chosen(n: int) -> np.ndarray:
    """Which of n training images are used: bool [n], 2,000 evenly spaced ones if there are more."""
    return np.isin(np.arange(n), np.linspace(0, n - 1, min(n, _MAX_IMAGES)).astype(int))


def find(
    reference: Reference, distances: Mapping[str, float], groups: str | None = None
) -> Shift | None:
    """Tests whether new images look like the training images.

    Images of a part are not independent, so each part is represented by its first image.

    Of n normal parts, r = n // 2 + 1 are at most as far as the median. A new normal part is so with
    a probability that is distributed as Beta(r, n + 1 - r). If at least a quarter of the new parts
    are normal, the number of parts that are so is at least binomial with a quarter of that
    probability. The p-value is the binomial one, averaged over the Beta distribution.

    Args:
      reference: of the training images.
      distances: `Reference.distances` by the name of the image.
      groups: `config.data.groups`, the rule that names the part of an image; None if each image
        shows another part.

    Returns:
      None if there are too few parts to find a shift, or if the rule does not fit the names.
    """
    names = sorted(distances)
    if _p_value(reference, len(names), 0) > _LEVEL:
        return None
    try:
        labels = labels_of(names, groups)
    except InputError:
        return None
    first = _first_of_parts(len(names), labels)
    tested, further = len(first), sum(distances[names[i]] > 1 for i in first)
    if _p_value(reference, tested, 0) > _LEVEL:
        return None
    of = "images" if labels is None else "parts"
    p_value = _p_value(reference, tested, tested - further)
    message = None
    if p_value <= _LEVEL:
        message = (
            f"The new images look shifted as a whole: {further} of {tested} {of} are further from "
            f"the training images than half of the normal {of} are. Unless more than three "
            "quarters of them are defective, check camera, lighting and position, or train on "
            "images like these."
        )
    return Shift(of, tested, further, p_value, message)


def _p_value(reference: Reference, tested: int, near: int) -> float:
    """Probability of at most `near` parts that are as near as half of the normal ones."""
    r = reference.n_parts // 2 + 1
    probability = scipy.special.betaincinv(r, reference.n_parts + 1 - r, _QUANTILES)
    return float(scipy.special.bdtr(near, tested, _NORMAL * probability).mean())


def _first_of_parts(n: int, groups) -> np.ndarray:
    """Rows of the first image of each part, int [parts], for n images."""
    return np.arange(n) if groups is None else np.unique(groups, return_index=True)[1]
