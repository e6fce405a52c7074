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
    directory: pathlib.Path  # of the training: checkpoints and what else `load` reads
    seed: int = 0  # of parameters, order and everything else that is drawn
    holdout: Features | None = None  # of held-out normal images; None if there are none
    holdout_valid: np.ndarray | None = (
        None  # bool [N, H, W], False in padding; None without padding
    )
    # Seeds and directories of runs that differ in the seed alone. They may be trained in the same
    # program, and are then found finished when it is their turn.
    sibling_runs: tuple[tuple[int, pathlib.Path], ...] = ()
    # Called after each epoch of each run with its number, from 1 on, and a function that returns
    # the scorer of that epoch. What it returns is added to the epoch's line in `metrics.jsonl`.
    on_epoch: Callable[[int, Callable[[], Any]], dict] = _ignore
    label: str = "train"  # of progress bars
