"""What do the figures of a finished run come to on each half of its test images?

    python benchmarks/halves.py runs/folder-tf_efficientnet_lite0

A recipe that was developed on a data set flatters itself there. So the test images are split once,
even and odd places in sorted order: who chooses on one half can report the other. The last
checkpoints of all seeds are scored anew; a line each for all images and for the halves, mean and
deviation over the seeds.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile

import jax
import numpy as np

from fastflow_jax import data
from fastflow_jax.config import from_plain
from fastflow_jax.detectors.base import detector_module
from fastflow_jax.evaluation.evaluate import METRICS, Scored, measure, score_split
from fastflow_jax.features.prepare import preparer

HALVES = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


def score_run(config, prepare, category: str | None, seed: int, folder: pathlib.Path) -> Scored:
    """The test images of one category under what one seed's training left."""
    prepared = prepare(config, category, seed)
    if prepared.dataset.test is None:
        sys.exit(f"{prepared.dataset.name} has no test images")
    scorer = detector_module(config.detector).load(config, prepared.train.shapes, folder)
    n = len(prepared.dataset.test)
    return score_split(scorer.score, prepared.test(), n, progress=str(folder))


def half_of(scored: Scored, places: slice) -> Scored:
    """Part of the images."""
    return jax.tree.map(lambda array: array[places], scored)


def report(config, prepare, seeds: list[int], run: pathlib.Path) -> None:
    """A line for each half of the test images of each category."""
    categories = data.categories(config.data)
    for category in categories:
        folder = run / category if len(categories) > 1 else run
        figures = {half: [] for half in HALVES}
        for seed in seeds:
            part = folder / f"seed_{seed}" if len(seeds) > 1 else folder
            scored = score_run(config, prepare, category, seed, part)
            for half, places in HALVES.items():
                figures[half].append(measure(half_of(scored, places)))
        for half, rows in figures.items():
            cells = []
            for metric in METRICS:
                values = [row[metric] for row in rows]
                if None not in values:
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    cells.append(f"{metric} {np.mean(values):.4f} ± {spread:.4f}")
            print(f"{category or config.data.name}, {half}: {', '.join(cells)}")


def main() -> None:
    """Score all parts of the run anew and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=pathlib.Path, help="a finished run folder")
    run = parser.parse_args().run
    config = from_plain(json.loads((run / "config.json").read_text()))
    seeds = [config.seed + i for i in range(config.seeds)]
    with tempfile.TemporaryDirectory() as features:
        prepare = preparer(config, pathlib.Path(features))
        report(config, prepare, seeds, run)


if __name__ == "__main__":
    main()
