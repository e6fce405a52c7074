"""Saved detectors and records of finished trainings, for `Detector.load`."""

import dataclasses
import logging
import os
import pathlib

import numpy as np

from fastflow_jax.backbones import Backbone, open_backbone, rebuild_backbone, spec_of
from fastflow_jax.config import from_plain
from fastflow_jax.data.profile import Profile
from fastflow_jax.data.roi import CommonRegion, common_region
from fastflow_jax.data.tiles import image_means_of
from fastflow_jax.data.tiling import Places
from fastflow_jax.decision import Threshold
from fastflow_jax.detectors.base import Scorer, method
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.held_out import HeldOut, Reweigh, score_held_out
from fastflow_jax.evaluation.thresholds import default_rate
from fastflow_jax.features.extract import image_means
from fastflow_jax.features.foreground import Foreground
from fastflow_jax.features.prepare import Prepared, is_augmented
from fastflow_jax.features.shift import Reference, chosen
from fastflow_jax.files import (
    expanded,
    read_arrays,
    read_json,
    sha256,
    to_plain,
    write_arrays,
    write_json,
)
from fastflow_jax.runs import durable
from fastflow_jax.runs.durable import DETECTOR, Saved, plain_thresholds, read_threshold

_log = logging.getLogger(__name__)

_HELD_OUT = "held_out.npz"
_REFERENCE = "shift.npz"  # in the directory of the training
_ROI = "roi.npz"  # region of interest, likewise
_PIXEL_RATE = 0.01  # default false-alarm rate of pixels
VERSIONS = "versions"  # directory of the taught versions of a run, see `versions`
# Training images whose cross-fitted scores give a threshold: the rate of 4 is one in five.
MIN_CROSS_FITTED = 4


def record(
    config,
    scorer: Scorer,
    prepared: Prepared,
    *,
    seed: int,
    directory: pathlib.Path,
    training: pathlib.Path,
    scored: pathlib.Path | None = None,
    cross_fitted: HeldOut | None = None,
    reweigh: Reweigh | None = None,
) -> dict:
    """Scores the held-out images and writes what `read` reads; returns the thresholds, plain.

    For the arguments see `fit.fit`; `cross_fitted` has the scores of `cross_fit.cross_fit`, if
    training images take the place of held-out ones. There are no thresholds if these are too few.
    `reweigh` is that of `score_held_out`.
    """
    image = pixel = None
    if cross_fitted is not None:
        cross_fitted.save(directory / _HELD_OUT)
        if cross_fitted.n_parts >= MIN_CROSS_FITTED:
            image, pixel = default_thresholds(cross_fitted)
    elif prepared.holdout is not None:
        if scored in (None, directory):
            held_out = score_held_out(
                config,
                scorer,
                prepared.holdout,
                prepared.holdout_valid,
                prepared.holdout_groups,
                reweigh,
                prepared.holdout_tiles,
            )
        else:
            held_out = HeldOut.load(scored / _HELD_OUT)
        held_out.save(directory / _HELD_OUT)
        if len(held_out.scores) > 1 and np.ptp(held_out.scores) == 0:
            _log.warning(
                "All %d held-out images have the same score. If the training images are copies of "
                "one image, the threshold means nothing. Use different images.",
                len(held_out.scores),
            )
        image, pixel = default_thresholds(held_out)
    about = {
        "config": to_plain(config),
        "seed": seed,
        "weights": prepared.backbone.weights,
        "training": os.path.relpath(training, directory),
        "thresholds": plain_thresholds(image, pixel),
        "images": prepared.profile and dataclasses.asdict(prepared.profile),
    }
    write_json(directory / DETECTOR, about)
    return about["thresholds"]


def default_thresholds(held_out: HeldOut) -> tuple[Threshold, Threshold]:
    """The default thresholds of image scores and of anomaly maps."""
    image = held_out.image_threshold(default_rate(held_out.n_parts))
    return image, held_out.pixel_threshold(_PIXEL_RATE, warn=False)


def read(path: pathlib.Path) -> Saved:
    """Reads a saved detector, or the directory of a finished training that `record` has written.

    Raises:
      InputError: there is no detector, there are several trainings, which are listed, or a file is
        missing or damaged.
    """
    if path.is_file():
        return durable.read(path)
    about = _about(path)
    if "format" in about:
        return durable.read(path)
    with durable.damage_is_named(path / DETECTOR):
        training = (path / about["training"]).resolve()
        limits = [read_threshold(about["thresholds"][of]) for of in ("image", "pixel")]
        config, plain = from_plain(about["config"]), about.get("images")
        images = None if plain is None else Profile.from_plain(plain)
        weights, seed = dict(about["weights"]), int(about["seed"])
    if "taught" in about:
        return dataclasses.replace(
            _read_version(path, about),
            config=config,
            image_threshold=limits[0],
            pixel_threshold=limits[1],
            seed=seed,
            training=training,
        )
    if not (training / "checkpoints").exists():
        raise InputError(f"{training} lacks its checkpoints. Restore them, or train again.")
    file = path / _HELD_OUT
    held_out = HeldOut.load(file) if file.exists() else None
    if held_out is None and any(t and t.kind in ("image", "pixel") for t in limits):
        raise InputError(f"{path} lacks its {_HELD_OUT}. Restore it, or train again.")
    return Saved(
        config=config,
        weights=weights,
        state=method(config.detector).read(config, training),
        held_out=held_out,
        image_threshold=limits[0],
        pixel_threshold=limits[1],
        images=images,
        reference=read_reference(training),
        seed=seed,
        training=training,
        roi=read_region(training),
    )


def description(run: pathlib.Path) -> dict:
    """The content of the `detector.json` of a finished training.

    Raises:
      InputError: it is a saved detector, or see `read`.
    """
    if run.is_file() or "format" in (about := _about(run)):
        raise InputError(
            f"{run} is a saved detector, which has no versions. Pass the run directory of a "
            "training, or use Detector.update and save the result to a new path."
        )
    return about


def version_of(about: dict) -> int:
    """Number of the version that a `description` names; 1 is the training."""
    return about.get("taught", {"version": 1})["version"]


def _read_version(run: pathlib.Path, about: dict) -> Saved:
    """Reads the detector of the version that a run directory names."""
    taught = about["taught"]
    known = taught if isinstance(taught, dict) else {}
    if known.keys() != {"version", "sha256"} or type(known["version"]) is not int:
        raise InputError(f"{run / DETECTOR} is damaged: taught is {taught!r}. Restore it.")
    folder = run / VERSIONS / str(known["version"])
    file = folder / DETECTOR
    if not file.is_file() or sha256(file) != known["sha256"]:
        raise InputError(
            f"{file} is missing or has changed. Restore it from a copy, or go back to the version "
            f"before: `fastflow-jax update --undo --workdir={run}`."
        )
    return durable.read(folder)


def write_reference(config, prepared: Prepared, training: pathlib.Path) -> Reference | None:
    """Writes what `read_reference` reads to the directory of a training, and returns it.

    Augmented images are not like new images, training images may show the same parts if others
    were given for calibration, and tiles to train on overlap less than those of new images. In all
    of these cases only held-out images are compared with them.
    """
    tiles = prepared.holdout_tiles
    held_out_only = is_augmented(config) or prepared.dataset.calibration is not None
    held_out_only = held_out_only or prepared.image is not None
    if held_out_only and prepared.holdout is None:
        return None
    used = chosen(prepared.train.n)
    train = np.concatenate([image_means(*part) for part in prepared.train.in_batches(32, used)])
    held_out, groups = None, None if prepared.groups is None else prepared.groups[used]
    if prepared.holdout is not None:
        held_out = image_means(prepared.holdout, prepared.holdout_valid)
        held_out = held_out if tiles is None else image_means_of(held_out, tiles.image)
    if prepared.image is not None:  # of whole images
        train, groups = image_means_of(train, prepared.image[used]), None
    reference = Reference.fit(
        train,
        held_out,
        groups=groups,
        held_out_groups=prepared.holdout_groups,
        held_out_only=held_out_only,
    )
    if reference is not None:
        reference.save(training / _REFERENCE)
    return reference


def write_region(config, foreground: Foreground | None, training: pathlib.Path) -> None:
    """Writes the region of interest of a training to its directory, if it has one."""
    roi = foreground or common_region(config.data)
    if roi is not None:
        write_arrays(training / _ROI, durable.region_state(roi))


def read_region(training: pathlib.Path) -> CommonRegion | Foreground | None:
    """Reads what `write_region` has written, if anything."""
    file = training / _ROI
    return durable.region_from_state(read_arrays(file)) if file.exists() else None


def read_reference(training: pathlib.Path) -> Reference | None:
    """Reads what `write_reference` has written, if anything."""
    file = training / _REFERENCE
    return Reference.load(file) if file.exists() else None


def read_places(directory: pathlib.Path) -> Places | None:
    """The statistics of the places of tiles that `record` has written, if any."""
    file = directory / _HELD_OUT
    table = HeldOut.load(file).places if file.exists() else None
    return None if table is None else Places(table)


def load_backbone(
    record: Saved,
    directory: pathlib.Path,
    weights: str | os.PathLike | None = None,
    backbone: Backbone | None = None,
) -> Backbone:
    """The backbone of a saved detector or a finished training.

    Sets `config.weights` of the record to the path of the weight file.

    Args:
      record: of the detector.
      directory: directory or file that `record` was read from.
      weights: a file with the weights of the backbone; None for the recorded one.
      backbone: that of the training, if it is a function, see `Backbone.from_function`.

    Raises:
      InputError: the weights were not found, or are not those of the training; or the backbone is
        a function and was not given, or is not one and was.
    """
    config, known = record.config, record.weights
    if backbone is not None:
        _check_function(record, directory, backbone)
        return open_backbone(config, record.seed, backbone)
    if record.backbone is not None and weights is None:
        rebuilt = rebuild_backbone(config.backbone, config.layers, record.backbone, known)
        return dataclasses.replace(rebuilt, spec=spec_of(config))
    config.weights = _find_weights(record, directory, weights)
    backbone = open_backbone(config, record.seed)
    if backbone.weights.get("sha256") != known.get("sha256"):
        raise InputError(
            f"{directory} was trained with other weights of {config.backbone}: {known}, not "
            f"{backbone.weights}. Restore them, or train again."
        )
    return backbone


def _check_function(record: Saved, directory: pathlib.Path, backbone: Backbone) -> None:
    """Raises InputError if a given backbone is not the function of the training."""
    function = record.config.function
    if function.layers is None:
        raise InputError(
            f"{directory} was trained with {record.config.backbone}, which is found without it. "
            "Leave backbone out."
        )
    for what, known, given in (
        ("layers", function.layers, backbone.layers),
        ("channels", function.channels, backbone.channels),
        ("strides", function.strides, backbone.strides),
        ("the sha256 of its variables", function.sha256, backbone.weights.get("sha256")),
    ):
        if known != given:
            raise InputError(
                f"{directory} was trained with another backbone than {backbone.name}: {what} are "
                f"{known}, not {given}. Pass that of the training."
            )
    given = backbone.probe(record.config.image_size)
    if given is None or not np.allclose(given, function.probe, rtol=1e-2):
        raise InputError(
            f"The function of {backbone.name} gives other features than in the training of "
            f"{directory}. Restore its code."
        )


def _find_weights(
    record: Saved, directory: pathlib.Path, weights: str | os.PathLike | None = None
) -> str | None:
    """The weight file of a detector's backbone, as `config.weights`.

    If the recorded file does not exist, a file of its name and content is searched in the directory
    of the detector, in its run directory, and next to that.

    Args:
      record: of the detector.
      directory: that `record` was read from.
      weights: a file with the weights of the backbone; None for the recorded one.

    Raises:
      InputError: there is no such file, or its sha256 is not the recorded one.
    """
    recorded, digest = record.config.weights, record.weights.get("sha256")
    if weights is not None:
        file = expanded(weights)
        if digest is None:
            raise InputError(
                f"{directory} was trained with a backbone without a weight file. Leave weights out."
            )
        if not file.is_file():
            raise InputError(f"{file} is not a file. Pass the weight file of the backbone.")
        if (found := sha256(file)) != digest:
            trained_with = recorded or record.weights["file"]
            raise InputError(
                f"{file} is not the weight file that {directory} was trained with: its sha256 is "
                f"{found}, not {digest}. Pass the file that was {trained_with}."
            )
        return str(file.resolve())
    if record.weights.get("source") != "file" or recorded is None or os.path.exists(recorded):
        return recorded
    directory = directory.resolve()
    if directory.is_file():  # a .zip file
        directory = directory.parent
    parents = (directory, *directory.parents)
    run = next((d for d in parents if (d / "config.json").exists()), directory)
    for place in (directory, run, run.parent):
        file = place / pathlib.Path(recorded).name
        if file.is_file() and sha256(file) == digest:
            return str(file)
    raise InputError(
        f"{directory} was trained with the weight file {recorded}, which does not exist. Put it "
        f"there or into {run}, or pass its path: --weights=FILE of a command, or "
        "Detector.load(folder, weights=FILE)."
    )


def change(
    path: pathlib.Path, weights: str | None, image: Threshold | None, pixel: Threshold | None
) -> None:
    """Changes the thresholds of a saved detector or of a finished training.

    Args:
      path: that `read` has read.
      weights: `config.weights`, recorded again because the file may have moved.
      image: threshold of image scores.
      pixel: threshold of anomaly maps.

    Raises:
      InputError: there is no detector, or it cannot be written.
    """
    if path.is_file() or "format" in (about := _about(path)):
        durable.change(path, weights, image, pixel)
        return
    about["config"]["weights"] = weights
    about["thresholds"] = plain_thresholds(image, pixel)
    durable.write_description(path, about)


def trainings(run: pathlib.Path) -> list[pathlib.Path]:
    """Directories of the finished trainings of a run, itself or below it; not saved detectors."""
    return [folder for folder in _with_detectors(run) if "format" not in _about(folder)]


def _with_detectors(directory: pathlib.Path) -> list[pathlib.Path]:
    """The directories in a directory, or itself, that have a `detector.json`; without versions."""
    folders = (file.parent for file in directory.rglob(DETECTOR))
    return sorted(folder for folder in folders if folder.parent.name != VERSIONS)


def is_finished(directory: pathlib.Path) -> bool:
    """Whether a directory has a finished training or a saved detector."""
    return (directory / DETECTOR).exists()


def _about(directory: pathlib.Path) -> dict:
    """The content of `detector.json`; for errors see `read`."""
    about = read_json(directory / DETECTOR)
    if about is None:
        raise InputError(_where_trainings_are(directory))
    known = about if isinstance(about, dict) else {}
    if "format" in known:
        return known
    if missing := {"config", "seed", "weights", "training", "thresholds"} - known.keys():
        raise InputError(
            f"{directory / DETECTOR} was written by an older version, without {min(missing)}. "
            "Train again."
        )
    return about


def _where_trainings_are(directory: pathlib.Path) -> str:
    if not directory.is_dir():
        return (
            f"{directory} is not a directory or a .zip file. Pass a saved detector, or the run "
            "directory of a training."
        )
    if found := [str(folder) for folder in _with_detectors(directory)]:
        return f"{directory} has several trainings. Pass one of them:\n  " + "\n  ".join(found)
    return f"{directory} has no finished training, or one of an older version. Train there first."
