"""Accuracy with the foreground as region of interest, against the whole image.

    python benchmarks/roi.py --sets photos/capsule photos/cookie --detector knn --out roi.json

A set is a directory in the layout of docs/data.md. Each has a row for `config.data.roi` of None and
one for "auto": image AUROC; pixel metrics of the pixels that count; the same metrics of the pixels
in the foreground, for a comparison on the same pixels; the share of good test images that are
flagged at the stated rate; and the share of the pixels that count. With a field `page`, the file is
a table of `tables.py`.
"""

import argparse
import pathlib
import tempfile

import numpy as np
from outcome import describe_machine, write_result

from fastflow_jax.config import default, fill, name_data
from fastflow_jax.detectors.base import recipe
from fastflow_jax.evaluation.evaluate import Scored, measure, score_split
from fastflow_jax.features.prepare import preparer
from fastflow_jax.runs.fit import fit


def scored_by(root: pathlib.Path, detector: str, roi: str | None) -> tuple[Scored, dict | None]:
    """Scores of the test images of a set, and the image threshold as a dict."""
    c = default()
    c.update(recipe(detector))
    name_data(c, "folder")
    c.data.root, c.data.roi = str(root), roi
    config = fill(c)
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        prepared = preparer(config, directory / "features")(config, None, 0)
        fitted = fit(config, prepared, seed=0, directory=directory / "run")
        n = len(prepared.dataset.test or ())
        scored = score_split(fitted.scorer.score, prepared.test(), n, progress=root.name)
    return scored, fitted.thresholds["image"]


def row(scored: Scored, threshold: dict | None, region: np.ndarray | None) -> dict:
    """Figures of a detector; `region`, bool [N, H, W], has the pixels of the foreground."""
    whole, masks = measure(scored), scored.masks
    if region is not None and masks is not None:
        scored = scored._replace(valid=region, masks=masks & region)
    inside = measure(scored)
    good = scored.scores[scored.labels == 0]
    return {
        "image_auroc": whole["image_auroc"],
        "pixel_auroc": whole["pixel_auroc"],
        "aupro": whole["aupro"],
        "pixel_auroc_inside": inside["pixel_auroc"],
        "aupro_inside": inside["aupro"],
        "rate": threshold and threshold["rate"],
        "flagged": threshold and float((good > threshold["value"]).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--detector", default="knn")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    rows = []
    for root in args.sets:
        of_foreground = scored_by(root, args.detector, "auto")
        region = of_foreground[0].valid
        share = None if region is None else float(region.mean())
        for name, found in (
            ("all pixels", scored_by(root, args.detector, None)),
            ("auto", of_foreground),
        ):
            counted = 1.0 if name == "all pixels" else share
            rows.append({"name": root.name, "roi": name, "share": counted, **row(*found, region)})
            print(rows[-1], flush=True)
    write_result(
        args.out,
        {"machine": describe_machine(), "detector": args.detector, "rows": rows},
    )


if __name__ == "__main__":
    main()
