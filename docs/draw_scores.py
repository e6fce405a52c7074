"""Draws scores.png, the figure of concepts.md, from the scores of a run.

python -m fastflow_jax.main --config=configs/synthetic.py:brick,gravel --workdir=runs/synthetic
python docs/draw_scores.py runs/synthetic
"""

import json
import pathlib
import sys

import matplotlib.pyplot as plt
import numpy as np

from fastflow_jax.evaluation.thresholds import image_threshold

NORMAL, DEFECTIVE = "#5b2a86", "#d1495b"
ROWS = ("held-out images, left half", "normal images, right half", "defective images, right half")


def scores_of(training: pathlib.Path) -> list[np.ndarray]:
    """Scores of the held-out, normal and defective images of a training, in the order of ROWS."""
    images = json.loads((training / "scores.json").read_text())["images"]
    by_label = [[i["score"] for i in images if i["label"] == label] for label in (0, 1)]
    return [np.load(training / "held_out.npz")["scores"], *map(np.array, by_label)]


def main(run: pathlib.Path) -> None:
    """Plots a panel for each material, with a dot for each image."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.4), sharey=True, layout="constrained")
    for axis, material in zip(axes, ("brick", "gravel"), strict=True):
        found = scores_of(run / material)
        for row, (scores, colour) in enumerate(
            zip(found, (NORMAL, NORMAL, DEFECTIVE), strict=True)
        ):
            axis.scatter(scores, np.full(len(scores), -row), s=14, alpha=0.6, color=colour)
        for name, scores, line in (
            ("the held-out images", found[0], ":"),
            ("every second normal image of the right half", found[1][::2], "-"),
        ):
            value = image_threshold(scores, 1 / (len(scores) + 1)).value
            axis.axvline(value, linestyle=line, color="black", label=f"threshold from {name}")
        axis.set(title=material, xlabel="score", yticks=range(0, -3, -1), yticklabels=ROWS)
        axis.margins(y=0.2)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    plt.savefig(pathlib.Path(__file__).with_name("scores.png"), dpi=100)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
