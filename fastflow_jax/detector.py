"""From a trained flow to scores and maps of images."""

import dataclasses
import functools
from functools import partial

import flax.struct
import jax
import numpy as np

from fastflow_jax import parallel
from fastflow_jax.backbones import Backbone
from fastflow_jax.features import Features, maps_of
from fastflow_jax.model import FastFlow, location_scores, resize_map, top_mean, window_maxima


@flax.struct.dataclass
class Calibration:
    """What normal images that the flow has not seen look like to it.

    Scales differ in how far their scores spread, and so do averages over windows of different
    size; in units of the spread over held-out normal images they compare.
    """

    scale_mean: jax.Array  # [scales], of location scores
    scale_std: jax.Array
    window_mean: jax.Array  # [windows], of each image's highest average over a window
    window_std: jax.Array


@dataclasses.dataclass(frozen=True)
class FastFlowDetector:
    """Scores images; higher is more anomalous."""

    config: object  # filled, see `config.fill`
    backbone: Backbone
    model: FastFlow
    variables: dict  # of the flows
    calibration: Calibration

    def score(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images [B, H, W, 3], normalised -> scores [B] and anomaly maps [B, H, W]."""
        state = (self.backbone.variables, self.variables, self.calibration)
        return self._run(state, images)

    @functools.cached_property
    def _run(self):
        def score(state, images):
            backbone_variables, variables, calibration = state
            features = maps_of(self.backbone, self.config.length_power)(backbone_variables, images)
            maps = _location_maps(self.config, self.model, variables, features)
            anomaly_map = fuse(maps, calibration, images.shape[1:3])
            if self.config.score.form == "top_k":
                return top_mean(anomaly_map, self.config.score.top_k), anomaly_map
            windows = window_maxima(fuse_finest(maps, calibration))
            windows = (windows - calibration.window_mean) / calibration.window_std
            return windows.mean(-1), anomaly_map

        return parallel.per_example(score, self.config.parallel, self.config.train.batch_size)


def calibrate(config, model: FastFlow, variables: dict, holdout: Features | None) -> Calibration:
    """The calibration by held-out normal features.

    Without held-out images, or where the configuration does not ask for it, a calibration that
    leaves scores as they are.
    """
    size = config.train.batch_size
    n = len(holdout[0]) if holdout is not None else 0

    def over_holdout(function):
        run = parallel.per_example(function, config.parallel, size)
        parts = [
            run(variables, tuple(maps[i : i + size] for maps in holdout)) for i in range(0, n, size)
        ]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    scales = len(config.layers)
    scale_mean, scale_std = np.zeros(scales, np.float32), np.ones(scales, np.float32)
    if n and config.map.standardise:
        maps = over_holdout(partial(_location_maps, config, model))
        scale_mean = np.array([m.mean(dtype=np.float64) for m in maps], np.float32)
        scale_std = np.array([m.std(dtype=np.float64) or 1.0 for m in maps], np.float32)
    calibration = Calibration(scale_mean, scale_std, np.zeros(()), np.ones(()))
    if n and config.score.form == "windows":

        def windows_of(variables, features):
            maps = _location_maps(config, model, variables, features)
            return window_maxima(fuse_finest(maps, calibration))

        windows = over_holdout(windows_of)
        # Few images may agree in one window by chance: no window counts ten times the others.
        spread = windows.std(0)
        spread = np.maximum(spread, 0.1 * spread.mean()) if spread.any() else np.ones_like(spread)
        calibration = calibration.replace(window_mean=windows.mean(0), window_std=spread)
    return calibration


def _location_maps(config, model, variables, features) -> tuple[jax.Array, ...]:
    """Location scores [B, h, w] of each scale."""
    return tuple(
        location_scores(z, log_det, form=config.map.form, log_det_weight=config.map.log_det)
        for z, log_det in model.apply(variables, features)
    )


def fuse(maps: tuple[jax.Array, ...], calibration: Calibration, size: tuple[int, int]) -> jax.Array:
    """Mean over the scales, each in its calibrated units, [B, h, w] a scale -> [B, *size]."""
    standard = [
        resize_map((m - mean) / std, size)
        for m, mean, std in zip(maps, calibration.scale_mean, calibration.scale_std, strict=True)
    ]
    return sum(standard) / len(standard)


def fuse_finest(maps: tuple[jax.Array, ...], calibration: Calibration) -> jax.Array:
    """`fuse` at the resolution of the finest scale."""
    return fuse(maps, calibration, max(m.shape[1:] for m in maps))
