"""Gain in image AUROC from a few labelled defects.

    python benchmarks/labelled_defects.py --sets elpv/mono photos/screws --features CACHE \
        --detector knn --draws 20 --out labelled_defects.json

Each set has one detector, trained on four fifths of at most 320 training images and calibrated on
the others. From its defective test images, 5, 10 and 20 are drawn. Weights are learned from them
and the held-out normal images (`evaluation/labelled.py`), and tested on the other test images. In
sets with several kinds of defects, each draw is repeated without one of the kinds, which is then
the only one that is tested ("new kind"). Features are those of `few_images.py`.

A row has the image AUROC with default weights, its mean change if learned weights are always used,
and if they are used only when cross-validation finds a gain; the share of draws in which they are
used; the lowest change of a draw, and in how many draws the change on the test images is below 0 by
its 95 % interval.
"""

import argparse
import itertools
import logging
import pathlib
import shlex
import sys
import tempfile

import numpy as np
from few_images import features_of, read_features
from many_sets import configuration, find_sets
from outcome import describe_machine, write_result
from paired import difference

from fastflow_jax.detectors.base import method
from fastflow_jax.evaluation import labelled
from fastflow_jax.features.extract import cached_features, in_batches
from fastflow_jax.files import parse_json, read_arrays, write_arrays
from fastflow_jax.training.context import FitContext

COUNTS = (5, 10, 20)
_FEWEST = 8  # test defects of a draw


def window_scores(detector: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Window scores [N, maps] of held-out and test images, and the default weights."""
    config, n = configuration(detector, {}), len(arrays["train_0"])
    held = np.arange(n) % 5 == 0
    holdout = features_of(arrays, "train", np.flatnonzero(held))
    with tempfile.TemporaryDirectory() as folder:
        train = cached_features(features_of(arrays, "train", np.flatnonzero(~held)))
        context = FitContext(config, train, pathlib.Path(folder), holdout=holdout)
        scorer = method(detector).fit(context)
    test = features_of(arrays, "test", np.arange(len(arrays["labels"])))
    found = {"weight": np.asarray(scorer.calibration.weight)}
    for name, maps in (("held_out", holdout), ("test", test)):
        found[name] = scorer.window_scores(
            in_batches(scorer.location_maps, maps, config.batch_size)
        )
    return found


def draw(
    scores: dict[str, np.ndarray], defects: np.ndarray, n: int, seed: int, new: str | None
) -> dict | None:
    """One draw of n defects; `new` is the kind of defect that is not drawn but tested."""
    rng, weight = np.random.default_rng((n, seed)), scores["weight"]
    known = rng.permutation(np.flatnonzero((defects != "good") & (defects != new)))
    tested = known[n:] if new is None else np.flatnonzero(defects == new)
    if len(known) < n or len(tested) < _FEWEST:
        return None
    rows = np.concatenate([np.flatnonzero(defects == "good"), tested])
    training = scores["held_out"], scores["test"][known[:n]], weight
    learned, is_used = labelled.learn(*training), labelled.gain(*training).is_positive
    labels = (defects[rows] != "good").astype(int)
    both = [(scores["test"][rows] @ w)[None] for w in (learned, weight)]
    after, before, _, high = difference(*both, labels)
    return {"before": before, "after": after, "used": is_used, "worse": high < 0}


def row_of(entries: list[dict], name: str, kind: str, n: int) -> dict:
    """A row of the table, see the docstring of this module."""
    change = np.array([e["after"] - e["before"] for e in entries])
    used = np.array([e["used"] for e in entries])
    return {
        "name": name,
        "tested": kind,
        "defects": str(n),
        "default": round(float(np.mean([e["before"] for e in entries])), 4),
        "always": round(float(change.mean()), 4),
        "gated": round(float((used * change).mean()), 4) + 0.0,
        "used": f"{used.mean():.0%}",
        "lowest": round(float((used * change).min()), 4) + 0.0,
        "worse": f"{sum(e['used'] and e['worse'] for e in entries)} of {len(entries)}",
    }


def main() -> None:
    """Computes the rows of all sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", required=True, metavar="SET")
    parser.add_argument("--detector", default="knn")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--features", type=pathlib.Path, required=True, help="directory")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    content = parse_json(args.out) if args.out.exists() else {"rows": []}
    for name, fields in find_sets(args.sets).items():
        if any(row["name"] == name for row in content["rows"]):
            continue
        arrays = read_features(name, fields, args.features)
        file = args.features / f"windows_{args.detector}_{name.replace('/', '_')}.npz"
        if not file.exists():
            write_arrays(file, window_scores(args.detector, arrays))
        scores, defects = read_arrays(file), arrays["defects"]
        kinds = sorted({*defects} - {"good"})
        for n, is_new in itertools.product(COUNTS, (False, True)):
            if is_new and len(kinds) == 1:
                continue
            new = [kinds[i % len(kinds)] if is_new else None for i in range(args.draws)]
            found = [draw(scores, defects, n, i, kind) for i, kind in enumerate(new)]
            if found := [each for each in found if each]:
                kind = "new kind" if is_new else "known kinds"
                content["rows"].append(row_of(found, name, kind, n))
        content["command"] = shlex.join(["python", "benchmarks/labelled_defects.py", *sys.argv[1:]])
        content["machine"] = describe_machine()
        write_result(args.out, content)
        print(name, flush=True)


if __name__ == "__main__":
    main()
