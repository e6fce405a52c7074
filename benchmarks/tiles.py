"""Accuracy and cost of tiles at native resolution against whole images at 256 and 512 pixels.

    python benchmarks/tiles.py --sets photos/screws photos/nuts --detectors knn \
        --runs runs/tiles --out tiles.json

A set is a directory in the layout of docs/data.md. All rows are evaluated at the native size of
the images: maps are resized to it. Rows that are in the file are not measured again. Nothing is
chosen on test images.
"""

import argparse
import pathlib
import shlex
import shutil
import time

import numpy as np
from outcome import commit, describe_machine, write_result
from tables import format_cell

from fastflow_jax.config import default, fill
from fastflow_jax.detectors.base import recipe
from fastflow_jax.files import parse_json
from fastflow_jax.runs import experiment

WHOLE = 10_000  # a tile larger than the images
FORMS = {
    "whole, 256": {"data.tile": WHOLE, "image_size": (256,)},
    "whole, 512": {"data.tile": WHOLE, "image_size": (512,)},
    "tiles of 256": {"data.tile": 256},
    "tiles of 256, aligned": {"data.tile": 256, "data.aligned": True},
}
METRICS = ("image_auroc", "pixel_auroc", "aupro", "aupro_05", "pixel_ap")
SMALL = 0.01  # largest share of the image of a small defect
COLUMNS = {
    "name": "set, detector, input",
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "aupro_05": "AUPRO .05",
    "pixel_ap": "pixel AP",
    "small": "small defects found",
    "flagged": "normal images flagged",
    "seconds": "CPU time, s",
}


def found_small(sizes: list[dict]) -> float | None:
    """Share of the regions up to `SMALL` that the pixel threshold finds; None without any."""
    small = [row for row in sizes if row["high"] <= SMALL]
    n = sum(row["regions"] for row in small)
    return sum(row["found"] for row in small) / n if n else None


def measure(root: pathlib.Path, detector: str, form: str, workdir: pathlib.Path) -> dict:
    """Runs one row; returns its figures."""
    c = default()
    holdout = c.data.holdout
    c.update(recipe(detector))
    c.data.holdout, c.data.name, c.data.root = holdout, "folder", str(root)
    c.heatmaps, c.report, c.audit = 0, False, 0.0
    c.update_from_flattened_dict(FORMS[form])
    start = time.process_time()
    results = experiment.run(fill(c), workdir)
    seconds = time.process_time() - start
    (sizes,) = results["sizes"].values()
    part = parse_json(workdir / "part.json")
    good = [
        row["score"] for row in parse_json(workdir / "scores.json")["images"] if not row["label"]
    ]
    flagged = np.mean(np.array(good) > part["thresholds"]["image"]["value"])
    shutil.rmtree(workdir)
    figures = {name: results["mean"][name] for name in METRICS}
    figures |= {"small": found_small(sizes), "flagged": float(flagged)}
    row = {k: "" if v is None else format_cell(float(v)) for k, v in figures.items()}
    return row | {"seconds": f"{seconds:.0f}"}


def main() -> None:
    """Measures the rows that are not in the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", type=pathlib.Path, required=True)
    parser.add_argument("--detectors", nargs="+", default=["knn"])
    parser.add_argument("--runs", type=pathlib.Path, required=True, help="Directory of the runs.")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    rows = {row["name"]: row for row in parse_json(args.out)["rows"]} if args.out.exists() else {}
    words = ["benchmarks/tiles.py", "--sets", *(root.name for root in args.sets)]
    table = {
        "page": "docs/tiles.md",
        "command": shlex.join(["python", *words, "--detectors", *args.detectors]),
        "commit": commit(),
        "machine": describe_machine(),
        "seeds": "0",
        "data": "all images of the sets; small defects take at most 1 % of the image",
        "columns": COLUMNS,
    }
    for root in args.sets:
        for detector in args.detectors:
            for form in FORMS:
                name = f"{root.name}, {detector}, {form}"
                if name not in rows:
                    workdir = args.runs / f"{root.name}_{detector}_{list(FORMS).index(form)}"
                    rows[name] = {"name": name, **measure(root, detector, form, workdir)}
                    write_result(args.out, table | {"rows": list(rows.values())})
                    print(*rows[name].values(), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
