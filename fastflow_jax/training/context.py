"""The context of one training: everything that a detector's `fit` needs."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fastflow_jax.features.extract import Features, TrainingFeatures


def _ignore(epoch: int, make_scorer: Callable[[], Any]) -> dict:
    return {}


@dataclasses.dataclass(frozen=True)
class FitContext:
    """Configuration, features and run directory of one training."""

    config: ConfigDict  # filled, see `config.fill`
    train: TrainingFeatures  # of the training images
    directory: pathlib.Path  # of the training, for checkpoints and other files
    seed: int = 0  # of parameters, the order of images, and other random choices
    holdout: Features | None = None  # of held-out normal images; None if there are none
    # Of held-out images: bool [N, H, W], False in padded pixels; None without padding.
    holdout_valid: np.ndarray | None = None
    # Seeds and directories of runs that differ in the seed only. They may be trained in the same
    # program; their own fits then find them finished.
    sibling_runs: tuple[tuple[int, pathlib.Path], ...] = ()
    # Called after each epoch of each run with the number of the epoch, from 1 on, and a function
    # that returns the scorer of that epoch. Its result is added to the line in `metrics.jsonl`.
    on_epoch: Callable[[int, Callable[[], Any]], dict] = _ignore
    # Variables that a training with gradients starts from; None for new ones.
    start: dict | None = None
    label: str = "train"  # of progress bars
    # Directory of the training that several products share, see `Method.fit_shared`; None for a
    # training of its own.
    shared: pathlib.Path | None = None
    product: int = 0  # index of the product in that training
