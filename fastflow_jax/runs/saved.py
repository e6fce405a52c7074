"""The folder of a finished training, with what `Detector.load` reads beside the training itself."""

import dataclasses
import os
import pathlib
import shutil

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fastflow_jax.backbones.weights import sha256
from fastflow_jax.config import from_plain
from fastflow_jax.data.profile import Profile
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.held_out import HeldOut, score_held_out
from fastflow_jax.evaluation.thresholds import Threshold
from fastflow_jax.features.prepare import Prepared
from fastflow_jax.files import expanded, make_folder, read_json, to_plain, write_json

_ABOUT = "detector.json"
_HELD_OUT = "held_out.npz"
_RATE, _PIXEL_RATE = 0.05, 0.01  # of false alarms, unless another one is asked for


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """What is known of a finished training."""

    config: ConfigDict  # filled, that it was trained with
    seed: int
    weights: dict  # of the backbone, see `Backbone.weights`
    training: pathlib.Path  # the folder that it lies in
    held_out: HeldOut | None
    image_threshold: Threshold | None
    pixel_threshold: Threshold | None
    images: Profile | None  # None in directories of older versions


def record(
    config,
    scorer,
    prepared: Prepared,
    *,
    seed: int,
    folder: pathlib.Path,
    training: pathlib.Path | None = None,
    scored: pathlib.Path | None = None,
) -> dict:
    """Write what `read` reads; returns the thresholds, plain.

    Args:
      config: filled, of this training.
      scorer: what was trained.
      prepared: what it was trained on.
      seed: that it was trained with.
      folder: of this part of a run.
      training: the folder that the training lies in, where another part has made it.
      scored: the folder of a part whose scorer finds the very same in held-out images.
    """
    image = pixel = None
    if prepared.holdout is not None:
        if scored in (None, folder):
            held_out = score_held_out(
                config, scorer, prepared.holdout, prepared.holdout_valid, prepared.holdout_groups
            )
        else:
            held_out = HeldOut.load(scored / _HELD_OUT)
        held_out.save(folder / _HELD_OUT)
        if len(held_out.scores) > 1 and np.ptp(held_out.scores) == 0:
            tqdm.write(
                f"All {len(held_out.scores)} held-out images have the same score. If the training "
                "images are copies of one image, the threshold means nothing: give different ones."
            )
        image = held_out.image_threshold(max(_RATE, 1 / (held_out.n_parts + 1)))
        pixel = held_out.pixel_threshold(_PIXEL_RATE, warn=False)
    about = {
        "config": to_plain(config),
        "seed": seed,
        "weights": prepared.backbone.weights,
        "training": os.path.relpath(training or folder, folder),
        "thresholds": _plain(image, pixel),
        "images": prepared.profile and dataclasses.asdict(prepared.profile),
    }
    write_json(folder / _ABOUT, about)
    return about["thresholds"]


def read(folder: pathlib.Path) -> Kept:
    """What `record` or `save` wrote to a folder.

    Raises:
      InputError: the folder holds no training, or several, which are listed.
    """
    about = _about(folder)
    training, file = (folder / about["training"]).resolve(), folder / _HELD_OUT
    if not (training / "checkpoints").exists():
        raise InputError(f"{training} lacks its checkpoints: bring them back, or train again")
    held_out = HeldOut.load(file) if file.exists() else None
    limits = [_threshold(about["thresholds"][of]) for of in ("image", "pixel")]
    if held_out is None and any(t and t.kind in ("image", "pixel") for t in limits):
        raise InputError(f"{folder} lacks its {_HELD_OUT}: bring it back, or train again")
    config, seed, weights = from_plain(about["config"]), about["seed"], about["weights"]
    images = about.get("images")
    profile = None if images is None else Profile.from_plain(images)
    return Kept(config, seed, weights, training, held_out, *limits, profile)


def find_weights(
    kept: Kept, folder: pathlib.Path, weights: str | os.PathLike | None = None
) -> str | None:
    """`config.weights` of a detector, or the weight file that is in its place now.

    If the recorded file does not exist, a file of its name and content is searched in the folder of
    the detector, in its run directory, and next to that.

    Args:
      kept: of the detector.
      folder: that `kept` was read from.
      weights: a file with the weights of the backbone; None for the recorded ones.

    Raises:
      InputError: there is no such file, or its sha256 is not the recorded one.
    """
    recorded, digest = kept.config.weights, kept.weights.get("sha256")
    if weights is not None:
        file = expanded(weights)
        if digest is None:
            raise InputError(
                f"{folder} was trained with a backbone without a weight file. Leave weights out."
            )
        if not file.is_file():
            raise InputError(f"{file} is not a file. Pass the weight file of the backbone.")
        if (found := sha256(file)) != digest:
            raise InputError(
                f"{file} is not the weight file that {folder} was trained with: its sha256 is "
                f"{found}, not {digest}. Pass the file that was {recorded or kept.weights['file']}."
            )
        return str(file.resolve())
    if kept.weights.get("source") != "file" or recorded is None or os.path.exists(recorded):
        return recorded
    folder = folder.resolve()
    run = next((f for f in (folder, *folder.parents) if (f / "config.json").exists()), folder)
    for place in (folder, run, run.parent):
        file = place / pathlib.Path(recorded).name
        if file.is_file() and sha256(file) == digest:
            return str(file)
    raise InputError(
        f"{folder} was trained with the weight file {recorded}, which does not exist. Put it there "
        f"or into {run}, or pass its path: --weights=FILE with --mode=predict, or "
        "Detector.load(folder, weights=FILE)."
    )


def save(
    source: pathlib.Path,
    folder: pathlib.Path,
    weights: str | None,
    image_threshold: Threshold | None,
    pixel_threshold: Threshold | None,
) -> None:
    """Copy what lies in a folder to a new one, with these thresholds; or change them where it lies.

    Args:
      source: of the detector.
      folder: that it is saved to.
      weights: `config.weights`, recorded anew as the file may have moved.
      image_threshold: of scores.
      pixel_threshold: of anomaly maps.

    Raises:
      InputError: the folder holds something else.
    """
    about = _about(source)
    if folder.resolve() != source.resolve():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} holds something else: save to a new folder")
        make_folder(folder)
        training = source / about["training"]
        shutil.copytree(training / "checkpoints", folder / "checkpoints")
        for file in [*training.glob("*.npz"), *source.glob(_HELD_OUT)]:
            shutil.copy(file, folder)
        about["training"] = "."
    about["config"]["weights"] = weights
    about["thresholds"] = _plain(image_threshold, pixel_threshold)
    write_json(folder / _ABOUT, about)


def is_finished(folder: pathlib.Path) -> bool:
    """Whether `record` or `save` has written to a folder."""
    return (folder / _ABOUT).exists()


def _about(folder: pathlib.Path) -> dict:
    """What `record` wrote; for errors see `read`."""
    about = read_json(folder / _ABOUT)
    if about is None:
        raise InputError(_where_trainings_are(folder))
    known = about if isinstance(about, dict) else {}
    if missing := {"config", "seed", "weights", "training", "thresholds"} - known.keys():
        raise InputError(
            f"{folder / _ABOUT} is of an older version, without {min(missing)}: train anew"
        )
    return about


def _where_trainings_are(folder: pathlib.Path) -> str:
    if not folder.is_dir():
        return f"{folder} is no folder: name the run folder of a training"
    found = sorted(str(file.parent) for file in folder.rglob(_ABOUT))
    if found:
        return f"{folder} holds several trainings: name one of them:\n  " + "\n  ".join(found)
    return f"{folder} holds no finished training, or one of an older version: train there first"


def _plain(image: Threshold | None, pixel: Threshold | None) -> dict:
    return {name: t and dataclasses.asdict(t) for name, t in (("image", image), ("pixel", pixel))}


def _threshold(plain: dict | None) -> Threshold | None:
    """The inverse of `_plain`, of one."""
    if plain is None:
        return None
    try:
        number = {"value": float(plain["value"])}
        interval = {"interval": plain["interval"] and tuple(plain["interval"])}
        return Threshold(**plain | number | interval)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"a threshold of another version, or a damaged one ({error}): install the version that "
            "wrote it, or train again"
        ) from error
