"""Difference of two runs' image AUROCs with its 95 % interval over draws of test images.

    python benchmarks/paired.py runs/compare-elpv/fastflow runs/compare-elpv/patchcore

Both runs must have the same test images. AUROCs are averaged over the trainings (seeds) of a run.
DeLong et al., Comparing the areas under two or more correlated receiver operating characteristic
curves (Biometrics, 1988). If the interval contains zero, the test images do not tell which run is
better.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
from scipy import stats

from fastflow_jax.files import files_in


def read_scores(run: pathlib.Path) -> tuple[list[tuple[str, int]], np.ndarray]:
    """Names and labels of the test images, and scores [trainings, images], of a run."""
    parts = [json.loads(file.read_text())["images"] for file in files_in(run, "scores.json")]
    if not parts:
        sys.exit(f"{run} has no scores.json. Finish the run first.")
    parts = [sorted(part, key=lambda image: image["name"]) for part in parts]
    images = [[(image["name"], image["label"]) for image in part] for part in parts]
    if any(other != images[0] for other in images):
        sys.exit(f"The trainings in {run} have different test images. Name one category.")
    return images[0], np.array([[image["score"] for image in part] for part in parts])


def placements(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of normal images below each anomalous one, and of anomalous images above each normal.

    Ties count half; the mean of either is the AUROC.

    Args:
      scores: [trainings, images]; the shares are averaged over trainings.
      labels: [images], 1 for anomalous.
    """
    anomalous, normal = scores[:, labels == 1], scores[:, labels == 0]

    def below(a, b):  # share of b below each value of a
        ranks = stats.rankdata(np.concatenate([a, b], axis=1), axis=1)[:, : a.shape[1]]
        return (ranks - stats.rankdata(a, axis=1)) / b.shape[1]

    return below(anomalous, normal).mean(0), 1 - below(normal, anomalous).mean(0)


def difference(
    one: np.ndarray, other: np.ndarray, labels: np.ndarray
) -> tuple[float, float, float, float]:
    """AUROCs of both runs, and the ends of the 95 % interval of their difference."""
    both = [placements(scores, labels) for scores in (one, other)]
    aurocs = [float(of_anomalous.mean()) for of_anomalous, _ in both]
    steps = [a - b for a, b in zip(*both, strict=True)]
    error = np.sqrt(sum(np.var(step, ddof=1) / len(step) for step in steps))
    half = stats.norm.ppf(0.975) * error
    return *aurocs, aurocs[0] - aurocs[1] - half, aurocs[0] - aurocs[1] + half


def main() -> None:
    """Reads both runs and prints the difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs=2, type=pathlib.Path, metavar="run")
    args = parser.parse_args()
    (images, one), (others, other) = map(read_scores, args.runs)
    if images != others:
        sys.exit("The two runs have different test images.")
    labels = np.array([label for _, label in images])
    first, second, low, high = difference(one, other, labels)
    print(f"{first:.4f} - {second:.4f} = {first - second:+.4f}, 95 % {low:+.4f} to {high:+.4f}")


if __name__ == "__main__":
    main()
