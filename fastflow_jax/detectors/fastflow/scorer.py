"""The FastFlow detector: trains the flows, calibrates them, and scores features."""

import dataclasses
import functools
import json
import pathlib
import zlib
from collections.abc import Callable, Hashable
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from fastflow_jax import parallel
from fastflow_jax.detectors.base import CompiledScorer, Method, compiled
from fastflow_jax.detectors.fastflow import bank
from fastflow_jax.detectors.fastflow.model import (
    NORMS,
    FastFlow,
    Latents,
    invert,
    location_energies,
    negative_log_likelihood,
    random_windows,
)
from fastflow_jax.detectors.maps import resize_map, top_mean, window_maxima
from fastflow_jax.detectors.nearest import nearest_squared_distances
from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import (
    Features,
    TrainingFeatures,
    in_batches,
    inside,
    without_padding,
)
from fastflow_jax.files import read_arrays, to_plain, write_arrays
from fastflow_jax.flows import Flow
from fastflow_jax.flows.chain import is_double
from fastflow_jax.flows.coupling import half_channels
from fastflow_jax.training.context import FitContext
from fastflow_jax.training.loop import READS, load_variables, train_variables
from fastflow_jax.training.step import Objective

Array = jax.Array | np.ndarray

_FEW = 4  # held-out images; fewer do not give a standard deviation
# Of energies; held-out images that are copies of training images are in the bank.
_ROUNDING = 1e-5


def layers(config: ConfigDict, spec: Any) -> tuple[str, ...]:
    """The deepest map of stride 8, the two deepest of 16 and the first of 32, if available.

    Of a backbone with a single stride, such as a transformer, the published map and the one before
    it. With `config.published` the published maps.
    """
    if config.published:
        return spec.layers

    def of(stride: int) -> list[str]:
        return [name for name, (_, s) in spec.maps.items() if s == stride]

    if of(16) and of(32):
        return (*of(8)[-1:], *of(16)[-2:], of(32)[0])
    names = list(spec.maps)
    end = names.index(spec.layers[0]) + 1
    return tuple(names[max(0, end - 2) : end])


def fill(config: ConfigDict, spec: Any) -> None:
    """Sets the flow's fields that depend on the backbone; see `Method.fill`."""
    flow = spec.flow if config.published else _recipe(spec, config.layers)
    for field, value in flow.items():
        if config.flow[field] is None:
            config.flow[field] = value
    if not config.flow.kernels or not all(k in (1, 3, 5, 7) for k in config.flow.kernels):
        raise InputError(
            f"config.flow.kernels must be of 1, 3, 5 and 7, not {config.flow.kernels}."
        )
    if config.flow.out_kernel not in (0, 1, 3, 5, 7):
        raise InputError(
            f"config.flow.out_kernel must be 0, 1, 3, 5 or 7, not {config.flow.out_kernel}."
        )
    if config.detector != "fastflow":
        return
    channels = min(spec.maps[layer][0] for layer in config.layers)
    passive, _ = half_channels(channels, swap=is_double(config.flow.coupling))
    if passive * config.flow.hidden_ratio < 1:
        raise InputError(
            f"config.flow.hidden_ratio must be at least 1/{passive} with "
            f"{', '.join(config.layers)}, not {config.flow.hidden_ratio}: a subnet needs a hidden "
            "channel."
        )


def _recipe(spec: Any, layers: tuple[str, ...]) -> dict[str, Any]:
    """Fields of the flow that the default recipe derives from a backbone.

    The work of a convolution grows with its input and output channels: if the widest map has more
    channels than EfficientNet-Lite0's 192, the ratio of hidden channels falls with the square, down
    to the paper's 0.16.
    """
    widest = max(spec.maps[layer][0] for layer in layers)
    ratio = 2.0 * min(1.0, 192 / widest) ** 2
    return {"norm": "whiten", "steps": 4, "kernels": (3,), "hidden_ratio": max(ratio, 0.16)}


def fit(context: FitContext) -> "FastFlowScorer":
    """Trains the flows, draws the banks, and calibrates on the held-out images.

    Training continues from the latest checkpoint. For errors see `loop.train`.
    """
    config = context.config

    def scorer(variables: dict, seed: int) -> FastFlowScorer:
        variables = with_banks(config, variables, context.train, seed)
        calibration = calibrate(config, variables, context.holdout, context.holdout_valid)
        return FastFlowScorer(config, variables, calibration)

    nll = objective(config, context.train.statistics(config.flow.norm))
    trained = scorer(train_variables(context, nll, scorer), context.seed)
    arrays = dataclasses.asdict(trained.calibration) | trained.variables.get("bank", {})
    write_arrays(_calibration_file(config, context.directory), arrays)
    return trained


def load(config, shapes, directory: pathlib.Path) -> "FastFlowScorer":
    """Loads the scorer that `fit` has saved, see `Method.load`."""
    file = _calibration_file(config, directory)
    arrays = read_arrays(file) if file.exists() else {}
    names = [field.name for field in dataclasses.fields(Calibration)]
    if not arrays.keys() >= set(names):
        raise InputError(
            f"{file} is missing, or was written by another version of this package. Train again."
        )
    variables = load_variables(directory, config, objective(config), shapes)
    calibration = Calibration(**{name: arrays.pop(name) for name in names})
    if arrays:
        variables = variables | {"bank": arrays}
    return FastFlowScorer(config, variables, calibration)


def with_banks(config, variables, features: TrainingFeatures, seed: int) -> dict:
    """Adds the collection "bank" to the variables of the flows: a bank per scale."""
    if not config.map.bank:
        return variables
    run = compiled(_entries, FrozenConfigDict(config))
    size = config.batch_size
    banks = bank.draw(lambda *batch: run(variables, batch), features, config.map.bank, size, seed)
    return variables | {"bank": {f"bank_{i}": rows for i, rows in enumerate(banks)}}


def _calibration_file(config, directory: pathlib.Path) -> pathlib.Path:
    """File of the calibration, whose name depends on the settings of the calibration.

    Runs that share a training may differ in these settings.
    """
    settings = json.dumps([to_plain(config.map), to_plain(config.score)])
    return directory / f"calibration_{zlib.crc32(settings.encode()):08x}.npz"


def flow_model(config) -> FastFlow:
    """The flows of a filled configuration."""
    fields = config.flow.to_dict()
    fields["kernels"], fields["dtype"] = tuple(fields["kernels"]), jnp.dtype(fields["dtype"])
    fields["out_kernel"] = fields["out_kernel"] or None
    norm = fields.pop("norm")
    return FastFlow(Flow(**fields), norm)


def objective(config, statistics: dict | None = None) -> Objective:
    """The negative log-likelihood in the form of `config.train.loss`.

    Args:
      config: filled.
      statistics: see `extract.channel_statistics`; None for a template.
    """
    per_dimension = config.train.loss == "per_dimension"
    model = cast(Hashable, flow_model(config))  # as Flax modules are
    fresh, loss, validation = _functions(model, per_dimension, config.train.window)

    def init(key, features):
        variables = dict(fresh(key, features))
        if statistics:
            variables["statistics"] = statistics
        return variables

    return Objective(init, loss, validation)


# Cached, so that all seeds of a run share the compiled programs.
@parallel.cached_program
def _functions(
    model: FastFlow, per_dimension: bool, window: int
) -> tuple[Callable, Callable, Callable]:
    """The functions of an `Objective`."""

    def loss(variables, features, valid, keys):
        def cut(scale, x):
            own = jax.vmap(functools.partial(jax.random.fold_in, data=scale))(keys)
            return random_windows(x, window, own) if window else x

        return _nll(model, variables, features, valid, per_dimension, cut)

    def validation(variables, features, valid):
        return _nll(model, variables, features, valid, True)

    return jax.jit(model.init), loss, validation


def _nll(model, variables, features, valid, per_dimension, cut=lambda scale, x: x) -> jax.Array:
    """`model.negative_log_likelihood` of images without their padding, [B]."""
    masks = None
    if valid is not None:
        seen = (inside(valid, m.shape[1:3])[..., None] for m in features)
        masks = [cut(i, m)[..., 0] for i, m in enumerate(seen)]
    latents = cast(Latents, model.apply(variables, features, cut))
    return negative_log_likelihood(latents, per_dimension=per_dimension, inside=masks)


class Calibration(flax.struct.PyTreeNode):
    """Statistics per map over held-out normal images, which make the maps comparable."""

    scale_mean: Array  # [maps], mean of energies
    scale_std: Array  # [maps], their standard deviation
    window_mean: Array  # [maps], mean of `maps.window_maxima` over images and sides
    peak_std: Array  # [maps], standard deviation of the highest energy of an image


def _score(config, size, state, batch):
    """Scores [B] and anomaly maps [B, *size] of a batch, see `CompiledScorer.function`."""
    return _score_maps(config, size, state[1], _location_maps(config, state, batch))


def _score_maps(config, size, calibration, maps):
    """Scores and anomaly maps from location maps, see `CalibratedScorer.score_maps`."""
    anomaly_map = fuse(maps, calibration, size, config.map.sigma, config.map.compress)
    if config.score.form == "top_k":
        return top_mean(anomaly_map, config.score.top_k), anomaly_map
    windows = jnp.stack([window_maxima(m).mean(-1) for m in maps], axis=-1)  # [B, maps]
    return ((windows - calibration.window_mean) / calibration.peak_std).mean(-1), anomaly_map


def _score_with_likelihood(config, size, state, batch):
    """Scores, maps and log-likelihoods of a batch; the compiler runs the flows once."""
    features, valid = batch
    nll = _nll(flow_model(config), state[0], features, valid, True)
    return *_score(config, size, state, batch), -nll


def _latents(config, state, batch):
    return tuple(z for z, _ in _apply(config, state[0], batch[0]))


def _apply(config, variables, features) -> Latents:
    """Latents and log-determinants of features."""
    return cast(Latents, flow_model(config).apply(variables, features))


def _entries(config, variables, batch):
    """The entries that banks are drawn from, [B, h, w, C] per scale."""
    features, valid = batch
    latents = _apply(config, variables, features)
    return tuple(bank.entries(z, _seen(valid, log_det)) for z, log_det in latents)


def _invert(config, state, batch):
    return invert(flow_model(config), state[0], batch[0])


def calibrate(
    config,
    variables: dict,
    holdout: Features | None,
    valid: np.ndarray | None = None,
) -> Calibration:
    """Calibrates on features of held-out normal images.

    Without held-out images, or if the configuration does not ask for it, the calibration is the
    identity.
    """
    if holdout is None or not len(holdout[0]):
        return _calibration(len(config.layers) + len(variables.get("bank", ())))
    run = compiled(_location_maps, FrozenConfigDict(config))
    maps_of = functools.partial(run, (variables, None))
    return calibrate_on(config, in_batches(maps_of, (holdout, valid), config.batch_size))


def calibrate_on(config, maps: tuple[np.ndarray, ...]) -> Calibration:
    """Calibrates on the `FastFlowScorer.location_maps` of held-out normal images."""
    calibration = _calibration(len(maps))
    if config.map.standardise:
        spread = np.array([m.std(dtype=np.float64) for m in maps], np.float32)
        calibration = calibration.replace(
            scale_mean=np.array([m.mean(dtype=np.float64) for m in maps], np.float32),
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


def _calibration(maps: int) -> Calibration:
    """A calibration that does not change scores."""
    zeros, ones = np.zeros(maps, np.float32), np.ones(maps, np.float32)
    return Calibration(zeros, ones, zeros, ones)


def _windows(config, _, maps):
    """`window_maxima` of each map."""
    return tuple(window_maxima(m) for m in maps)


def _location_maps(config, state, batch) -> tuple[jax.Array, ...]:
    """Energies per location of a batch, see `FastFlowScorer.location_maps`."""
    variables, (features, valid) = state[0], batch
    maps, banks = [], variables.get("bank", {})
    for i, (z, log_det) in enumerate(_apply(config, variables, features)):
        seen = _seen(valid, log_det)
        score = functools.partial(location_energies, z, log_det, form=config.map.form)
        found = [score(log_det_weight=config.map.log_det)]
        if banks:
            squares = nearest_squared_distances(bank.entries(z, seen), banks[f"bank_{i}"])
            # A mean over locations has no log-determinant.
            found.append(score(log_det_weight=0.0, squares=squares))
        maps += found if seen is None else [without_padding(each, seen) for each in found]
    return tuple(maps)


def _seen(valid: jax.Array | None, scores: jax.Array) -> jax.Array | None:
    """`extract.inside` for energies [B, h, w]; None without padding."""
    return None if valid is None else inside(valid, scores.shape[1:])


def fuse(
    maps: tuple[jax.Array, ...],
    calibration: Calibration,
    size: tuple[int, int],
    sigma: float = 0.0,
    compress: bool = False,
) -> jax.Array:
    """Mean of the calibrated and resized maps, [B, h, w] each -> [B, *size].

    Args:
      maps: see `FastFlowScorer.location_maps`.
      calibration: of these maps.
      size: (H, W) of the result.
      sigma: of the blur, see `maps.resize_map`.
      compress: takes the inverse hyperbolic sine of each value: typical values do not change, and
        outliers contribute their logarithm, so that no scale and no location dominates.
    """
    standard = [
        (m - mean) / std
        for m, mean, std in zip(maps, calibration.scale_mean, calibration.scale_std, strict=True)
    ]
    standard = [resize_map(jnp.arcsinh(m) if compress else m, size, sigma) for m in standard]
    return sum(standard, start=jnp.zeros(())) / len(standard)


@dataclasses.dataclass(frozen=True)
class FastFlowScorer(CompiledScorer):
    """Scores by the energies of latents and by their distances to the banks."""

    function = staticmethod(_score)
    config: ConfigDict  # filled
    variables: dict  # of the flows, and the collection "bank" if there are banks
    calibration: Calibration

    def arrays(self) -> tuple[dict, Calibration]:
        """Variables and calibration."""
        return self.variables, self.calibration

    def score_with_likelihood(
        self,
        features: Features,
        valid: np.ndarray | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores features with the log-likelihoods of their normalised values."""
        run = self._program(_score_with_likelihood, tuple(size or self.config.image_size))
        return run(self._state, (features, valid))

    def latents(self, features: Features) -> tuple[np.ndarray, ...]:
        """Latents of features, see `InvertibleScorer.latents`."""
        return self._program(_latents)(self._state, (features,))

    def invert(self, latents: Features) -> tuple[np.ndarray, ...]:
        """Features of latents, see `InvertibleScorer.invert`."""
        return self._program(_invert)(self._state, (latents,))

    def location_maps(
        self, features: Features, valid: np.ndarray | None = None
    ) -> tuple[np.ndarray, ...]:
        """Energies [B, h, w], a map per scale, each followed by that of its bank if there is one.

        Scores and their calibration depend on features through these maps only.
        """
        return self._program(_location_maps)(self._state, (features, valid))

    def score_maps(self, maps: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Scores and anomaly maps from location maps, see `CalibratedScorer.score_maps`."""
        run = self._program(_score_maps, tuple(self.config.image_size))
        return run(self.calibration, maps)

    def recalibrated(self, maps: tuple[np.ndarray, ...]) -> "FastFlowScorer":
        """A copy with another calibration, see `CalibratedScorer.recalibrated`."""
        calibration = calibrate_on(self.config, maps)
        if len(maps[0]) < _FEW:  # too few for a standard deviation
            calibration = calibration.replace(peak_std=self.calibration.peak_std)
        return dataclasses.replace(self, calibration=calibration)


METHOD = Method(
    title="FastFlow",
    fit=fit,
    load=load,
    layers=layers,
    fields={
        "flow": {
            "norm": str,  # "whiten", "standardise", "layer", "layer_plain" or "none"
            "steps": int,
            "kernels": tuple,  # kernel sizes of the steps in turn: (3,) or (3, 1)
            "out_kernel": 1,  # size of a subnet's last kernel; 0: as its first, as in the reference
            "hidden_ratio": float,  # hidden channels of a subnet over its input's
            "clamp": 2.0,  # bound of a coupling's log-scale
            "coupling": "single",  # or "double"
            "affine": "exp",  # form of the learned scale; "softplus" in the reference
            "zero_init": True,  # a new flow only permutes channels; False in the reference
            "dtype": "float32",  # of the convolutions; "bfloat16" suits GPUs and TPUs
            "reversible": False,  # a fifth of the memory at 20 steps, for a third more computation
        },
        "map": {
            "form": "log",  # or "probability", as in the reference
            "log_det": 0.1,  # weight of the log-determinant: 1 in a likelihood, 0 in the reference
            "standardise": True,  # divides scales by their standard deviation on held-out images
            "compress": True,  # reduces the weight of outliers, see `fuse`
            "bank": 4000,  # latents of normal images that z is compared with, see `bank`; 0: none
        },
        "score": {
            "form": "windows",  # see `maps.window_maxima`; or "top_k"
            "top_k": 0.0,  # mean over this part of the anomaly map's pixels; 0: the maximum
        },
    },
    reads=("flow", "map", "score", "train.loss", "train.window", *READS),
    scoring=("map", "score"),
    bounds={
        "flow.steps": (1, 1000),
        "flow.hidden_ratio": (1e-3, 100),
        "flow.clamp": (1e-3, 100),
        "map.log_det": (0, 1),
        "map.bank": (0, 10**7),
        "score.top_k": (0, 1),
    },
    choices={
        "flow.norm": NORMS,
        "flow.affine": ("exp", "softplus"),
        "flow.coupling": ("single", "double"),
        "flow.dtype": ("float32", "bfloat16"),
        "map.form": ("log", "probability"),
        "score.form": ("windows", "top_k"),
    },
    fill=fill,
)
