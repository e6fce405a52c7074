"""The detector for few normal images, chosen by their number."""

import logging

from ml_collections import ConfigDict

from fastflow_jax import data
from fastflow_jax.config import AUTO, default
from fastflow_jax.detectors.base import recipe
from fastflow_jax.evaluation.thresholds import default_rate
from fastflow_jax.features.prepare import is_augmented
from fastflow_jax.runs.saved import MIN_CROSS_FITTED

ENOUGH = 16  # normal images from which on a flow is trained, see docs/few_images.md
ENOUGH_TO_HOLD_OUT = 100  # normal images from which on a tenth is held out
_FOLDS = {"knn": 16, "fastflow": 5}  # largest number, when images are cross-fitted

_log = logging.getLogger(__name__)


def resolve(config: ConfigDict, dataset: data.Dataset | None = None) -> ConfigDict:
    """Returns a configuration with a detector in the place of "auto", not filled.

    With `ENOUGH` normal images it is FastFlow with its default recipe, with fewer k-NN. With fewer
    than `ENOUGH_TO_HOLD_OUT`, the detector is trained on all of them, and calibration and
    thresholds come from cross-fitting. Images are held out as configured if there are calibration
    images, `config.data.holdout` is not the default, or cross-fitting cannot be done: images are
    cut into tiles, or features are not cached. The choice is logged.

    Args:
      config: not filled, see `config.fill`. It is returned as it is if it names a detector.
      dataset: the images; None to open `config.data`. One model of several products, and a
        configuration of several categories, have FastFlow.

    Raises:
      InputError: the data set cannot be opened.
    """
    if config.detector != AUTO:
        return config
    c = config.copy_and_resolve_references()
    c.detector = "fastflow"
    if config.one_model:
        return c
    if dataset is None:
        if len(data.categories(c.data)) > 1:
            return c
        dataset = data.open_dataset(c.data)
    n, cross_fits = len(dataset.train), _cross_fits(c, dataset)
    if n >= ENOUGH_TO_HOLD_OUT or (n >= ENOUGH and not cross_fits):
        return c
    if n < ENOUGH:
        c.update(recipe("knn"))
        images = "image" if n == 1 else "images"
        choice = f"Only {n} normal {images}: the detector is k-NN (a flow needs {ENOUGH})."
    else:
        choice = f"{n} normal images: the detector is FastFlow, and none of them is held out."
    if cross_fits:
        c.data.holdout, c.data.folds = 0.0, _FOLDS[c.detector]
        choice += f" {_threshold(n)}"
    level = logging.WARNING if n < ENOUGH else logging.INFO
    _log.log(level, "%s Set config.detector to choose another detector.", choice)
    return c


def _cross_fits(config: ConfigDict, dataset: data.Dataset) -> bool:
    """Whether to score training images by detectors of other folds, instead of holding some out."""
    is_cached = config.train.cache != "none" and not is_augmented(config)
    as_default = config.data.holdout == default().data.holdout and not config.data.folds
    return is_cached and as_default and config.data.tile is None and dataset.calibration is None


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
