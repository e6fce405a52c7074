"""Gaussian: Mahalanobis distance of features to the training features of their scale.

Rippel, Mertens & Merhof, Modeling the Distribution of Normal Data in Pre-Trained Deep Features for
Anomaly Detection (arXiv 2005.14140), for each location instead of the whole image. A part of the
mean variance is added to each direction, as in the whitening of FastFlow, whose maps, calibration
and image score are used. It is the density that a flow of the identity has, and so the null
hypothesis for training one.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax.detectors.base import Method
from fastflow_jax.detectors.calibration import LocationScorer, finish_fit, load_scorer
from fastflow_jax.detectors.fastflow.scorer import layers
from fastflow_jax.features.extract import channel_moments, inside, whitening, without_padding
from fastflow_jax.training.context import FitContext


def fit(context: FitContext) -> "GaussianScorer":
    """Estimates the Gaussian of each scale, and calibrates on the held-out images."""
    config = context.config
    variables = {}
    for i, (mean, covariance) in enumerate(channel_moments(context.train.parts())):
        variables[f"mean_{i}"] = mean.astype(np.float32)
        matrix = whitening(covariance, config.gaussian.shrinkage)
        variables[f"matrix_{i}"] = matrix.astype(np.float32)
    return finish_fit(GaussianScorer, context, variables, maps=len(context.train.shapes))


def load(config, shapes, directory: pathlib.Path) -> "GaussianScorer":
    """Loads the scorer that `fit` has saved, see `Method.load`."""
    return load_scorer(GaussianScorer, config, directory)


def locate(config, variables, batch) -> tuple[jax.Array, ...]:
    """Squared norms of projected features over the number of channels, see `LocationScorer.locate`.

    The projection of a scale is (x - mean) @ matrix.
    """
    features, valid = batch
    maps = []
    for i, x in enumerate(features):
        y = (x.astype(jnp.float32) - variables[f"mean_{i}"]) @ variables[f"matrix_{i}"]
        energy = jnp.sum(y**2, -1) / x.shape[-1]
        if valid is not None:
            energy = without_padding(energy, inside(valid, x.shape[1:3]))
        maps.append(energy)
    return tuple(maps)


@dataclasses.dataclass(frozen=True)
class GaussianScorer(LocationScorer):
    """Scores by Mahalanobis distances; `variables` hold the means and whitening matrices."""

    locate = staticmethod(locate)


METHOD = Method(
    title="Gaussian",
    fit=fit,
    load=load,
    layers=layers,
    # shrinkage: part of the mean variance that is added to the variance of each direction
    fields={"gaussian": {"shrinkage": 0.5}},
    reads=("gaussian", "map.standardise", "map.compress", "score"),
    bounds={"gaussian.shrinkage": (1e-6, 100)},
)
