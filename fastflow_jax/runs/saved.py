"""Saved detectors: the files of a finished training that `Detector.load` reads."""

import dataclasses
import logging
import os
import pathlib
import shutil

import numpy as np
from ml_collections import ConfigDict

from fastflow_jax.config import from_plain
from fastflow_jax.data.profile import Profile
from fastflow_jax.decision import Threshold
from fastflow_jax.detectors.base import Scorer
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.held_out import HeldOut, score_held_out
from fastflow_jax.features.extract import image_means
from fastflow_jax.features.prepare import Prepared, is_augmented
from fastflow_jax.features.shift import Reference, chosen
from fastflow_jax.files import expanded, make_folder, read_json, sha256, to_plain, write_json
from fastflow_jax.training.loop import copy_variables

_log = logging.getLogger(__name__)

_DETECTOR = "detector.json"
_HELD_OUT = "held_out.npz"
_REFERENCE = "shift.npz"  # in the directory of the training
_RATE, _PIXEL_RATE = 0.05, 0.01  # default false-alarm rates


@dataclasses.dataclass(frozen=True, eq=False)
class Saved:
    """The record of a finished training."""

    config: ConfigDict  # filled, of the training
    seed: int
    weights: dict  # of the backbone, see `Backbone.weights`
    training: pathlib.Path  # directory of the training
    held_out: HeldOut | None
    image_threshold: Threshold | None
    pixel_threshold: Threshold | None
    images: Profile | None  # None in directories of older versions
    reference: Reference | None  # None in directories of older versions, see also `Reference.fit`


def record(
    config,
    scorer: Scorer,
    prepared: Prepared,
    *,
    seed: int,
    directory: pathlib.Path,
    training: pathlib.Path,
    scored: pathlib.Path | None = None,
) -> dict:
    """Scores the held-out images and writes what `read` reads; returns the thresholds, plain.

    For the arguments see `fit.fit`.
    """
    image = pixel = None
    if prepared.holdout is not None:
        if scored in (None, directory):
            held_out = score_held_out(
                config, scorer, prepared.holdout, prepared.holdout_valid, prepared.holdout_groups
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
        image = held_out.image_threshold(max(_RATE, 1 / (held_out.n_parts + 1)))
        pixel = held_out.pixel_threshold(_PIXEL_RATE, warn=False)
    about = {
        "config": to_plain(config),
        "seed": seed,
        "weights": prepared.backbone.weights,
        "training": os.path.relpath(training, directory),
        "thresholds": _plain(image, pixel),
        "images": prepared.profile and dataclasses.asdict(prepared.profile),
    }
    write_json(directory / _DETECTOR, about)
    return about["thresholds"]


def read(directory: pathlib.Path) -> Saved:
    """Reads what `record` or `save` has written.

    Raises:
      InputError: the directory has no training, or several, which are listed.
    """
    about = _about(directory)
    training, file = (directory / about["training"]).resolve(), directory / _HELD_OUT
    if not (training / "checkpoints").exists():
        raise InputError(f"{training} lacks its checkpoints. Restore them, or train again.")
    held_out = HeldOut.load(file) if file.exists() else None
    limits = [_threshold(about["thresholds"][of]) for of in ("image", "pixel")]
    if held_out is None and any(t and t.kind in ("image", "pixel") for t in limits):
        raise InputError(f"{directory} lacks its {_HELD_OUT}. Restore it, or train again.")
    images = about.get("images")
    return Saved(
        config=from_plain(about["config"]),
        seed=about["seed"],
        weights=about["weights"],
        training=training,
        held_out=held_out,
        image_threshold=limits[0],
        pixel_threshold=limits[1],
        images=None if images is None else Profile.from_plain(images),
        reference=read_reference(training),
    )


def write_reference(config, prepared: Prepared, training: pathlib.Path) -> Reference | None:
    """Writes what `read_reference` reads to the directory of a training, and returns it.

    Augmented images are not like new images, and training images may show the same parts if others
    were given for calibration. In both cases only held-out images are compared with them.
    """
    held_out_only = is_augmented(config) or prepared.dataset.calibration is not None
    if held_out_only and prepared.holdout is None:
        return None
    used = chosen(prepared.train.n)
    train = np.concatenate([image_means(*part) for part in prepared.train.in_batches(32, used)])
    held_out = None
    if prepared.holdout is not None:
        held_out = image_means(prepared.holdout, prepared.holdout_valid)
    reference = Reference.fit(
        train,
        held_out,
        groups=None if prepared.groups is None else prepared.groups[used],
        held_out_groups=prepared.holdout_groups,
        held_out_only=held_out_only,
    )
    if reference is not None:
        reference.save(training / _REFERENCE)
    return reference


def read_reference(training: pathlib.Path) -> Reference | None:
    """Reads what `write_reference` has written, if anything."""
    file = training / _REFERENCE
    return Reference.load(file) if file.exists() else None


def find_weights(
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
    parents = (directory, *directory.parents)
    run = next((d for d in parents if (d / "config.json").exists()), directory)
    for place in (directory, run, run.parent):
        file = place / pathlib.Path(recorded).name
        if file.is_file() and sha256(file) == digest:
            return str(file)
    raise InputError(
        f"{directory} was trained with the weight file {recorded}, which does not exist. Put it "
        f"there or into {run}, or pass its path: --weights=FILE with --mode=predict, or "
        "Detector.load(folder, weights=FILE)."
    )


def save(
    source: pathlib.Path,
    directory: pathlib.Path,
    weights: str | None,
    image_threshold: Threshold | None,
    pixel_threshold: Threshold | None,
) -> None:
    """Copies a detector to a new directory with these thresholds, or changes them in place.

    Args:
      source: directory of the detector.
      directory: new directory, or the source.
      weights: `config.weights`, recorded again because the file may have moved.
      image_threshold: of image scores.
      pixel_threshold: of anomaly maps.

    Raises:
      InputError: the directory has other files.
    """
    about = _about(source)
    if directory.resolve() != source.resolve():
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise InputError(f"{directory} has other files. Save to a new directory.")
        make_folder(directory)
        training = source / about["training"]
        copy_variables(training, directory)
        (directory / "checkpoints").mkdir(exist_ok=True)
        for file in (training / "checkpoints").glob("*.npz"):  # of detectors without gradients
            shutil.copy(file, directory / "checkpoints")
        for file in [*training.glob("*.npz"), *source.glob(_HELD_OUT)]:
            shutil.copy(file, directory)
        about["training"] = "."
    about["config"]["weights"] = weights
    about["thresholds"] = _plain(image_threshold, pixel_threshold)
    write_json(directory / _DETECTOR, about)


def is_finished(directory: pathlib.Path) -> bool:
    """Whether `record` or `save` has written to a directory."""
    return (directory / _DETECTOR).exists()


def _about(directory: pathlib.Path) -> dict:
    """The content of `detector.json`; for errors see `read`."""
    about = read_json(directory / _DETECTOR)
    if about is None:
        raise InputError(_where_trainings_are(directory))
    known = about if isinstance(about, dict) else {}
    if missing := {"config", "seed", "weights", "training", "thresholds"} - known.keys():
        raise InputError(
            f"{directory / _DETECTOR} was written by an older version, without {min(missing)}. "
            "Train again."
        )
    return about


def _where_trainings_are(directory: pathlib.Path) -> str:
    if not directory.is_dir():
        return f"{directory} is not a directory. Pass the run directory of a training."
    found = sorted(str(file.parent) for file in directory.rglob(_DETECTOR))
    if found:
        return f"{directory} has several trainings. Pass one of them:\n  " + "\n  ".join(found)
    return f"{directory} has no finished training, or one of an older version. Train there first."


def _plain(image: Threshold | None, pixel: Threshold | None) -> dict:
    return {name: t and dataclasses.asdict(t) for name, t in (("image", image), ("pixel", pixel))}


def _threshold(plain: dict | None) -> Threshold | None:
    """The inverse of `_plain` for one threshold."""
    if plain is None:
        return None
    try:
        interval = plain["interval"] and tuple(plain["interval"])
        return Threshold(**plain | {"value": float(plain["value"]), "interval": interval})
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"A threshold is damaged, or was written by another version ({error}). Install that "
            "version, or train again."
        ) from error
