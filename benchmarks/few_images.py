"""Accuracy and false alarms of detectors that are trained on 1 to 32 normal images.

    python benchmarks/few_images.py --sets elpv/mono photos/screws --features CACHE \
        --detectors knn fastflow --draws 5 --out few_images.json

A set is a registered data set or a directory, see `many_sets.py`. From each, --draws random sets of
1, 2, 4, ... normal images are drawn among its first 160 training images in random order. k-NN and
other detectors without training are cross-fitted in up to 16 folds. FastFlow is cross-fitted in
--folds folds, or with 0 holds out a tenth of the images. All have the same draws.

Test images are at most --tested good and as many defective ones, evenly spaced. False alarms are
those of the default threshold on at most --tested other training images. Features of an image are
computed once and stored in the directory --features.

The file is written after each draw, and the same command continues. With a field `page`, it is a
table of `tables.py`: image AUROC of each set, mean and deviation over draws; the rate of the
threshold; and the share of false alarms, over all sets.
"""

import argparse
import itertools
import logging
import pathlib
import shlex
import sys
import tempfile
from typing import Any

import numpy as np
from many_sets import configuration, find_sets
from outcome import describe_machine, write_result

from fastflow_jax import data
from fastflow_jax.backbones import create_backbone
from fastflow_jax.detectors.base import Scorer, method
from fastflow_jax.evaluation.folds import cross_fit
from fastflow_jax.evaluation.held_out import HeldOut, score_held_out
from fastflow_jax.evaluation.metrics import image_auroc
from fastflow_jax.features.extract import Features, cached_features, in_batches
from fastflow_jax.features.prepare import feature_batches
from fastflow_jax.features.split import split_holdout
from fastflow_jax.files import parse_json, read_arrays, write_arrays
from fastflow_jax.runs.saved import MIN_CROSS_FITTED
from fastflow_jax.training.context import FitContext

SIZES = (1, 2, 4, 8, 16, 32)
_POOL, _TRAIN, _GOOD, _DEFECTIVE = 160, 320, 150, 200  # images to draw from; stored features
_CROSS_FITTED, _FOLDS = ("knn", "gaussian", "subspace", "patchcore"), 16
_FEWEST = 4  # images of a detector that holds some out


def evenly(rows: np.ndarray, n: int) -> np.ndarray:
    """At most n of the rows, evenly spaced."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int))]


def read_features(name: str, fields: dict[str, Any], folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Features `train_<i>` and `test_<i>` of each scale, and `labels` of the test images."""
    file = folder / f"{name.replace('/', '_')}.npz"
    if file.exists():
        return read_arrays(file)
    config = configuration("fastflow", fields)
    backbone = create_backbone(config.backbone, weights=config.weights, layers=config.layers)
    dataset, found = data.open_dataset(config.data), {}
    labels = dataset.test.labels
    rows = {
        "train": np.random.default_rng(0).permutation(len(dataset.train))[:_TRAIN],
        "test": np.concatenate(
            [evenly(np.flatnonzero(labels == i), n) for i, n in enumerate((_GOOD, _DEFECTIVE))]
        ),
    }
    for split, chosen in rows.items():
        batches = feature_batches(config, backbone, getattr(dataset, split), chosen)
        for i, maps in enumerate(zip(*(batch.features for batch in batches), strict=True)):
            found[f"{split}_{i}"] = np.concatenate(maps)
    found["labels"] = labels[rows["test"]]
    found["defects"] = np.array(dataset.test.defects)[rows["test"]]
    folder.mkdir(parents=True, exist_ok=True)
    write_arrays(file, found)
    return found


def features_of(arrays: dict[str, np.ndarray], split: str, rows: np.ndarray) -> Features:
    """Features [len(rows), h, w, C] of each scale."""
    scales = sum(f"{split}_{i}" in arrays for i in range(len(arrays)))
    return tuple(arrays[f"{split}_{i}"][rows] for i in range(scales))


def fit(detector: str, train: Features, folds: int) -> tuple[Scorer, HeldOut | None]:
    """Fits a detector to all features; also returns the scores that thresholds come from."""
    n = len(train[0])
    fields = {"data.holdout": 0.0, "data.folds": folds} if folds else {}
    config = configuration(detector, fields)
    rows, held = np.arange(n), np.arange(0)
    if not folds:
        rows, held = split_holdout(n, config.data.holdout)
    holdout = tuple(scale[held] for scale in train) if len(held) else None
    with tempfile.TemporaryDirectory() as folder:
        context = FitContext(
            config,
            cached_features(tuple(scale[rows] for scale in train)),
            pathlib.Path(folder),
            holdout=holdout,
        )
        scorer = method(detector).fit(context)
        if folds:
            return cross_fit(context, scorer, n)
    return scorer, None if holdout is None else score_held_out(config, scorer, holdout)


def run(
    detector: str, arrays: dict[str, np.ndarray], n: int, draw: int, tested: int, folds: int
) -> dict:
    """Fits a detector to a draw of n images and tests it."""
    total = len(arrays["train_0"])
    order = np.random.default_rng((n, draw)).permutation(min(_POOL, total))
    others = np.concatenate([order[n:], np.arange(len(order), total)])
    scorer, held_out = fit(detector, features_of(arrays, "train", order[:n]), folds)

    def scores(split: str, rows: np.ndarray) -> np.ndarray:
        part = features_of(arrays, split, rows)
        return in_batches(lambda maps: scorer.score(maps)[0], part, scorer.config.batch_size)

    labels = arrays["labels"]
    rows = np.concatenate([evenly(np.flatnonzero(labels == i), tested) for i in (0, 1)])
    entry = {"image_auroc": image_auroc(scores("test", rows), labels[rows])}
    if held_out is not None and held_out.n_parts >= (MIN_CROSS_FITTED if folds else 1):
        threshold = held_out.image_threshold(max(0.05, 1 / (held_out.n_parts + 1)))
        others = evenly(others, tested)
        flagged = int((scores("train", others) > threshold.value).sum())
        entry |= {"rate": threshold.rate, "flagged": flagged, "others": len(others)}
    return entry


def table_of(entries: list[dict], sets: list[str]) -> list[dict]:
    """Rows of the table: image AUROC by set, rates and false alarms."""
    rows = []
    for key in dict.fromkeys(map(_kind, entries)):
        here = [e for e in entries if _kind(e) == key]
        detector, folds, n = key
        row: dict[str, Any] = {"name": method(detector).title, "n": str(n)}
        row["scores"] = f"{min(folds, n)} folds" if folds else "held out"
        if n == 1:
            row["scores"] = "none"
        values = {s: [e["image_auroc"] for e in here if e["set"] == s] for s in sets}
        values = {s: found for s, found in values.items() if found}
        row |= {s: _cell(found) for s, found in values.items()}
        if len(values) == len(sets):
            row["mean"] = round(float(np.mean([np.mean(v) for v in values.values()])), 4)
        row["draws"] = str(min(map(len, values.values())))
        if counted := [e for e in here if "rate" in e]:
            row["rate"] = round(counted[0]["rate"], 4)
            shares = [e["flagged"] / e["others"] for e in counted if e["others"]]
            row["flagged"] = round(float(np.mean(shares)), 4)
        rows.append(row)
    return rows


def _kind(entry: dict) -> tuple[str, int, int]:
    """Detector, folds and number of images; entries with equal ones make a row of the table."""
    return entry["detector"], entry["folds"], entry["n"]


def _cell(values: list[float]) -> float | list[float]:
    if len(values) == 1:
        return round(values[0], 4)
    return [round(float(np.mean(values)), 4), round(float(np.std(values, ddof=1)), 4)]


def main() -> None:
    """Runs the draws that are not in the file yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", required=True, metavar="SET")
    parser.add_argument("--detectors", nargs="+", default=["knn"])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--tested", type=int, default=60, help="test images of each kind")
    parser.add_argument("--folds", type=int, default=0, help="of FastFlow")
    parser.add_argument("--features", type=pathlib.Path, required=True, help="directory")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    sets = find_sets(args.sets)
    content = parse_json(args.out) if args.out.exists() else {"entries": []}
    known = {(*_kind(e), e["set"], e["draw"]) for e in content["entries"]}
    for name, fields in sets.items():
        arrays = read_features(name, fields, args.features)
        for detector, n, draw in itertools.product(args.detectors, args.sizes, range(args.draws)):
            fits = n <= min(_POOL, len(arrays["train_0"]))
            folds = _FOLDS if detector in _CROSS_FITTED else args.folds
            fits = fits and (folds > 0 or n >= _FEWEST)
            if not fits or (detector, folds, n, name, draw) in known:
                continue
            key = {"detector": detector, "folds": folds, "n": n, "set": name, "draw": draw}
            content["entries"].append(key | run(detector, arrays, n, draw, args.tested, folds))
            content["entries"].sort(key=lambda e: (e["n"], e["detector"], e["folds"]))
            content["command"] = shlex.join(["python", "benchmarks/few_images.py", *sys.argv[1:]])
            content["machine"] = describe_machine()
            every = list(dict.fromkeys(e["set"] for e in content["entries"]))
            content["rows"] = table_of(content["entries"], every)
            write_result(args.out, content)
            print(key, flush=True)


if __name__ == "__main__":
    main()
