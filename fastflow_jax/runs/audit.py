"""Audit of the training set: normal images that look unusual among the others.

Defective images that slipped into the normal ones are learned as normal, and raise thresholds. The
audit ranks all normal images by their cross-fitted scores and lists the first ones, for a person to
look at. `config.data.exclude` leaves out those that a person has confirmed.
"""

import dataclasses
import logging
import math
import pathlib
import shutil

import numpy as np

from fastflow_jax import data, parallel
from fastflow_jax.data.exclude import CALIBRATION
from fastflow_jax.data.transforms import placement, seen_part
from fastflow_jax.detectors.base import InvertibleScorer, Scorer, method
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.cross_fit import SIMILAR, CrossFitted, cross_fit
from fastflow_jax.features.extract import Features, in_batches
from fastflow_jax.features.prepare import Prepared, preparer
from fastflow_jax.features.split import split
from fastflow_jax.files import create_folder, expanded, write_json, write_text
from fastflow_jax.report.heatmaps import draw_strip, save_picture
from fastflow_jax.report.html import write_audit_page
from fastflow_jax.runs.directory import claim
from fastflow_jax.runs.levels import with_levels
from fastflow_jax.training.context import FitContext

_log = logging.getLogger(__name__)

_LIST = "audit.txt"
_HEADER = """\
# Normal images that look unusual among the others, most unusual first. Look at their pictures,
# delete the lines of normal ones, and train without the others: --config.data.exclude=FILE
"""
# Bounds of the time that an audit adds to a training: a few seconds, and as long for latents.
_MOST_IMAGES, _PAIRS, _FEWEST_SIMILAR = 1000, 4000, 4
_PIXELS = "pixels"  # a backbone without features
_COLOUR_IMAGES = 100  # that set the colour range


def run(config, workdir: str | pathlib.Path) -> list[dict]:
    """Audits each category of a data set.

    FastFlow is trained on all normal images for its latents; other detectors are not trained.

    Args:
      config: filled, see `config.fill`. Augmentation, variants and seeds have no effect.
      workdir: directory for `audit.json`, `audit.txt`, `audit.html` and the pictures in `audit/`,
        in a subdirectory for each of several categories. It may be that of a run.

    Returns:
      The content of `audit.json` of each category.

    Raises:
      InputError: the images are too few or not usable, or the directory has another run.
    """
    if not config.audit:
        raise InputError("config.audit is 0, so no images are listed. Pass --config.audit=0.08.")
    if config.data.tile is not None:
        raise InputError(
            "An audit compares whole images. Leave config.data.tile out, and set config.image_size "
            "for small defects."
        )
    if config.backbone == _PIXELS:
        raise InputError(
            "The backbone pixels has no features to compare images by. Pass "
            "--config.backbone=tf_efficientnet_lite0 --config.image_size=256, or another backbone."
        )
    workdir, config = expanded(workdir), with_levels(config)
    c = config.copy_and_resolve_references()
    if c.data.exclude is not None:
        file = pathlib.Path(c.data.exclude)
        if file.name == _LIST and file.is_relative_to(workdir.resolve()):
            raise InputError(
                f"data.exclude {file} is a file that this audit would replace. Copy it to another "
                "place, or pass another --workdir."
            )
    with c.unlocked():
        c.augment.copies, c.augment.flips, c.augment.rotate, c.augment.colour = 0, False, 0.0, 0.0
        c.data.holdout = 0.0  # all images are in one array of features
        c.train.cache = "auto" if c.train.cache == "none" else c.train.cache
    open_category = data.opener(c.data)
    audits, categories = [], data.categories(c.data)
    with claim(workdir, config):
        prepare = preparer(
            c, workdir / "features", lambda cat: dataclasses.replace(open_category(cat), test=None)
        )
        for category in categories:
            folder = workdir / category if category and len(categories) > 1 else workdir
            create_folder(folder)
            prepared = prepare(c, category, c.seed)
            scorer = train_flow(c, prepared, folder / "flow", label=f"{category or 'audit'}: flow")
            audit = write_audit(c, prepared, folder, category, scorer, similar=SIMILAR)
            assert audit is not None  # the features are cached
            names = [entry["name"] for entry in audit["ranking"][: audit["listed"]]]
            write_text(folder / _LIST, _HEADER + "".join(f"{name}\n" for name in names))
            parallel.on_main(lambda folder=folder: write_audit_page(folder))
            audits.append(audit)
        parallel.on_main(lambda: shutil.rmtree(workdir / "features", ignore_errors=True))
    return audits


def train_flow(
    config, prepared: Prepared, folder: pathlib.Path, *, label: str
) -> InvertibleScorer | None:
    """Trains FastFlow without memory banks, in a directory that is removed again.

    Returns:
      A scorer for latents only; None if the detector of the configuration is another one.
    """
    if config.detector != "fastflow":
        return None
    c = config.copy_and_resolve_references()
    c.map.bank = 0
    parallel.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
    scorer = method("fastflow").fit(FitContext(c, prepared.train, folder, c.seed, label=label))
    parallel.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
    assert isinstance(scorer, InvertibleScorer)
    return scorer


def audit_training(
    config, prepared: Prepared, folder: pathlib.Path, category: str | None, scorer: Scorer
) -> None:
    """Audits the normal images of a training, if that is quick: compares each with fewer others.

    Latents of the trained scorer are compared, if it has any. Nothing is written, and the log says
    why, if there are too few or too many images, or if the features of unchanged images are not
    cached.
    """
    n, reason = len(prepared.dataset.train), None
    if not config.audit or config.backbone == _PIXELS:
        return
    if prepared.train.cached is None:
        reason = "features of unchanged images are not cached"
    elif n > _MOST_IMAGES:
        reason = f"there are more than {_MOST_IMAGES:,} normal images"
    else:
        try:
            similar = min(SIMILAR, max(_FEWEST_SIMILAR, _PAIRS // n))
            write_audit(config, prepared, folder, category, scorer, similar=similar)
        except InputError as error:
            reason = str(error)
    if reason is not None:
        _log.info("The report does not list unusual normal images: %s", reason)


def write_audit(
    config,
    prepared: Prepared,
    folder: pathlib.Path,
    category: str | None,
    scorer: Scorer | None,
    *,
    similar: int,
) -> dict | None:
    """Ranks the normal images of a training, and writes `audit.json` and pictures in `audit/`.

    Args:
      config: filled; `audit` is the share of the images that is listed.
      prepared: data and features.
      folder: directory to write to.
      category: of the data set, or None.
      scorer: trained on these images or on most of them; its latents are compared, if it has any.
      similar: see `cross_fit`.

    Returns:
      The content of `audit.json`; None if the features of unchanged images are not cached.

    Raises:
      InputError: see `cross_fit`.
    """
    images = _images_of(config, prepared)
    if images is None:
        return None
    title = category or prepared.dataset.name
    found = cross_fit(
        config,
        images.features,
        images.valid,
        images.groups,
        latents=_latents(scorer, images.features),
        similar=similar,
        label=f"{title}: audit",
    )
    order = np.argsort(-found.scores, kind="stable")
    listed = order[: math.ceil(config.audit * len(order))]
    prefix = f"{category}/" if category and len(data.categories(config.data)) > 1 else ""
    ranking = [
        {"name": f"{prefix}{images.name(i)}", "score": round(float(found.scores[i]), 3)}
        for i in order
    ]
    audit = {
        "name": title,
        "images": len(order),
        "listed": len(listed),
        "similar": similar,
        "ranking": ranking,
    }
    _write_pictures(config, images, found, order, len(listed), folder / "audit")
    write_json(folder / "audit.json", audit)
    return audit


@dataclasses.dataclass(frozen=True)
class _Images:
    """Normal images of a training: those trained on, then the held-out ones."""

    places: list[tuple[data.Source, int, str]]  # source, row and prefix of the name
    features: Features
    valid: np.ndarray | None
    groups: np.ndarray | None

    def name(self, i: int) -> str:
        """Name of an image as `config.data.exclude` takes it."""
        source, row, prefix = self.places[i]
        return f"{prefix}{source.names[row]}"


def _images_of(config, prepared: Prepared) -> _Images | None:
    """The unchanged images of a training; None if their features are not cached."""
    if prepared.train.cached is None:
        return None
    images, n = split(config, prepared.dataset), prepared.n_trained_on
    places = [(images.source, int(i), "") for i in images.train]
    features = tuple(m[:n] for m in prepared.train.cached)
    valid, groups = prepared.train.valid, images.groups
    valid = None if valid is None else valid[:n]
    if prepared.holdout is None or config.augment.copies:  # these held-out images are changed
        return _Images(places, features, valid, groups)
    prefix = "" if images.held_out_source is images.source else CALIBRATION
    places += [(images.held_out_source, int(i), prefix) for i in images.held_out]
    both = zip(features, prepared.holdout, strict=True)
    features = tuple(np.concatenate([np.asarray(m) for m in maps]) for maps in both)
    if valid is not None and prepared.holdout_valid is not None:
        valid = np.concatenate([valid, prepared.holdout_valid])
    if images.held_out_groups is not None:
        groups = np.arange(n) if groups is None else groups
        groups = np.concatenate([groups, n + images.held_out_groups])
    return _Images(places, features, valid, groups)


def _latents(scorer: Scorer | None, features: Features) -> Features | None:
    """Latents of a scorer in float16, or None if it has none."""
    if not isinstance(scorer, InvertibleScorer):
        return None

    def of_batch(batch: Features) -> Features:
        return tuple(z.astype(np.float16) for z in scorer.latents(batch))

    return in_batches(of_batch, features, scorer.config.batch_size)


def _write_pictures(
    config,
    images: _Images,
    found: CrossFitted,
    order: np.ndarray,
    listed: int,
    folder: pathlib.Path,
) -> None:
    """Writes image, heat map and mask of the listed images as `<rank>.webp`, from 1 on.

    Colours and masks are as in reports of test images, see `report.pictures.write_pictures`, with
    the images that are not listed as normal ones.
    """
    parallel.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
    usual = order[listed:] if listed < len(order) else order
    some = found.anomaly_maps(usual[:: -(-len(usual) // _COLOUR_IMAGES)])
    low, high = float(np.quantile(some, 0.5)), float(np.quantile(some, 0.999))
    maps = found.anomaly_maps(order[:listed])
    for rank, (i, anomaly_map) in enumerate(zip(order[:listed], maps, strict=True), 1):
        if not parallel.is_main():
            break
        source, row, _ = images.places[i]
        image = source[row].image
        where = placement(image.shape[:2], tuple(config.image_size), config.data.resize)
        strip = draw_strip(
            seen_part(image, where),
            anomaly_map[where.place],
            low=low,
            high=high + (high - low),
            threshold=high,
        )
        save_picture(folder / f"{rank}.webp", strip)
