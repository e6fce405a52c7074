"""Shift: test images that differ as a whole from the training images.

After a change of camera, lighting or position, all new images score high. That is told from
defective images by a two-sample test on image-level features that needs no labels.
"""

import dataclasses

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import binom

from fastflow_jax.features.extract import Features, image_means

_NORMAL = 0.25  # smallest share of test images that are assumed to be normal
_LEVEL = 0.01  # largest p-value of a shift


@dataclasses.dataclass(frozen=True)
class Shift:
    """Result of the test, JSON-able by `dataclasses.asdict`."""

    test_images: int
    further: int  # of them, further from the training images than half of the normal images are
    p_value: float  # if a quarter of the test images are like the training images

    @property
    def is_shifted(self) -> bool:
        """Whether so few test images are like the training images by chance in 1 % of sets."""
        return self.p_value <= _LEVEL

    @property
    def message(self) -> str | None:
        """A warning if there is a shift."""
        if not self.is_shifted:
            return None
        return (
            f"The test images look shifted as a whole: {self.further} of {self.test_images} are "
            "further from the training images than half of the normal images are. Unless more than "
            "three quarters of them are defective, check camera, lighting and position, or train "
            "on images like these."
        )


def find(train: Features, holdout: Features | None, test: np.ndarray) -> Shift:
    """Tests whether the test images look like the training images.

    Each image is represented by the mean of each channel over its locations, standardised over the
    training images; its distance is that to the nearest other training image. Half of the images
    that are exchangeable with the training images have a distance above the median of the training
    images. If these are at least a quarter of the test images, the number of test images below the
    median is at least binomial with a probability of 1/8, which the test rejects if there are too
    few. The median of held-out images is used if it is higher, as it is if training images show the
    same part several times.

    Args:
      train: features of the training images, [N, h, w, C] per scale; two or more.
      holdout: features of held-out normal images, or None.
      test: `extract.image_means` of the test images, [M, C].
    """
    means = image_means(train)
    center, scale = means.mean(0), means.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    rows = (means - center) / scale
    among = cdist(rows, rows)
    np.fill_diagonal(among, np.inf)
    median = np.median(among.min(1))
    if holdout is not None and len(holdout[0]):
        held = (image_means(holdout) - center) / scale
        median = max(median, np.median(cdist(held, rows).min(1)))
    further = int((cdist((test - center) / scale, rows).min(1) > median).sum())
    p_value = binom.cdf(len(test) - further, len(test), _NORMAL / 2)
    return Shift(len(test), further, float(p_value))
