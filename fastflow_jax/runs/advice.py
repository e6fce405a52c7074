"""Advice after a training: what the numbers of held-out and test images allow to say."""

from fastflow_jax.evaluation.metrics import auroc_standard_error

_STRICTER = 0.01  # the false-alarm rate that users ask for next


def after_training(threshold: dict | None, data: dict, image_auroc: float | None) -> str:
    """One or two sentences on the false-alarm rate and on the test set.

    Args:
      threshold: the image threshold as in `results.json`; None if no images were held out.
      data: of one training, as in `results.json`: `trained_on`, `held_out` and, if there are test
        images, `test_good` and `test_defective`.
      image_auroc: of the test images, or None.
    """
    sentences = [_on_threshold(threshold, data)]
    if image_auroc is not None:
        good, defective = data["test_good"], data["test_defective"]
        error = 1.96 * auroc_standard_error(image_auroc, good, defective)
        sentences.append(
            f"With {good} good and {defective} defective test images, the image AUROC of "
            f"{image_auroc:.3f} is known to about {error:.3f} either way (95 %)."
        )
    return " ".join(sentences)


def _on_threshold(threshold: dict | None, data: dict) -> str:
    if threshold is None:
        return (
            "No images were held out, so that there is no threshold: set config.data.holdout, or "
            "put normal images into calibration/good."
        )
    low, high = threshold["interval"]
    n, rate = threshold["n"], threshold["rate"]
    what = "images" if n == data["held_out"] else f"groups ({data['held_out']} images)"
    takes = round(1 / _STRICTER) - 1
    advice = "" if n >= takes else f"; {_STRICTER:.0%} takes {takes} held-out {what.split()[0]}"
    return (
        f"The threshold is set by {n} held-out {what}, for a false-alarm rate of {rate:.1%}: the "
        f"true rate is between {low:.1%} and {high:.1%} (95 %){advice}."
    )
