"""Advice after a training: how precise thresholds and metrics are, given the number of images."""

from fastflow_jax.evaluation.metrics import auroc_standard_error

_STRICTER = 0.01  # false-alarm rate whose required number of held-out images is stated


def after_training(threshold: dict | None, data: dict, image_auroc: float | None) -> str:
    """Returns sentences on the precision of the false-alarm rate and of the image AUROC.

    Args:
      threshold: the image threshold as in `results.json`; None if no images were held out.
      data: of one training, as in `results.json`: `trained_on`, `held_out`, `cross_fitted` and, if
        there are test images, `test_good` and `test_defective`.
      image_auroc: of the test images, or None.
    """
    sentences = [_on_threshold(threshold, data)]
    if image_auroc is not None:
        good, defective = data["test_good"], data["test_defective"]
        error = 1.96 * auroc_standard_error(image_auroc, good, defective)
        sentences.append(
            f"With {good} good and {defective} defective test images, the image AUROC of "
            f"{image_auroc:.3f} is known to within {error:.3f} (95 %)."
        )
    return " ".join(sentences)


def _on_threshold(threshold: dict | None, data: dict) -> str:
    cross_fitted = data.get("cross_fitted", 0)
    if threshold is None and cross_fitted:
        return f"There is no threshold: {cross_fitted} training images are too few for one."
    if threshold is None:
        return (
            "There is no threshold, because no images were held out. Set config.data.holdout, or "
            "put normal images into calibration/good."
        )
    low, high = threshold["interval"]
    n, rate = threshold["n"], threshold["rate"]
    images, kind = cross_fitted or data["held_out"], "training" if cross_fitted else "held-out"
    what = "images" if n == images else f"groups ({images} images)"
    needed = round(1 / _STRICTER) - 1
    unit = what.split()[0]
    advice = "" if n >= needed else f" A rate of {_STRICTER:.0%} needs {needed} held-out {unit}."
    return (
        f"The threshold comes from {n} {kind} {what}, for a false-alarm rate of {rate:.1%}. The "
        f"true rate is between {low:.1%} and {high:.1%} (95 %).{advice}"
    )
