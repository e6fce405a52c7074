"""Subspace: residual of features outside the principal subspace of the training features.

SubspaceAD (arXiv 2602.23013): principal components of the features of normal images that explain a
given share of the variance; the energy of a location is the squared norm of what they leave out.
Here of each scale, per channel; feature maps, calibration and image score are those of FastFlow.
"""

import dataclasses

import numpy as np

from fastflow_jax.detectors.base import Method
from fastflow_jax.detectors.calibration import LocationScorer, finish_fit, load_scorer, read_fit
from fastflow_jax.detectors.fastflow.scorer import layers
from fastflow_jax.detectors.gaussian import locate
from fastflow_jax.features.extract import channel_moments
from fastflow_jax.state import Slot, State
from fastflow_jax.training.context import FitContext


def fit(context: FitContext) -> "SubspaceScorer":
    """Computes the principal components, and calibrates on the held-out images."""
    config = context.config
    variables = {}
    for i, (mean, covariance) in enumerate(channel_moments(context.train.parts())):
        variables[f"mean_{i}"] = mean.astype(np.float32)
        variables[f"matrix_{i}"] = residual_basis(covariance, config.subspace.variance)
    return finish_fit(SubspaceScorer, context, variables, maps=len(context.train.shapes))


def residual_basis(covariance: np.ndarray, variance: float) -> np.ndarray:
    """Orthonormal basis [C, D] of the directions outside the principal subspace, float32.

    Args:
      covariance: [C, C].
      variance: share of the variance that the principal subspace explains at least; one direction
        is always left.
    """
    values, vectors = np.linalg.eigh(covariance)  # ascending
    left = np.cumsum(values.clip(0)) / (values.clip(0).sum() or 1.0)
    return vectors[:, : max(1, np.sum(left <= 1 - variance))].astype(np.float32)


def load(config, shapes, state: State) -> "SubspaceScorer":
    """Rebuilds a scorer, see `Method.load`."""
    slots = {}
    for i, (_, _, channels) in enumerate(shapes):
        slots[f"mean_{i}"] = Slot((channels,))
        slots[f"matrix_{i}"] = Slot((channels, None))
    return load_scorer(SubspaceScorer, config, state, slots, maps=len(shapes))


@dataclasses.dataclass(frozen=True)
class SubspaceScorer(LocationScorer):
    """Scores by residuals; `variables` hold the means and the bases of the residual spaces."""

    locate = staticmethod(locate)


METHOD = Method(
    title="Principal subspace",
    fit=fit,
    read=read_fit,
    load=load,
    layers=layers,
    # variance: share that the principal components explain at least
    fields={"subspace": {"variance": 0.99}},
    reads=("subspace", "map.standardise", "map.compress", "map.border", "score"),
    bounds={"subspace.variance": (0, 1)},
)
