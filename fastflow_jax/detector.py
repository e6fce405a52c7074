"""From a trained flow to scores and maps of images."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax import parallel
from fastflow_jax.backbones import Backbone
from fastflow_jax.features import Features, extractor
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

    def score(
        self, images: np.ndarray, valid: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images -> scores [B] and anomaly maps [B, H, W].

        Args:
          images: [B, H, W, 3], normalised, B up to the batch size of the configuration.
          valid: bool [B, H, W], False in padding; None without padding. What lies there counts
            for nothing.
        """
        return self.score_features(self._extract(images), valid, size=images.shape[1:3])

    def score_features(
        self,
        features: Features,
        valid: np.ndarray | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `score`, from the features of the images as `features.extractor` gives them.

        `size` is (H, W) of the images; None for that of the configuration.
        """
        run = self._programs(tuple(size or self.config.image_size))
        return run((self.variables, self.calibration), (features, valid))

    @functools.cached_property
    def _extract(self):
        c = self.config
        return extractor(self.backbone, c.length_power, c.parallel, c.train.batch_size)

    @functools.cached_property
    def _programs(self):
        """From the size of images to what scores their features."""

        def program(size):
            def score(state, batch):
                variables, calibration = state
                maps = _location_maps(self.config, self.model, variables, *batch)
                anomaly_map = fuse(maps, calibration, size)
                if self.config.score.form == "top_k":
                    return top_mean(anomaly_map, self.config.score.top_k), anomaly_map
                windows = window_maxima(fuse_finest(maps, calibration))
                windows = (windows - calibration.window_mean) / calibration.window_std
                return windows.mean(-1), anomaly_map

            return parallel.per_example(score, self.config.parallel, self.config.train.batch_size)

        return functools.cache(program)


def calibrate(
    config,
    model: FastFlow,
    variables: dict,
    holdout: Features | None,
    valid: np.ndarray | None = None,
) -> Calibration:
    """The calibration by held-out normal features; for `valid` see `FastFlowDetector.score`.

    Without held-out images, or where the configuration does not ask for it, a calibration that
    leaves scores as they are.
    """
    size = config.train.batch_size
    n = len(holdout[0]) if holdout is not None else 0

    def over_holdout(function):
        run = parallel.per_example(function, config.parallel, size)
        rows = [slice(i, i + size) for i in range(0, n, size)]
        parts = [
            run(variables, (tuple(m[r] for m in holdout), None if valid is None else valid[r]))
            for r in rows
        ]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    scales = len(config.layers)
    scale_mean, scale_std = np.zeros(scales, np.float32), np.ones(scales, np.float32)
    if n and config.map.standardise:
        maps = over_holdout(lambda v, batch: _location_maps(config, model, v, *batch))
        scale_mean = np.array([m.mean(dtype=np.float64) for m in maps], np.float32)
        scale_std = np.array([m.std(dtype=np.float64) or 1.0 for m in maps], np.float32)
    calibration = Calibration(scale_mean, scale_std, np.zeros(()), np.ones(()))
    if n and config.score.form == "windows":

        def windows_of(variables, batch):
            maps = _location_maps(config, model, variables, *batch)
            return window_maxima(fuse_finest(maps, calibration))

        windows = over_holdout(windows_of)
        # Few images may agree in one window by chance: no window counts ten times the others.
        spread = windows.std(0)
        spread = np.maximum(spread, 0.1 * spread.mean()) if spread.any() else np.ones_like(spread)
        calibration = calibration.replace(window_mean=windows.mean(0), window_std=spread)
    return calibration


def _location_maps(config, model, variables, features, valid) -> tuple[jax.Array, ...]:
    """Location scores [B, h, w] of each scale."""
    maps = tuple(
        location_scores(z, log_det, form=config.map.form, log_det_weight=config.map.log_det)
        for z, log_det in model.apply(variables, features)
    )
    return maps if valid is None else tuple(_without_padding(m, valid) for m in maps)


def _without_padding(scores: jax.Array, valid: jax.Array) -> jax.Array:
    """Location scores [B, h, w] in which padding has the mean of the rest of its image.

    So it adds nothing to a score, and nothing of it reaches the map around it. A location counts
    as padding where more than half of it is, by what of its image lies most inside.
    """
    share = jax.image.resize(valid.astype(scores.dtype), scores.shape, "linear")
    inside = share > 0.5 * share.max((1, 2), keepdims=True)
    return jnp.where(inside, scores, scores.mean((1, 2), where=inside, keepdims=True))


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
