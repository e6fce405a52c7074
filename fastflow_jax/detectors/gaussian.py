"""Gaussian: Mahalanobis distance of features to the training features of their scale.

Rippel, Mertens & Merhof, Modeling the Distribution of Normal Data in Pre-Trained Deep Features for
Anomaly Detection (arXiv 2005.14140), for each location instead of the whole image. A part of the
mean variance is added to each direction, as in the whitening of FastFlow, whose maps, calibration
and image score are used. It is the density that a flow of the identity has, and so the null
hypothesis for training one.

With `gaussian.per_location` each location has its own Gaussian, for objects that are always in the
same position: Defard et al., PaDiM (arXiv 2011.08785), with the shrinkage above instead of 0.01.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax.detectors.base import Method
from fastflow_jax.detectors.calibration import LocationScorer, finish_fit, load_scorer, read_fit
from fastflow_jax.detectors.fastflow.scorer import layers
from fastflow_jax.features.extract import (
    channel_moments,
    inside,
    location_moments,
    whitening,
    without_padding,
)
from fastflow_jax.state import Slot, State
from fastflow_jax.training.context import FitContext


def fit(context: FitContext) -> "GaussianScorer":
    """Estimates the Gaussians, and calibrates on the held-out images."""
    c, variables = context.config.gaussian, {}
    if c.per_location:
        rng = np.random.default_rng(context.seed)
        for i, (_, _, channels) in enumerate(context.train.shapes):
            chosen = rng.permutation(channels)[: c.channels]
            variables[f"channels_{i}"] = np.sort(chosen).astype(np.int32)
        moments = location_moments(context.train, list(variables.values()))
    else:
        moments = channel_moments(context.train.parts())
    for i, (mean, covariance) in enumerate(moments):
        variables[f"mean_{i}"] = mean.astype(np.float32)
        flat = covariance.reshape(-1, *covariance.shape[-2:])
        matrices = np.stack([whitening(each, c.shrinkage) for each in flat])
        variables[f"matrix_{i}"] = matrices.reshape(covariance.shape).astype(np.float32)
    return finish_fit(GaussianScorer, context, variables, maps=len(context.train.shapes))


def load(config, shapes, state: State) -> "GaussianScorer":
    """Rebuilds a scorer, see `Method.load`."""
    slots = {}
    for i, (*size, channels) in enumerate(shapes):
        if config.gaussian.per_location:
            channels = min(channels, config.gaussian.channels)
            slots[f"channels_{i}"] = Slot((channels,), np.int32)
        places = size if config.gaussian.per_location else ()
        slots[f"mean_{i}"] = Slot((*places, channels))
        slots[f"matrix_{i}"] = Slot((*places, channels, channels))
    return load_scorer(GaussianScorer, config, state, slots, maps=len(shapes))


def locate(config, variables, batch) -> tuple[jax.Array, ...]:
    """Squared norms of projected features over the number of channels, see `LocationScorer.locate`.

    The projection of a scale is (x - mean) @ matrix; both may depend on the location.
    """
    features, valid = batch
    maps = []
    for i, x in enumerate(features):
        mean, matrix = variables[f"mean_{i}"], variables[f"matrix_{i}"]
        if (chosen := variables.get(f"channels_{i}")) is not None:
            x = x[..., chosen]
        y = jnp.einsum("...c,...cd->...d", x.astype(jnp.float32) - mean, matrix)
        energy = jnp.sum(y**2, -1) / x.shape[-1]
        if valid is not None:
            energy = without_padding(energy, inside(valid, x.shape[1:3]))
        maps.append(energy)
    return tuple(maps)


@dataclasses.dataclass(frozen=True)
class GaussianScorer(LocationScorer):
    """Scores by Mahalanobis distances.

    `variables` hold the means and whitening matrices, and the channels if there are others.
    """

    locate = staticmethod(locate)


METHOD = Method(
    title="Gaussian",
    fit=fit,
    read=read_fit,
    load=load,
    layers=layers,
    fields={
        "gaussian": {
            "shrinkage": 0.5,  # part of the mean variance that is added to each direction
            "per_location": False,  # one Gaussian per location, instead of one per scale
            "channels": 100,  # of each scale, drawn at random, with one Gaussian per location
        }
    },
    reads=("gaussian", "map.standardise", "map.compress", "map.border", "score"),
    bounds={"gaussian.shrinkage": (1e-6, 100), "gaussian.channels": (1, 10**5)},
)
