"""Calibration on held-out images: from energies of locations to anomaly maps and image scores."""

import dataclasses
import functools
import json
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from fastflow_jax.detectors.base import CompiledScorer, compiled
from fastflow_jax.detectors.maps import (
    border_weights,
    resize_map,
    top_mean,
    where_counted,
    window_maxima,
)
from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import Features, in_batches, inside
from fastflow_jax.files import create_folder, read_arrays, to_plain, write_arrays
from fastflow_jax.state import Slot, State, check, flatten, unflatten
from fastflow_jax.training.context import FitContext

_FEW = 4  # held-out images; fewer do not give a standard deviation
# Of energies; held-out images that are copies of training images are in the bank.
_ROUNDING = 1e-5

Array = jax.Array | np.ndarray


class Calibration(flax.struct.PyTreeNode):
    """Statistics per map over held-out normal images, which make the maps comparable."""

    scale_mean: Array  # [maps], mean of energies
    scale_std: Array  # [maps], their standard deviation
    window_mean: Array  # [maps], mean of `maps.window_maxima` over images and sides
    peak_std: Array  # [maps], standard deviation of the highest energy of an image
    weight: Array  # [maps], of the map in the image score


_FIELDS = tuple(field.name for field in dataclasses.fields(Calibration))
_PREFIX = "calibration/"  # of their names in a state dict


def identity(weight: Array) -> Calibration:
    """A calibration that does not change scores, for maps of some weights [maps]."""
    zeros, ones = np.zeros(len(weight), np.float32), np.ones(len(weight), np.float32)
    return Calibration(zeros, ones, zeros, ones, weight)


def calibrate(
    locate: Callable,
    config,
    variables: Any,
    holdout: Features | None,
    valid: np.ndarray | None = None,
    *,
    weight: Array,
) -> Calibration:
    """Calibrates on features of held-out normal images.

    Args:
      locate: see `LocationScorer.locate`.
      config: filled.
      variables: of the detector.
      holdout: features [n, h, w, C] per scale; without images the calibration is the identity.
      valid: bool [n, H, W], False in pixels that do not count; None if all do.
      weight: float32 [maps], of each map of `locate` in the image score.
    """
    if holdout is None or not len(holdout[0]):
        return identity(weight)
    run = functools.partial(compiled(locate, FrozenConfigDict(config)), variables)
    maps = in_batches(run, (holdout, valid), config.batch_size)
    return calibrate_on(config, maps, weight, valid)


def calibrate_on(
    config, maps: tuple[np.ndarray, ...], weight: Array, valid: np.ndarray | None = None
) -> Calibration:
    """Calibrates on the `LocationScorer.location_maps` of held-out normal images.

    For the other arguments see `calibrate`.
    """
    calibration = identity(weight)
    if config.map.standardise:
        counted = [m if valid is None else m[np.asarray(inside(valid, m.shape[1:]))] for m in maps]
        spread = np.array([m.std(dtype=np.float64) for m in counted], np.float32)
        calibration = calibration.replace(
            scale_mean=np.array([m.mean(dtype=np.float64) for m in counted], np.float32),
            scale_std=np.where(spread > _ROUNDING, spread, np.float32(1)),
        )
    if config.score.form == "windows":
        run = compiled(_windows, FrozenConfigDict(config))
        windows = in_batches(functools.partial(run, ()), maps, config.batch_size)
        means = np.array([of_map.mean() for of_map in windows])
        peaks = np.array([of_map[:, 0].std() for of_map in windows]) / calibration.scale_std
        # Few images may agree by chance: the weight of a map is bounded.
        known = peaks.max() > _ROUNDING
        peaks = np.maximum(peaks, 0.1 * peaks.mean()) if known else np.ones_like(peaks)
        calibration = calibration.replace(window_mean=means, peak_std=peaks * calibration.scale_std)
    return calibration


def _windows(config, _, maps):
    """`window_maxima` of each map."""
    return tuple(window_maxima(m) for m in maps)


def fuse(
    maps: tuple[jax.Array, ...],
    calibration: Calibration,
    size: tuple[int, int],
    sigma: float = 0.0,
    compress: bool = False,
    border: int = 1,
    weights: Sequence[float] | None = None,
) -> jax.Array:
    """Weighted mean of the calibrated and resized maps, [B, h, w] each -> [B, *size].

    Features at the border of an image are less reliable, because backbones pad with zeros, and show
    what is next to the object more often than defects, so they can have less weight.

    Args:
      maps: see `LocationScorer.location_maps`.
      calibration: of these maps.
      size: (H, W) of the result.
      sigma: of the blur, see `maps.resize_map`.
      compress: takes the inverse hyperbolic sine of each value: typical values do not change, and
        outliers contribute their logarithm, so that no scale and no location dominates.
      border: side of the neighbourhood that determines the weights, see `maps.border_weights`.
      weights: of the maps; None for equal ones.
    """
    total = jnp.zeros(())
    weights = [1.0] * len(maps) if weights is None else weights
    moments = calibration.scale_mean, calibration.scale_std
    for m, mean, std, weight in zip(maps, *moments, weights, strict=True):
        m = (m - mean) / std
        m = jnp.arcsinh(m) if compress else m
        m *= border_weights((m.shape[1], m.shape[2]), border)
        total += weight * resize_map(m, size, sigma)
    return total / sum(weights)


def equal_weights(config, n: int) -> list[float]:
    """Equal weights of n maps, see `LocationScorer.map_weights`."""
    del config
    return [1.0] * n


def _score_maps(config, size, map_weights, calibration, batch):
    """Scores and anomaly maps from location maps, see `CalibratedScorer.score_maps`."""
    (maps, valid), c = batch, config.map
    weights = map_weights(config, len(maps))
    anomaly_map = fuse(maps, calibration, size, c.sigma, c.compress, c.border, weights)
    anomaly_map = where_counted(anomaly_map, valid)
    if config.score.form == "top_k":
        return top_mean(anomaly_map, config.score.top_k, valid), anomaly_map
    windows = _window_scores(config, calibration, maps)
    return jnp.average(windows, axis=-1, weights=calibration.weight), anomaly_map


def _window_scores(config, calibration, maps):
    """Calibrated mean of `window_maxima` of each map, [B, maps]."""
    del config
    windows = jnp.stack([window_maxima(m).mean(-1) for m in maps], axis=-1)
    return (windows - calibration.window_mean) / calibration.peak_std


def score_locations(
    config, size, state, batch, *, locate: Callable, map_weights: Callable = equal_weights
):
    """Scores [B] and anomaly maps [B, *size] of a batch, see `CompiledScorer.function`."""
    variables, calibration = state
    maps = locate(config, variables, batch)
    return _score_maps(config, size, map_weights, calibration, (maps, batch[1]))


@dataclasses.dataclass(frozen=True)
class LocationScorer(CompiledScorer):
    """Base of scorers that combine the calibrated energies of locations."""

    # (config, variables, (features, valid)) -> energies [B, h, w] of each map
    locate: ClassVar[Callable]
    # (config, number of maps) -> weight of each map in the anomaly map
    map_weights: ClassVar[Callable] = staticmethod(equal_weights)
    config: ConfigDict  # filled
    variables: Any  # tree of arrays
    calibration: Calibration

    def __init_subclass__(cls) -> None:
        parts = {"locate": cls.locate, "map_weights": cls.map_weights}
        cls.function = staticmethod(functools.partial(score_locations, **parts))

    def arrays(self) -> tuple[Any, Calibration]:
        """Variables and calibration."""
        return self.variables, self.calibration

    def state_dict(self) -> dict[str, np.ndarray]:
        """Variables by name, and the fields of the calibration as `calibration/<field>`."""
        return flatten({**self.variables, "calibration": dataclasses.asdict(self.calibration)})

    def location_maps(
        self, features: Features, valid: np.ndarray | None = None
    ) -> tuple[np.ndarray, ...]:
        """Energies [B, h, w] of each map.

        Scores and their calibration depend on features through these maps only.
        """
        return self._program(type(self).locate)(self._state[0], (features, valid))

    def score_maps(
        self, maps: tuple[np.ndarray, ...], valid: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and anomaly maps from location maps, see `CalibratedScorer.score_maps`."""
        run = self._program(_score_maps, tuple(self.config.image_size), type(self).map_weights)
        return run(self.calibration, (maps, valid))

    def recalibrated(self, maps: tuple[np.ndarray, ...], valid: np.ndarray | None = None) -> Self:
        """A copy with another calibration, see `CalibratedScorer.recalibrated`."""
        calibration = calibrate_on(self.config, maps, self.calibration.weight, valid)
        if len(maps[0]) < _FEW:  # too few for a standard deviation
            calibration = calibration.replace(peak_std=self.calibration.peak_std)
        return dataclasses.replace(self, calibration=calibration)

    def window_scores(self, maps: tuple[np.ndarray, ...]) -> np.ndarray:
        """Scores of each of the location maps, [B, maps].

        The image score is their mean with the weights of the calibration, if `config.score.form` is
        "windows".
        """
        run = functools.partial(self._program(_window_scores), self.calibration)
        return in_batches(run, maps, self.config.batch_size)

    def reweighted(self, weight: np.ndarray) -> Self:
        """A copy with other weights of the maps in the image score, float32 [maps]."""
        calibration = self.calibration.replace(weight=weight)
        return dataclasses.replace(self, calibration=calibration)


S = TypeVar("S", bound=LocationScorer)
_VARIABLES = "checkpoints/variables.npz"


def finish_fit(
    scorer: type[S], context: FitContext, variables: dict[str, np.ndarray], *, maps: int
) -> S:
    """Saves the variables of a detector without gradients, calibrates it, and returns its scorer.

    Args:
      scorer: class of the scorer.
      context: of the fit.
      variables: arrays of the detector, by name.
      maps: number of maps that `scorer.locate` returns.
    """
    config, file = context.config, context.directory / _VARIABLES
    create_folder(file.parent)
    write_arrays(file, variables)
    held_out = context.holdout, context.holdout_valid
    weight = np.ones(maps, np.float32)
    calibration = calibrate(scorer.locate, config, variables, *held_out, weight=weight)
    save_calibration(config, context.directory, calibration, {})
    return scorer(config, variables, calibration)


def save_again(scorer: LocationScorer, directory: pathlib.Path) -> None:
    """Saves the calibration of a scorer in the directory of its training, in place of another."""
    banks = scorer.variables.get("bank", {})
    save_calibration(scorer.config, directory, scorer.calibration, banks)


def read_fit(config, directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads what `finish_fit` has saved, see `Method.read`."""
    return read_arrays(directory / _VARIABLES) | read_calibration(config, directory)


def load_scorer(
    scorer: type[S], config, state: State, slots: Mapping[str, Slot], *, maps: int
) -> S:
    """Rebuilds a scorer from its state dict, see `Method.load`.

    Args:
      scorer: class of the scorer.
      config: filled.
      state: see `LocationScorer.state_dict`.
      slots: of the variables.
      maps: number of maps that `scorer.locate` returns.
    """
    check(state, {**slots, **{f"{_PREFIX}{name}": Slot((maps,)) for name in _FIELDS}})
    variables = unflatten(state)
    return scorer(config, variables, Calibration(**variables.pop("calibration")))


def save_calibration(
    config, directory: pathlib.Path, calibration: Calibration, banks: dict[str, np.ndarray]
) -> None:
    """Saves a calibration with the memory banks, which depend on the same settings."""
    write_arrays(_file(config, directory), dataclasses.asdict(calibration) | banks)


def read_calibration(config, directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads what `save_calibration` has saved, as part of a state dict.

    Raises:
      InputError: the file is missing, damaged or of another version.
    """
    file = _file(config, directory)
    arrays = read_arrays(file) if file.exists() else {}
    # Earlier versions had equal weights only.
    arrays.setdefault("weight", np.ones_like(arrays.get("peak_std", ())))
    if not arrays.keys() >= set(_FIELDS):
        raise InputError(
            f"{file} is missing, or was written by another version of this package. Train again."
        )
    return {f"{_PREFIX if n in _FIELDS else 'bank/'}{n}": x for n, x in arrays.items()}


_WEIGHTS = ("border", "coarse_weight", "feature_weight")  # they do not affect a calibration


def _file(config, directory: pathlib.Path) -> pathlib.Path:
    """File of a calibration, whose name depends on its settings.

    Runs that share a training may differ in these settings.
    """
    fields = {name: value for name, value in to_plain(config.map).items() if name not in _WEIGHTS}
    settings = json.dumps([fields, to_plain(config.score)])
    return directory / f"calibration_{zlib.crc32(settings.encode()):08x}.npz"
