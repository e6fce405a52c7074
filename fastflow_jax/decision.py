"""Decisions on image scores and anomaly maps: p-values, labels and masks.

The functions take arrays of numpy or of JAX, so that predictions and exported functions share them.
This module imports numpy only.
"""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Decision level: scores **above** `value` are anomalous."""

    value: float  # in the unit of the scores or maps that it is for
    kind: str = "given"  # "image" or "pixel": from a false-alarm rate; "f1"; or "given"
    rate: float | None = None  # requested false-alarm rate
    interval: tuple[float, float] | None = None  # confidence interval of the true rate
    confidence: float | None = None  # of the interval
    n: int = 0  # number of images behind it; of groups, if images are grouped
    supported: bool = True  # False if n is too small for the rate

    @property
    def promise(self) -> str | None:
        """The rate and its interval in words; None without a rate."""
        if self.rate is None or self.interval is None:
            return None
        low, high = self.interval
        wanted = "" if self.supported else " (wanted, but too low for so few images)"
        return (
            f"false-alarm rate {self.rate:.1%}{wanted}, true rate between {low:.1%} and {high:.1%} "
            f"({100 * (self.confidence or 0):.0f} %)"
        )


def p_values(
    scores: Any,
    held_out: ArrayLike,
    groups: ArrayLike | None = None,
    kinds: ArrayLike | None = None,
) -> Any:
    """Computes (1 + #{held-out scores >= s}) / (n + 1) for each score s.

    For a new normal image, P(p <= a) <= a for every a, for any distribution of scores.

    With groups, n is the number of groups, and the count is the sum over groups of the share of
    their images with a score of at least s. The statement then holds for a new image of a new
    group if groups are exchangeable, whatever the dependence in a group (Lee, Barber & Willett,
    Distribution-Free Inference with Hierarchical Data, 2023).

    With kinds, the p-value is the highest of those of each kind, so that the statement holds for
    new images of every kind.

    Args:
      scores: number or array of any shape.
      held_out: scores of held-out images [n].
      groups: [n], equal for images of the same part, or None if each shows another part.
      kinds: int [n], equal for images of the same kind, such as one lighting; None for one kind.
    """
    scores = scores if hasattr(scores, "shape") else np.asarray(scores)
    held_out = np.asarray(held_out)
    of_kind = []
    for rows in rows_by_kind(kinds, len(held_out)):
        weights, n = group_weights(None if groups is None else np.asarray(groups)[rows], len(rows))
        of_kind.append((1 + ((scores[..., None] <= held_out[rows]) * weights).sum(-1)) / (n + 1))
    highest = of_kind[0]
    for other in of_kind[1:]:
        highest = highest.clip(other)
    return highest


def rows_by_kind(kinds: ArrayLike | None, n: int) -> list[np.ndarray]:
    """Returns the rows of each kind among n images, for the argument `kinds` of `p_values`."""
    if kinds is None:
        return [np.arange(n)]
    return [np.flatnonzero(np.asarray(kinds) == kind) for kind in np.unique(np.asarray(kinds))]


def group_weights(groups: ArrayLike | None, n: int) -> tuple[np.ndarray, int]:
    """Returns 1 / (images in its group) for each of n images, and the number of groups."""
    if groups is None:
        return np.ones(n), n
    _, group, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    return 1 / sizes[group], len(sizes)


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """The rule of a detector; fields that it does not have are None."""

    image_threshold: Threshold | None = None
    pixel_threshold: Threshold | None = None
    held_out: np.ndarray | None = None  # scores of held-out images, float32 [n]
    groups: np.ndarray | None = None  # of these images, see `p_values`
    kinds: np.ndarray | None = None  # likewise

    def __call__(self, score: Any, anomaly_map: Any) -> dict[str, Any]:
        """Returns the results that the detector has, of float32 scores [...] and maps [...].

        Returns:
          "p_value", "is_anomalous" (bool, of the shape of `score`) and "mask" (bool, of the shape
          of `anomaly_map`), as far as the fields are known.
        """
        found = {}
        if self.held_out is not None:
            found["p_value"] = p_values(score, self.held_out, self.groups, self.kinds)
        if self.image_threshold is not None:
            found["is_anomalous"] = score > rounded_down(self.image_threshold.value)
        if self.pixel_threshold is not None:
            found["mask"] = anomaly_map > rounded_down(self.pixel_threshold.value)
        return found


def rounded_down(value: float) -> np.float32:
    """Largest float32 up to a value: a float32 is above both or above neither."""
    rounded = np.float32(value)
    return rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(-np.inf))
