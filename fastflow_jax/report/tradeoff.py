"""A picture of what each variant of a run reaches, against the time that it takes."""

import pathlib
from collections.abc import Mapping

from matplotlib.figure import Figure

from fastflow_jax.report.table import SPEED, TITLES

_ACROSS = "ms_batch_1"
_UP = ("image_auroc", "pixel_auroc")


def save_tradeoff(results: Mapping, file: pathlib.Path) -> None:
    """Draw those variants of `results.json` whose speed was measured: a panel a metric.

    Bars are deviations over seeds; the upper left corner is the best. Without any speed, or figures
    of accuracy, as where no test images are labelled, there is no picture.
    """
    variants = {n: each for n, each in (results["variants"] or {}).items() if each["speed"]}
    if not variants:
        return
    metrics = [m for m in _UP if all(each["mean"][m] is not None for each in variants.values())]
    if not metrics:
        return
    figure = Figure(figsize=(5.5 * len(metrics), 4.5), layout="constrained")
    for axes, metric in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
        for name, each in variants.items():
            place = (each["speed"][_ACROSS], each["mean"][metric])
            spread = each["std"][metric] if each["std"] else None
            axes.errorbar(*place, yerr=spread, fmt="o", capsize=3)
            axes.annotate(name, place, xytext=(6, 5), textcoords="offset points", fontsize=9)
        axes.set_xscale("log")
        axes.margins(x=0.25, y=0.15)
        axes.set(xlabel=SPEED[_ACROSS], ylabel=TITLES[metric])
        axes.grid(alpha=0.3, which="both")
    figure.savefig(file, dpi=120)
