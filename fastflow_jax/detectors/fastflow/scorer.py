"""The FastFlow detector: trains the flows, calibrates them, and scores features."""

import dataclasses
import functools
import json
import pathlib
import zlib
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from fastflow_jax import parallel
from fastflow_jax.detectors.fastflow import bank
from fastflow_jax.detectors.fastflow.model import (
    FastFlow,
    invert,
    location_scores,
    negative_log_likelihood,
    random_windows,
    resize_map,
    top_mean,
    window_maxima,
)
from fastflow_jax.detectors.pickling import PickledByFields
from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import (
    Features,
    TrainingFeatures,
    in_batches,
    inside,
    without_padding,
)
from fastflow_jax.files import read_arrays, to_plain, write_arrays
from fastflow_jax.training.loop import train_in, trained_in
from fastflow_jax.training.step import Objective

_FEW = 4  # held-out images; fewer are too few for a spread
# Of scores per channel; held-out images that are copies of training images lie in the bank.
_ROUNDING = 1e-5


def fit(
    config,
    features: TrainingFeatures,
    holdout: Features | None,
    holdout_valid: np.ndarray | None = None,
    *,
    seed: int,
    folder: pathlib.Path,
    beside: Sequence[tuple[int, pathlib.Path]] = (),
    on_epoch: Callable[[int, Callable[[], "FastFlowScorer"]], dict] = lambda epoch, scorer: {},
    progress: str = "train",
) -> "FastFlowScorer":
    """Train to the end of the configuration, or what is left of it, and calibrate.

    Args:
      config: filled, see `config.fill`.
      features: of the training images.
      holdout: features of held-out normal images, for the calibration; None without.
      holdout_valid: bool [N, H, W], False in their padding; None without padding.
      seed: of parameters, permutations and order.
      folder: holds `checkpoints/`, `metrics.jsonl` and the calibration; training goes on from the
        latest checkpoint.
      beside: seeds and folders of trainings that differ in nothing else; where it saves time they
        are trained along and, in their own turn, found finished: see `loop.train_in`.
      on_epoch: called after each epoch of each training with its number, from 1 on, and a function
        that makes a scorer of that epoch; what it returns goes into the epoch's line in
        `metrics.jsonl`.
      progress: label of the progress bar.

    Raises:
      Interrupted, InputError: see `loop.train`.
    """
    model = flow_model(config)

    def scorer(variables: dict, seed: int) -> FastFlowScorer:
        variables = with_banks(config, model, variables, features, seed)
        calibration = calibrate(config, model, variables, holdout, holdout_valid)
        return FastFlowScorer(config, model, variables, calibration)

    variables = train_in(
        folder,
        config,
        objective(config, model, features.statistics(config.flow.norm)),
        features,
        holdout,
        holdout_valid,
        seed=seed,
        beside=beside,
        on_epoch=lambda epoch, variables, seed: on_epoch(epoch, lambda: scorer(variables, seed)),
        progress=progress,
    )
    trained = scorer(variables, seed)
    arrays = dataclasses.asdict(trained.calibration) | trained.variables.get("bank", {})
    write_arrays(_calibration_file(config, folder), arrays)
    return trained


def load(config, shapes, folder: pathlib.Path) -> "FastFlowScorer":
    """The scorer that `fit` left in a folder.

    Args:
      config: that it was trained with.
      shapes: (h, w, C) of each scale.
      folder: that `fit` was given.

    Raises:
      InputError: it has no calibration for this configuration.
    """
    file = _calibration_file(config, folder)
    arrays = read_arrays(file) if file.exists() else {}
    names = [field.name for field in dataclasses.fields(Calibration)]
    if not arrays.keys() >= set(names):
        raise InputError(f"{file} is missing, or of another version of this package: train it anew")
    model = flow_model(config)
    variables = trained_in(folder, config, objective(config, model, None), shapes)
    calibration = Calibration(**{name: arrays.pop(name) for name in names})
    if arrays:
        variables = variables | {"bank": arrays}
    return FastFlowScorer(config, model, variables, calibration)


def with_banks(config, model, variables, features: TrainingFeatures, seed: int) -> dict:
    """Variables of the flows with the collection "bank": what `bank.draw` gives, one a scale."""
    if not config.map.bank:
        return variables
    run = _compiled(_entries, FrozenConfigDict(config), model)
    size = config.batch_size
    banks = bank.draw(lambda *batch: run(variables, batch), features, config.map.bank, size, seed)
    return variables | {"bank": {f"bank_{i}": rows for i, rows in enumerate(banks)}}


def _calibration_file(config, folder: pathlib.Path) -> pathlib.Path:
    """Runs that share a training may differ in what the calibration hangs on: each has its own."""
    settings = json.dumps([to_plain(config.map), to_plain(config.score)])
    return folder / f"calibration_{zlib.crc32(settings.encode()):08x}.npz"


def flow_model(config) -> FastFlow:
    """The flows of a filled configuration."""
    fields = config.flow.to_dict()
    fields["kernels"], fields["dtype"] = tuple(fields["kernels"]), jnp.dtype(fields["dtype"])
    fields["out_kernel"] = fields["out_kernel"] or None
    return FastFlow(**fields)


def objective(config, model: FastFlow, statistics: dict | None) -> Objective:
    """The negative log-likelihood, as `config.train.loss` has it.

    Args:
      config: filled.
      model: the flows.
      statistics: see `extract.channel_statistics`; None leaves those of a fresh model, for a
        template.
    """
    per_dimension = config.train.loss == "per_dimension"
    fresh, loss, validation = _functions(model, per_dimension, config.train.window)

    def init(key, features):
        variables = dict(fresh(key, features))
        if statistics:
            variables["statistics"] = statistics
        return variables

    return Objective(init, loss, validation)


# Kept by what they hang on, so that what is compiled of them serves every seed of a run.
_kept = functools.lru_cache(maxsize=8)


@_kept
def _functions(
    model: FastFlow, per_dimension: bool, window: int
) -> tuple[Callable, Callable, Callable]:
    """Fresh variables, and the functions of an `Objective`."""

    def loss(variables, features, valid, keys):
        def cut(scale, x):
            own = jax.vmap(functools.partial(jax.random.fold_in, data=scale))(keys)
            return random_windows(x, window, own) if window else x

        return _nll(model, variables, features, valid, per_dimension, cut)

    def validation(variables, features, valid):
        return _nll(model, variables, features, valid, True)

    return jax.jit(model.init), loss, validation


def _nll(model, variables, features, valid, per_dimension, cut=lambda scale, x: x) -> jax.Array:
    """Of images [B], without their padding; see `model.negative_log_likelihood`."""
    masks = None
    if valid is not None:
        seen = (inside(valid, m.shape[1:3])[..., None] for m in features)
        masks = [cut(i, m)[..., 0] for i, m in enumerate(seen)]
    latents = model.apply(variables, features, cut)
    return negative_log_likelihood(latents, per_dimension=per_dimension, inside=masks)


@flax.struct.dataclass
class Calibration:
    """What normal images that the flow has not seen look like to it.

    Maps differ in how far their scores spread; in units of the spread over held-out normal images
    they compare.
    """

    scale_mean: jax.Array  # [maps], of location scores
    scale_std: jax.Array
    window_mean: jax.Array  # [maps], of each image's `model.window_maxima`, all sides together
    peak_std: jax.Array  # [maps], of each image's highest location


@dataclasses.dataclass(frozen=True)
class FastFlowScorer(PickledByFields):
    """Scores features; higher is more anomalous."""

    config: object  # filled, see `config.fill`
    model: FastFlow
    variables: dict  # of the flows, and the "bank" if there is one
    calibration: Calibration

    def score_features(
        self,
        features: Features,
        valid: np.ndarray | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features of images -> scores [B] and anomaly maps [B, H, W].

        Args:
          features: [B, h, w, C] a scale, as `extract.extractor` gives them, B up to the batch size
            of the configuration.
          valid: bool [B, H, W], False in padding; None without padding. What lies there counts
            for nothing.
          size: (H, W) of the maps; None for the input size of the configuration.
        """
        run = self._programs(_score, tuple(size or self.config.image_size))
        return run(self._state, (features, valid))

    def predict_features(
        self,
        features: Features,
        valid: np.ndarray | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`score_features`, and log p of each image's features in nats per dimension, [B]."""
        run = self._programs(_predict, tuple(size or self.config.image_size))
        return run(self._state, (features, valid))

    def latents(self, features: Features) -> tuple[np.ndarray, ...]:
        """The z of features, [B, h, w, C] a scale as they are; standard normal under the model."""
        return self._programs(_latents)(self._state[0], (features,))

    def invert(self, latents: Features) -> tuple[np.ndarray, ...]:
        """The flow backwards: the features whose `latents` these are.

        Raises:
          InputError: the features went through a norm of each image, which keeps no way back.
        """
        return self._programs(_invert)(self._state[0], (latents,))

    def location_maps(
        self, features: Features, valid: np.ndarray | None = None
    ) -> tuple[np.ndarray, ...]:
        """Location scores [B, h, w], all that scores and their calibration come from.

        One map a scale, each followed by that of its bank where there are banks.
        """
        return self._programs(_location_maps)(self._state[0], (features, valid))

    def score_maps(self, maps: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
        """`score_features` of features with these `location_maps`."""
        run = self._programs(_score_maps, tuple(self.config.image_size))
        return run(self.calibration, maps)

    def recalibrated(self, maps: tuple[np.ndarray, ...]) -> "FastFlowScorer":
        """The same flows, calibrated by other held-out normal images with these `location_maps`."""
        calibration = calibrate_on(self.config, maps)
        if len(maps[0]) < _FEW:  # their spread is chance, and new images are in units of another
            calibration = calibration.replace(peak_std=self.calibration.peak_std)
        return dataclasses.replace(self, calibration=calibration)

    @functools.cached_property
    def _state(self) -> tuple[dict, Calibration]:
        """Where it is computed with: to send it there takes longer than to score an image."""
        return parallel.on_devices((self.variables, self.calibration))

    @functools.cached_property
    def _programs(self):
        """From a function, and the size of images, to what runs it on their features."""
        config, model = FrozenConfigDict(self.config), self.model
        return functools.cache(lambda function, *size: _compiled(function, config, model, *size))


@_kept
def _compiled(function: Callable, config: FrozenConfigDict, *arguments) -> Callable:
    """`function(config, *arguments, state, batch)` of a state and a batch, compiled once."""
    bound = functools.partial(function, config, *arguments)
    return parallel.per_example(bound, config.parallel, config.batch_size)


def _score(config, model, size, state, batch):
    """See `FastFlowScorer.score_features`."""
    variables, calibration = state
    return _score_maps(
        config, model, size, calibration, _location_maps(config, model, variables, batch)
    )


def _score_maps(config, model, size, calibration, maps):
    """See `FastFlowScorer.score_maps`."""
    anomaly_map = fuse(maps, calibration, size, config.map.sigma, config.map.compress)
    if config.score.form == "top_k":
        return top_mean(anomaly_map, config.score.top_k), anomaly_map
    windows = jnp.stack([window_maxima(m).mean(-1) for m in maps], axis=-1)  # [B, maps]
    return ((windows - calibration.window_mean) / calibration.peak_std).mean(-1), anomaly_map


def _predict(config, model, size, state, batch):
    """See `FastFlowScorer.predict_features`; the compiler runs the flows once for both."""
    return *_score(config, model, size, state, batch), -_nll(model, state[0], *batch, True)


def _latents(config, model, variables, batch):
    return tuple(z for z, _ in model.apply(variables, batch[0]))


def _entries(config, model, variables, batch):
    """What banks are drawn from."""
    features, valid = batch
    latents = model.apply(variables, features)
    return tuple(bank.entries(z, _seen(valid, log_det)) for z, log_det in latents)


def _invert(config, model, variables, batch):
    return invert(model, variables, batch[0])


def calibrate(
    config,
    model: FastFlow,
    variables: dict,
    holdout: Features | None,
    valid: np.ndarray | None = None,
) -> Calibration:
    """The calibration by held-out normal features; for `valid` see `FastFlowScorer`.

    Without held-out images, or where the configuration does not ask for it, a calibration that
    leaves scores as they are.
    """
    if holdout is None or not len(holdout[0]):
        return _calibration(len(config.layers) + len(variables.get("bank", ())))
    run = _compiled(_location_maps, FrozenConfigDict(config), model)
    maps_of = functools.partial(run, variables)
    return calibrate_on(config, in_batches(maps_of, (holdout, valid), config.batch_size))


def calibrate_on(config, maps: tuple[np.ndarray, ...]) -> Calibration:
    """`calibrate` by the `FastFlowScorer.location_maps` of held-out normal images."""
    calibration = _calibration(len(maps))
    if config.map.standardise:
        spread = np.array([m.std(dtype=np.float64) for m in maps], np.float32)
        calibration = calibration.replace(
            scale_mean=np.array([m.mean(dtype=np.float64) for m in maps], np.float32),
            scale_std=np.where(spread > _ROUNDING, spread, np.float32(1)),
        )
    if config.score.form == "windows":
        run = _compiled(_windows, FrozenConfigDict(config), None)
        windows = in_batches(functools.partial(run, ()), maps, config.batch_size)
        means = np.array([of_map.mean() for of_map in windows])
        peaks = np.array([of_map[:, 0].std() for of_map in windows]) / calibration.scale_std
        # Few images may agree by chance: no map counts ten times the others.
        known = peaks.max() > _ROUNDING
        peaks = np.maximum(peaks, 0.1 * peaks.mean()) if known else np.ones_like(peaks)
        calibration = calibration.replace(window_mean=means, peak_std=peaks * calibration.scale_std)
    return calibration


def _calibration(maps: int) -> Calibration:
    """One that leaves scores as they are."""
    zeros, ones = np.zeros(maps, np.float32), np.ones(maps, np.float32)
    return Calibration(zeros, ones, zeros, ones)


def _windows(config, model, state, maps):
    """`window_maxima` of each map."""
    return tuple(window_maxima(m) for m in maps)


def _location_maps(config, model, variables, batch) -> tuple[jax.Array, ...]:
    """See `FastFlowScorer.location_maps`."""
    features, valid = batch
    maps, banks = [], variables.get("bank", {})
    for i, (z, log_det) in enumerate(model.apply(variables, features)):
        seen = _seen(valid, log_det)
        score = functools.partial(location_scores, z, log_det, form=config.map.form)
        found = [score(log_det_weight=config.map.log_det)]
        if banks:
            squares = bank.squared_distances(bank.entries(z, seen), banks[f"bank_{i}"])
            # The flow has no determinant for a mean over places.
            found.append(score(log_det_weight=0.0, squares=squares))
        maps += found if seen is None else [without_padding(each, seen) for each in found]
    return tuple(maps)


def _seen(valid: jax.Array | None, scores: jax.Array) -> jax.Array | None:
    """`extract.inside` for location scores [B, h, w]; None without padding."""
    return None if valid is None else inside(valid, scores.shape[1:])


def fuse(
    maps: tuple[jax.Array, ...],
    calibration: Calibration,
    size: tuple[int, int],
    sigma: float = 0.0,
    compress: bool = False,
) -> jax.Array:
    """Mean over the maps, each in its calibrated units, [B, h, w] each -> [B, *size].

    Args:
      maps: see `FastFlowScorer.location_maps`.
      calibration: of these maps.
      size: (H, W) of the result.
      sigma: see `model.resize_map`.
      compress: take the inverse hyperbolic sine of each: what is ordinary stays as it is, what is
        far out counts by its logarithm, so that one scale does not drown the others there, nor a
        place its neighbours.
    """
    standard = [
        (m - mean) / std
        for m, mean, std in zip(maps, calibration.scale_mean, calibration.scale_std, strict=True)
    ]
    standard = [resize_map(jnp.arcsinh(m) if compress else m, size, sigma) for m in standard]
    return sum(standard) / len(standard)
