"""Advice after a training: how precise thresholds and metrics are, given the number of images."""

import math
from collections.abc import Mapping

from fastflow_jax.decision import Threshold
from fastflow_jax.evaluation.metrics import auroc_standard_error
from fastflow_jax.evaluation.thresholds import DEFAULT_RATE, default_rate, fewest

_STRICTER = 0.01  # false-alarm rate whose required number of held-out images is stated


def after_training(threshold: Mapping | None, data: Mapping, image_auroc: float | None) -> str:
    """Returns sentences on the precision of the false-alarm rate and of the image AUROC.

    Args:
      threshold: the image threshold as in `results.json`; None if no images were held out.
      data: of one training, as in `results.json`: `trained_on`, `held_out`, `cross_fitted` and, if
        there are test images, `test_good` and `test_defective`.
      image_auroc: of the test images, or None.
    """
    sentences = [on_threshold(threshold, data)]
    if image_auroc is not None:
        good, defective = data["test_good"], data["test_defective"]
        error = 1.96 * auroc_standard_error(image_auroc, good, defective)
        sentences.append(
            f"With {good} good and {defective} defective test images, the image AUROC of "
            f"{image_auroc:.3f} is known to within {error:.3f} (95 %)."
        )
    return " ".join(sentences)


def on_threshold(threshold: Mapping | None, data: Mapping) -> str:
    """Returns sentences on where an image threshold comes from; for arguments, `after_training`."""
    cross_fitted = data.get("cross_fitted", 0)
    if threshold is None and cross_fitted:
        return f"There is no threshold: {cross_fitted} training images are too few for one."
    if threshold is None:
        return (
            "There is no threshold, because no images were held out. Set config.data.holdout, or "
            "put normal images into calibration/good."
        )
    n, promise = threshold["n"], Threshold(**threshold).promise
    images, kind = cross_fitted or data["held_out"], "training" if cross_fitted else "held-out"
    unit = "images" if n == images else "groups"
    what = unit if n == images else f"{unit} ({images} images)"
    text = f"The threshold comes from {n} {kind} {what}: {promise}."
    return text + _on_lower_rates(n, kind, unit, data)


def _on_lower_rates(n: int, kind: str, unit: str, data: Mapping) -> str:
    """What a lower rate than that of n images or groups needs; empty if the rate is low."""
    needed, stricter = fewest(DEFAULT_RATE), fewest(_STRICTER)
    if n >= stricter:
        return ""
    if n >= needed:
        return f" A rate of {_STRICTER:.0%} needs {stricter} {kind} {unit}."
    text = f" The default rate of {DEFAULT_RATE:.0%} needs {needed} {kind} {unit}"
    if kind == "training":
        return f"{text}."
    text += f", so {default_rate(n):.1%}, the lowest rate of {n}, was chosen."
    part = math.ceil(100 * needed / (data["trained_on"] + data["held_out"])) / 100
    if unit == "images" and part <= 0.5 and "calibration_images" not in data:
        return f"{text} For {DEFAULT_RATE:.0%}, train with --config.data.holdout={part:g}."
    return text
