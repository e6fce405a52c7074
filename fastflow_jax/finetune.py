"""Fine-tuning: a short continued training of a FastFlow detector with new normal images."""

import dataclasses
import pathlib
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastflow_jax import data
from fastflow_jax.data.arrays import as_dataset
from fastflow_jax.data.dataset import Dataset, Source
from fastflow_jax.data.formats import Header
from fastflow_jax.detector import Detector
from fastflow_jax.errors import InputError, Interrupted
from fastflow_jax.features.prepare import preparer
from fastflow_jax.features.split import Split, split
from fastflow_jax.runs import saved, versions
from fastflow_jax.runs.directory import check_same_data
from fastflow_jax.runs.fit import fit

_PART, _RATE = 0.2, 0.1  # of the steps and of the learning rate of the training


def finetune(run: pathlib.Path, detector: Detector, files: Sequence[str]) -> Detector:
    """Continues the training of a run with its training images and new ones.

    The flows start from those of the detector. The memory banks are drawn again; calibration and
    thresholds are those of the held-out images of the training.

    Args:
      run: run directory of the detector.
      detector: version 1 of the run.
      files: new normal images.

    Raises:
      InputError: it is not FastFlow, images were taught to it before, or its training images are
        not available or have changed.
      Interrupted: SIGTERM or SIGINT was received.
    """
    check_tunable(run, detector)
    config, parts = detector.config, _training_images(run, detector)
    seed = saved.description(run)["seed"]
    joined = _rows(parts.source, parts.train, as_dataset(files, levels=detector.levels).train)
    calibration = _rows(parts.held_out_source, parts.held_out) if len(parts.held_out) else None
    dataset = Dataset(run.name, joined, None, {"source": "fine-tuning"}, calibration)
    shorter = config.copy_and_resolve_references()
    with shorter.unlocked():
        c = shorter.train
        c.learning_rate = _RATE * c.learning_rate
        field = "steps" if c.epochs is None else "epochs"
        c[field] = max(1, round(_PART * c[field]))
    variables: Any = detector.scorer.variables  # pyright: ignore[reportAttributeAccessIssue]
    start = {name: tree for name, tree in variables.items() if name != "bank"}
    with tempfile.TemporaryDirectory(prefix="fastflow_jax_", ignore_cleanup_errors=True) as name:
        folder = pathlib.Path(name)
        prepared = preparer(shorter, folder / "features", lambda category: dataset)(
            shorter, config.data.category, seed
        )
        try:
            fit(
                shorter,
                prepared,
                seed=seed,
                directory=folder / "run",
                start=start,
                label="fine-tune",
            )
        except Interrupted as stop:
            raise Interrupted(
                stop.exit_code - 128, "while fine-tuning, which will start again"
            ) from stop
        tuned = Detector.load(folder / "run")
    rates = (limit and limit.rate for limit in (detector.image_threshold, detector.pixel_threshold))
    with warnings.catch_warnings():  # as in the training
        warnings.simplefilter("ignore")
        tuned = tuned.with_threshold(**dict(zip(("rate", "pixel_rate"), rates, strict=True)))
    scorer = dataclasses.replace(tuned.scorer, config=config)
    return dataclasses.replace(tuned, config=config, scorer=scorer, folder=None)


def check_tunable(run: pathlib.Path, detector: Detector) -> None:
    """Raises InputError for detectors that cannot be fine-tuned."""
    config, limit = detector.config, detector.image_threshold
    problem = None
    if config.detector != "fastflow":
        problem = f"The detector {config.detector} cannot be fine-tuned"
    elif versions.current(run) > 1:
        problem = f"{run} was updated before, and its fine-tuning would forget these images"
    elif limit is not None and limit.rate is None:
        problem = f"The threshold of {run} was not chosen by a false-alarm rate"
    elif config.data.name == "folder" and config.data.root is None:
        problem = f"The training images of {run} were passed by a program, and cannot be read again"
    elif len(data.categories(config.data)) > 1:
        problem = f"{run} is a category of a larger run, whose images are not looked up"
    if problem is not None:
        raise InputError(f"{problem}. Leave --finetune out, or train again with the new images.")


def _training_images(run: pathlib.Path, detector: Detector) -> Split:
    """The images that the training began with; InputError if they are others now."""
    parts = split(detector.config, data.open_dataset(detector.config.data))
    record = saved.read(run)
    assert record.training is not None
    check_same_data(record.training, parts.contents, detector.backbone.weights)
    return parts


def _rows(source: Source, rows: np.ndarray, other: Source | None = None) -> Source:
    """Some images of a source, followed by those of another."""
    each = [(source, int(i)) for i in rows]
    if other is not None:
        each += [(other, i) for i in range(len(other))]

    def header(index: int) -> Header:
        source, i = each[index]
        assert source.header is not None
        return source.header(i)

    return Source(
        names=tuple(source.names[i] for source, i in each),
        defects=tuple(source.defects[i] for source, i in each),
        load=lambda index: each[index][0].load(each[index][1]),
        files=tuple(source.files[i] if source.files else None for source, i in each),
        header=None if source.header is None else header,
        groups=tuple(source.groups[i] for i in rows) if source.groups and other is None else None,
    )
