"""`--mode=update`: teaches new normal images to the detector of a run directory."""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib

from fastflow_jax.data.groups import labels_of
from fastflow_jax.detector import Detector
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded, make_folder, sha256
from fastflow_jax.finetune import finetune
from fastflow_jax.predict import EXPORTED, Found, draw_prediction, export_once, find_images
from fastflow_jax.report.heatmaps import save_picture
from fastflow_jax.runs import versions
from fastflow_jax.teach import Update, update

_log = logging.getLogger(__name__)


def run_update(
    workdir: str | os.PathLike,
    images: str,
    *,
    output: str | os.PathLike | None = None,
    weights: str | os.PathLike | None = None,
    keep_threshold: bool = False,
    tune: bool = False,
) -> int:
    """Teaches normal images to the detector of a run, as a new version.

    A detector that was exported for `--engine=onnx` is exported again, and servers reload it. No
    version is added if the current one was taught the same images in the same way, for example by
    a call that was killed at its end.

    Args:
      workdir: the run directory, or that of one of several trainings.
      images: a file, a directory (with its sub-directories) or a glob pattern.
      output: directory for heat maps of images that may be defective; None to draw none.
      weights: weight file of the backbone, see `Detector.load`.
      keep_threshold: see `Detector.update`.
      tune: continue the training with a half of the images first, see `finetune.finetune`. The
        other half is for the threshold.

    Returns:
      Exit status 0.

    Raises:
      InputError: there are no images or no run, or see `Detector.update`.
    """
    run, found = expanded(workdir), find_images(images)
    with versions.changing(run):
        lesson = _lesson(found, keep_threshold, tune)
        if lesson == versions.lesson(run):
            print(f"These images are already taught. {run} has version {versions.current(run)}.")
            _export_again(run, weights)
            return 0
        before = Detector.load(run, weights=weights)
        files, first = [*found.names], None
        if tune:
            first, files = _halves(before, files)
            before = finetune(run, before, first)
        taught = update(before, files, keep_threshold=keep_threshold)
        if first is not None:
            known = update(taught.detector, first, keep_threshold=True)
            taught = dataclasses.replace(taught, detector=known.detector, n=taught.n + known.n)
        number = versions.add(run, taught.detector, lesson)
        taught.log()
        if output is not None:
            _draw(taught, found, expanded(output))
        print(f"{taught.n} images are taught. {run} has version {number} now.")
        _export_again(run, weights)
    return 0


def run_undo(workdir: str | os.PathLike, *, weights: str | os.PathLike | None = None) -> int:
    """Goes back to the version before the last update of a run.

    Args:
      workdir: the run directory.
      weights: weight file of the backbone, see `Detector.load`.

    Returns:
      Exit status 0.

    Raises:
      InputError: there is no run, or no update.
    """
    run = expanded(workdir)
    with versions.changing(run):
        number = versions.undo(run)
        which = ", that of the training," if number == 1 else ""
        print(f"{run} has version {number}{which} again.")
        _export_again(run, weights)
    return 0


def _lesson(found: Found, keep_threshold: bool, tune: bool) -> str:
    """Checksum of images, their order and names, and of how they are taught."""
    content = [(name, sha256(pathlib.Path(path))) for path, name in found.names.items()]
    return hashlib.sha256(json.dumps([content, keep_threshold, tune]).encode()).hexdigest()


def _halves(detector: Detector, files: list[str]) -> tuple[list[str], list[str]]:
    """Splits files into every other one and the rest; those of one part stay together."""
    parts = labels_of(files, detector.config.data.groups) or tuple(files)
    number = {part: i for i, part in enumerate(dict.fromkeys(parts))}
    halves: tuple[list[str], list[str]] = [], []
    for file, part in zip(files, parts, strict=True):
        halves[number[part] % 2].append(file)
    if len(number) < 2:
        raise InputError("Fine-tuning needs images of two parts at least. Leave --finetune out.")
    return halves


def _draw(taught: Update, found: Found, output: pathlib.Path) -> None:
    """Draws heat maps of the images that may be defective."""
    for prediction in taught.suspects:
        name = found.locate(prediction.name)[1]
        file = output / "heatmaps" / f"{name}.png"
        make_folder(file.parent)
        save_picture(file, draw_prediction(taught.detector, prediction, name))
    if taught.suspects:
        _log.info("Heat maps of images that may be defective: %s", output / "heatmaps")


def _export_again(run: pathlib.Path, weights: str | os.PathLike | None) -> None:
    """Exports the detector again if it was exported before."""
    if not (run / EXPORTED).exists():
        return
    try:
        export_once(run, weights)
    except InputError as error:
        _log.warning("%s is still that of the version before: %s", run / EXPORTED, error)
