"""False-alarm rates and accuracy before and after an update with images of a new kind.

    python benchmarks/update.py --sets photos/screws photos/nuts --detectors knn fastflow \
        --runs runs/update --out update.json

A set is a directory in the layout of docs/data.md whose names are in the order of time. Its normal
training images are split in time, into the first 60 % and the later ones. A detector is trained on
four fifths of the first ones, and holds out a fifth of these; every fifth image is left out as an
old normal image. Two kinds of images are then taught to it, separately: the later images as they
are, and the same images under another lighting: a gamma of 1.4, and 90 %, 75 % and 60 % of red,
green and blue. Every other image of a kind is taught; the rest are others of the kind.

Rates are the shares of normal images above the threshold, for a stated rate of 5 %. The old test
set has the test images of the set. Nothing is chosen on them.
"""

import argparse
import pathlib
import shlex
import sys
import time

import numpy as np
from outcome import commit, describe_machine, write_result
from sklearn.metrics import roc_auc_score
from tables import format_cell

from fastflow_jax import Detector
from fastflow_jax.config import default
from fastflow_jax.data.arrays import read_image
from fastflow_jax.data.inputs import stacked
from fastflow_jax.data.layout import list_images
from fastflow_jax.data.transforms import normalise
from fastflow_jax.detectors.base import recipe
from fastflow_jax.features.extract import Features, in_batches
from fastflow_jax.files import parse_json

TRAINED, HELD_OUT = 0.6, 0.2  # parts of the normal training images, and of those
MOST, MOST_BAD = 60, 50  # normal and defective images of a list that are scored, evenly spaced
COLUMNS = {
    "name": "set, detector, new kind",
    "images": "trained on / taught / others / old normal",
    "taught": "taught images flagged",
    "others": "others of the kind flagged",
    "old": "old normal images flagged",
    "old_auroc": "AUROC, old test set",
    "kind_auroc": "AUROC, new kind",
    "threshold": "threshold",
    "seconds": "CPU time of the update, s",
}


def relit(image: np.ndarray) -> np.ndarray:
    """An image uint8 [H, W, 3] under another lighting."""
    return np.uint8(np.clip(255 * (image / 255) ** 1.4 * (0.9, 0.75, 0.6), 0, 255))


def some(files: list[pathlib.Path], most: int = MOST) -> list[pathlib.Path]:
    """At most that many files, evenly spaced."""
    rows = np.linspace(0, len(files) - 1, min(most, len(files)))
    return [files[i] for i in rows.round().astype(int)]


def features_of(detector: Detector, images: list) -> Features:
    """Features [n, h, w, C] per scale."""
    spec = detector.backbone.spec
    pixels, _ = stacked([part for _, each in detector.inputs(images) for part in each.parts])

    def extract(batch: np.ndarray) -> Features:
        return detector.extract(normalise(batch, spec.mean, spec.std))

    return in_batches(extract, pixels, detector.config.batch_size)


def scores(detector: Detector, features: Features) -> np.ndarray:
    """Image scores [n]."""
    score = detector.scorer.score
    return in_batches(lambda batch: score(batch)[0], features, detector.config.batch_size)


def auroc(normal: np.ndarray, defective: np.ndarray) -> float:
    """AUROC of scores."""
    labels = np.repeat([0, 1], [len(normal), len(defective)])
    return float(roc_auc_score(labels, np.concatenate([normal, defective])))


def lists_of(root: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """The files of a set by their role."""
    normal = list_images(root / "train/good")
    cut = round(TRAINED * len(normal))
    first, later = normal[:cut], normal[cut:]
    return {
        "train": [file for i, file in enumerate(first) if i % 5 != 2],
        "old": first[2::5],
        "taught": some(later[::2]),
        "others": some(later[1::2]),
        "good": some(list_images(root / "test/good")),
        "bad": some([f for f in list_images(root / "test") if f.parent.name != "good"], MOST_BAD),
    }


def measure(detector: Detector, known: dict, files: dict, kind: str) -> dict:
    """The row of a kind, "later" or "other light"; `known` are features of the old test set."""
    is_later = kind == "later"
    load = (
        (lambda files: files) if is_later else lambda files: [relit(read_image(f)) for f in files]
    )
    taught = load(files["taught"])
    start = time.process_time()
    updated = detector.update(taught)
    seconds = time.process_time() - start
    images = {
        **known,
        "taught": features_of(detector, taught),
        "others": features_of(detector, load(files["others"])),
        "kind_bad": known["bad"] if is_later else features_of(detector, load(files["bad"])),
    }
    before, after = ({n: scores(d, x) for n, x in images.items()} for d in (detector, updated))
    limits = detector.image_threshold.value, updated.image_threshold.value

    def pair(values) -> str:
        return " → ".join(format_cell(float(value)) for value in values)

    def flagged(name: str) -> str:
        return pair((s[name] > t).mean() for s, t in zip((before, after), limits, strict=True))

    numbers = [len(files[role]) for role in ("train", "taught", "others", "old")]
    return {
        "images": " / ".join(map(str, numbers)),
        **{name: flagged(name) for name in ("taught", "others", "old")},
        "old_auroc": pair(auroc(s["good"], s["bad"]) for s in (before, after)),
        "kind_auroc": pair(auroc(s["others"], s["kind_bad"]) for s in (before, after)),
        "threshold": " → ".join(f"{limit:.3g}" for limit in limits),
        "seconds": f"{seconds:.0f}",
    }


def main() -> None:
    """Measures the rows that are not in the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", type=pathlib.Path, required=True)
    parser.add_argument("--detectors", nargs="+", default=["knn"])
    parser.add_argument("--runs", type=pathlib.Path, required=True, help="Directory of trainings.")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    measured = parse_json(args.out)["rows"] if args.out.exists() else []
    rows = {row["name"]: row for row in measured}
    for root in args.sets:
        files = lists_of(root)
        for name in args.detectors:
            c = default()
            c.update(recipe(name))
            c.data.holdout = HELD_OUT
            workdir = args.runs / f"{root.name}_{name}"
            detector = Detector.fit(files["train"], config=c, workdir=workdir)
            known = {role: features_of(detector, files[role]) for role in ("old", "good", "bad")}
            for kind in ("later", "other light"):
                title = f"{root.name}, {name}, {kind}"
                if title not in rows:
                    rows[title] = {"name": title, **measure(detector, known, files, kind)}
                words = ["benchmarks/update.py", "--sets", *(s.name for s in args.sets)]
                table = {
                    "page": "docs/teaching.md",
                    "command": shlex.join(["python", *words, "--detectors", *args.detectors]),
                    "commit": commit(),
                    "machine": describe_machine(),
                    "seeds": "0",
                    "data": f"numbers of images in the table; at most {MOST} normal and {MOST_BAD} "
                    "defective images of a list are scored",
                    "columns": COLUMNS,
                }
                write_result(args.out, table | {"rows": list(rows.values())})
                print(*rows[title].values(), sep=" | ", flush=True, file=sys.stderr)


if __name__ == "__main__":
    main()
