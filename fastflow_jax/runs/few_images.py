"""The detector for few normal images, chosen by their number."""

import logging

from ml_collections import ConfigDict

from fastflow_jax import data
from fastflow_jax.config import AUTO
from fastflow_jax.detectors.base import recipe
from fastflow_jax.evaluation.thresholds import default_rate
from fastflow_jax.runs.saved import MIN_CROSS_FITTED

# Normal images from which on a flow is trained, see docs/few_images.md.
ENOUGH = 32
_FOLDS = 16

_log = logging.getLogger(__name__)


def resolve(config: ConfigDict, dataset: data.Dataset | None = None) -> ConfigDict:
    """Returns a configuration with a detector in the place of "auto", not filled.

    With `ENOUGH` normal images it is FastFlow with its default recipe. With fewer it is k-NN on all
    of them; calibration and thresholds come from cross-fitting, unless there are calibration
    images or the images are cut into tiles. The choice is logged.

    Args:
      config: not filled, see `config.fill`. It is returned as it is if it names a detector.
      dataset: the images; None to open `config.data`. A configuration of several categories has
        FastFlow.

    Raises:
      InputError: the data set cannot be opened.
    """
    if config.detector != AUTO:
        return config
    c = config.copy_and_resolve_references()
    c.detector = "fastflow"
    if dataset is None:
        if len(data.categories(c.data)) > 1:
            return c
        dataset = data.open_dataset(c.data)
    n = len(dataset.train)
    if n >= ENOUGH:
        return c
    c.update(recipe("knn"))
    images = "image" if n == 1 else "images"
    choice = f"Only {n} normal {images}: the detector is k-NN (a flow needs {ENOUGH})."
    if c.data.tile is None and dataset.calibration is None:
        c.data.holdout, c.data.folds = 0.0, _FOLDS
        choice += f" {_threshold(n)}"
    _log.warning("%s Set config.detector to choose another detector.", choice)
    return c


def _threshold(n: int) -> str:
    if n < MIN_CROSS_FITTED:
        return (
            f"There is no threshold: {MIN_CROSS_FITTED} images support a false-alarm rate of "
            f"{1 / (MIN_CROSS_FITTED + 1):.0%}."
        )
    return (
        "Each image is scored by a detector of the other folds, for a threshold with a "
        f"false-alarm rate of {default_rate(n):.1%}."
    )
