"""`--mode=migrate`: run directories, also of earlier versions, as saved detectors."""

import os
import pathlib

import numpy as np

from fastflow_jax.detector import Detector, Products
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded
from fastflow_jax.runs import saved
from fastflow_jax.runs.products import read_products


def migrate(
    workdir: str | os.PathLike,
    output: str | os.PathLike,
    *,
    weights: str | os.PathLike | None = None,
) -> list[pathlib.Path]:
    """Saves the detectors of a run directory in the current format; returns their paths.

    Each saved detector is loaded again, and must score a test image like the original. The run
    directory does not change.

    Args:
      workdir: the run directory, of any version.
      output: a new directory, or a new .zip file if there is one detector. Of several trainings,
        `output` has a saved detector for each, named like its directory in the run.
      weights: weight file of the backbone, see `Detector.load`.

    Raises:
      InputError: there is no run, all of it has the current format already, a path exists, or a
        saved detector scores differently; or see `Detector.load`.
    """
    run, target = expanded(workdir), expanded(output)
    if read_products(run) is not None:
        products = Products.load(run, weights=weights)
        products.save(target)
        _check(products, Products.load(target, weights=weights), target)
        return [target]
    trainings = saved.trainings(run)
    if not trainings:
        raise InputError(
            f"{run} has no training to migrate. Pass the run directory of a training; saved "
            "detectors have the current format already."
        )
    if len(trainings) > 1 and target.suffix.lower() == ".zip":
        raise InputError(
            f"{run} has {len(trainings)} trainings, which do not fit into one file. Pass a new "
            "directory as --output."
        )
    written = []
    for training in trainings:
        place = target / training.relative_to(run)
        detector = Detector.load(training, weights=weights)
        detector.save(place)
        _check(detector, Detector.load(place, weights=weights), place)
        written.append(place)
    return written


def _check(before: Detector | Products, after: Detector | Products, place: pathlib.Path) -> None:
    """Raises InputError if two detectors score an image differently."""
    image = np.random.default_rng(0).integers(0, 256, (1, *before.image_size, 3), np.uint8)
    found, known = after.run(image, None), before.run(image, None)
    if any((found[name] != known[name]).any() for name in ("score", "anomaly_map")):
        raise InputError(
            f"{place} does not score like the original. Remove it and report this as an error of "
            "this package; the run directory is unchanged."
        )
