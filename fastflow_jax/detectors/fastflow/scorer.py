"""The FastFlow detector: trains the flows, calibrates them, and scores features."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from fastflow_jax import parallel
from fastflow_jax.backbones import spec_of
from fastflow_jax.detectors.base import Method, Rows, compiled
from fastflow_jax.detectors.calibration import (
    LocationScorer,
    calibrate,
    load_scorer,
    read_calibration,
    save_calibration,
    score_locations,
)
from fastflow_jax.detectors.fastflow import bank
from fastflow_jax.detectors.fastflow.model import (
    NORMS,
    FastFlow,
    Latents,
    invert,
    location_energies,
    negative_log_likelihood,
    normalise,
    of_product,
    random_windows,
)
from fastflow_jax.detectors.nearest import nearest_squared_distances
from fastflow_jax.detectors.teaching import choose_rows, grown
from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import (
    Features,
    TrainingFeatures,
    in_batches,
    inside,
    without_padding,
)
from fastflow_jax.features.joined import split_products
from fastflow_jax.files import create_folder, read_json, write_json
from fastflow_jax.flows import Flow
from fastflow_jax.flows.chain import is_double
from fastflow_jax.flows.coupling import half_channels
from fastflow_jax.state import Slot, State, flatten
from fastflow_jax.training.context import FitContext
from fastflow_jax.training.loop import READS, read_variables, train_variables
from fastflow_jax.training.step import Objective, variable_slots

_COARSE = 16  # stride, above which maps have `map.coarse_weight`
_BANKS = ("features", "latents")  # kinds of memory banks of each scale
_SHARED = "checkpoints/shared.json"  # of a product, see `fit_shared`
# Training images of a product; with fewer, latents of a flow that other products have mostly
# trained do not contribute to the image score.
_FEW = 50
_EARLIER_BANK = "bank"  # the only kind in saved detectors of earlier versions


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
    channels = min(spec.blocks[layer][0] for layer in config.layers)
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
    widest = max(spec.blocks[layer][0] for layer in layers)
    ratio = 2.0 * min(1.0, 192 / widest) ** 2
    return {"norm": "whiten", "steps": 4, "kernels": (3,), "hidden_ratio": max(ratio, 0.16)}


def fit(context: FitContext) -> "FastFlowScorer":
    """Trains the flows, draws the banks, and calibrates on the held-out images.

    Training continues from the latest checkpoint. For errors see `loop.train`.
    """
    config = context.config

    def scorer(variables: dict, seed: int) -> FastFlowScorer:
        variables = with_banks(config, variables, context.train, seed, label=context.label)
        latents = context.shared is None or context.train.n >= _FEW
        held_out = context.holdout, context.holdout_valid
        return calibrated(config, variables, *held_out, latents=latents)

    if context.shared is not None:
        _link(context)
        variables = _read_variables(config, context.directory)
    else:
        nll = objective(config, context.train.statistics(config.flow.norm))
        variables = train_variables(context, nll, scorer)
    trained = scorer(variables, context.seed)
    banks = trained.variables.get("bank", {})
    save_calibration(config, context.directory, trained.calibration, banks)
    return trained


def fit_shared(context: FitContext, members: Sequence[TrainingFeatures]) -> None:
    """Trains flows that are conditioned on the product, see `Method.fit_shared`.

    Each product has its own norm.
    """
    statistics = [member.statistics(context.config.flow.norm) for member in members]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *statistics)
    train_variables(context, objective(context.config, stacked), lambda variables, seed: None)


def read(config, directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads what `fit` has saved, see `Method.read`."""
    return flatten(_read_variables(config, directory)) | read_calibration(config, directory)


def _link(context: FitContext) -> None:
    """Records the shared training of a product in the place of checkpoints of its own."""
    assert context.shared is not None
    file = context.directory / _SHARED
    create_folder(file.parent)
    shared = os.path.relpath(context.shared, context.directory)
    write_json(file, {"training": shared, "product": context.product})


def _read_variables(config, directory: pathlib.Path) -> dict:
    """Variables of the flows from the directory of a training, or from the one that it shares."""
    link = read_json(directory / _SHARED)
    if link is None:
        return read_variables(directory)
    variables = read_variables((directory / link["training"]).resolve())
    return of_product(variables, link["product"], config.products)


def load(config, shapes, state: State) -> "FastFlowScorer":
    """Rebuilds a scorer, see `Method.load`."""
    kinds = [kind for kind in (*_BANKS, _EARLIER_BANK) if f"bank/{kind}_0" in state]
    slots = variable_slots(objective(config), shapes)
    for i, (_, _, channels) in enumerate(shapes):
        slots |= {f"bank/{kind}_{i}": Slot((None, channels)) for kind in kinds}
    return load_scorer(FastFlowScorer, config, state, slots, maps=len(shapes) * (1 + len(kinds)))


def calibrated(
    config,
    variables: dict,
    holdout: Features | None,
    valid: np.ndarray | None = None,
    *,
    latents: bool = True,
) -> "FastFlowScorer":
    """The scorer of trained variables, calibrated on features of held-out normal images.

    The image score depends on the distances to the banks (without those of latents if `latents` is
    False), or on the flows' energies if there are no banks; the anomaly map depends on all of them.
    """
    of_scale = [0, 1, int(latents)] if variables.get("bank") else [1]
    weight = np.tile(np.array(of_scale, np.float32), len(config.layers))
    calibration = calibrate(_locate, config, variables, holdout, valid, weight=weight)
    return FastFlowScorer(config, variables, calibration)


def with_banks(
    config, variables, features: TrainingFeatures, seed: int, *, label: str = "train"
) -> dict:
    """Adds the collection "bank" to the variables of the flows: two banks per scale."""
    if not config.map.bank:
        return variables
    run = compiled(_vectors, FrozenConfigDict(config))
    rows = bank.draw_coresets(
        lambda *batch: run(variables, batch),
        features,
        config.map.bank,
        config.batch_size,
        seed,
        label=f"{label}, memory banks",
    )
    names = [f"{kind}_{i}" for i in range(len(features.shapes)) for kind in _BANKS]
    return variables | {"bank": dict(zip(names, rows, strict=True))}


def flow_model(config) -> FastFlow:
    """The flows of a filled configuration."""
    fields = config.flow.to_dict()
    fields["kernels"], fields["dtype"] = tuple(fields["kernels"]), jnp.dtype(fields["dtype"])
    fields["out_kernel"] = fields["out_kernel"] or None
    norm = fields.pop("norm")
    return FastFlow(Flow(**fields), norm, config.products)


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
        variables = dict(fresh(key, split_products(features)[0]))
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

    return parallel.run_once(model.init), loss, validation


def _nll(model, variables, features, valid, per_dimension, cut=lambda scale, x: x) -> jax.Array:
    """`model.negative_log_likelihood` of images without their padding, [B]."""
    (maps, product), masks = split_products(features), None
    if valid is not None:
        seen = (inside(valid, m.shape[1:3])[..., None] for m in maps)
        masks = [cut(i, m)[..., 0] for i, m in enumerate(seen)]
    latents = cast(Latents, model.apply(variables, maps, cut, product))
    return negative_log_likelihood(latents, per_dimension=per_dimension, inside=masks)


def _score_with_likelihood(config, size, state, batch):
    """Scores, maps and log-likelihoods of the normalised features of a batch.

    The compiler runs the flows once.
    """
    features, valid = batch
    nll = _nll(flow_model(config), state[0], features, valid, True)
    how = {"locate": _locate, "map_weights": _map_weights}
    return *score_locations(config, size, state, batch, **how), -nll


def _latents(config, state, batch):
    return tuple(z for z, _ in _apply(config, state[0], batch[0]))


def _apply(config, variables, features) -> Latents:
    """Latents and log-determinants of features."""
    return cast(Latents, flow_model(config).apply(variables, features))


def _vectors(config, variables, batch) -> tuple[jax.Array, ...]:
    """The vectors [B, h, w, C] that banks are drawn from: `_BANKS` of each scale."""
    features, valid = batch
    latents = _apply(config, variables, features)
    inputs = normalise(flow_model(config), variables, features)
    compared = (_compared(x, z, valid) for x, (z, _) in zip(inputs, latents, strict=True))
    return tuple(vectors[kind]() for vectors in compared for kind in _BANKS)


def _bank_vectors(config, variables, batch) -> dict[str, jax.Array]:
    """The vectors [B, h, w, C] that are compared with each bank of trained variables."""
    features, valid = batch
    inputs, found = normalise(flow_model(config), variables, features), {}
    for i, (z, _) in enumerate(_apply(config, variables, features)):
        vectors = {f"{kind}_{i}": get for kind, get in _compared(inputs[i], z, valid).items()}
        found |= {name: get() for name, get in vectors.items() if name in variables["bank"]}
    return found


def _compared(x: jax.Array, z: jax.Array, valid: jax.Array | None) -> dict[str, Callable]:
    """The vectors [B, h, w, C] to compare with a bank of each kind.

    Args:
      x: normalised features [B, h, w, C].
      z: their latents [B, h, w, C].
      valid: bool [B, H, W], False in padding; None without padding.
    """
    return {
        "features": lambda: x,
        "latents": lambda: z,
        _EARLIER_BANK: lambda: bank.averaged(z, _seen(valid, z)),
    }


def _invert(config, state, batch):
    return invert(flow_model(config), state[0], batch[0])


def _locate(config, variables, batch) -> tuple[jax.Array, ...]:
    """Energies of locations, see `LocationScorer.locate`."""
    features, valid = batch
    maps, banks = [], variables.get("bank", {})
    inputs = normalise(flow_model(config), variables, features)
    for i, (z, log_det) in enumerate(_apply(config, variables, features)):
        score = functools.partial(location_energies, z, log_det, form=config.map.form)
        found = [score(log_det_weight=config.map.log_det)]
        for kind, vectors in _compared(inputs[i], z, valid).items():
            if (rows := banks.get(f"{kind}_{i}")) is not None:
                squares = nearest_squared_distances(vectors(), rows)
                found.append(score(log_det_weight=0.0, squares=squares))
        seen = _seen(valid, z)
        maps += found if seen is None else [without_padding(each, seen) for each in found]
    return tuple(maps)


def _map_weights(config, n: int) -> list[float]:
    """Weight of each map of `_locate` in the anomaly map.

    Distances of features are sharper than energies of latents, which depend on a neighbourhood, and
    maps of a large stride are blurred.
    """
    kinds = (1.0, config.map.feature_weight, 1.0)[: n // len(config.layers)]
    strides = [spec_of(config).blocks[layer][1] for layer in config.layers]
    scales = [config.map.coarse_weight if stride > _COARSE else 1.0 for stride in strides]
    return [scale * kind for scale in scales for kind in kinds]


def _seen(valid: jax.Array | None, maps: jax.Array) -> jax.Array | None:
    """`extract.inside` for maps [B, h, w, C]; None without padding."""
    return None if valid is None else inside(valid, maps.shape[1:3])


@dataclasses.dataclass(frozen=True)
class FastFlowScorer(LocationScorer):
    """Scores by the energies of latents, and by distances of features and latents to the banks.

    `variables` are those of the flows, and the collection "bank" if there are banks. There is a map
    per scale, each followed by those of its banks if there are any.
    """

    locate = staticmethod(_locate)
    map_weights = staticmethod(_map_weights)
    with_likelihood = staticmethod(_score_with_likelihood)

    def new_rows(self, features: Features, valid: np.ndarray | None, share: float) -> Rows:
        """See `TeachableScorer.new_rows`."""
        if not self.variables.get("bank"):
            raise InputError(
                "This detector has no memory banks, and cannot be taught. Train with "
                "config.map.bank above 0."
            )
        run = functools.partial(self._program(_bank_vectors), self._state[0])
        vectors = in_batches(run, (features, valid), self.config.batch_size)
        n = round(share * self.config.map.bank)
        return choose_rows(vectors, valid, self.variables["bank"], n)

    def extended(self, rows: Sequence[Rows]) -> "FastFlowScorer":
        """See `TeachableScorer.extended`."""
        banks = grown(self.variables["bank"], rows, self.config.map.bank)
        return dataclasses.replace(self, variables={**self.variables, "bank": banks})

    def latents(self, features: Features) -> tuple[np.ndarray, ...]:
        """Latents of features, see `InvertibleScorer.latents`."""
        return self._program(_latents)(self._state, (features,))

    def invert(self, latents: Features) -> tuple[np.ndarray, ...]:
        """Features of latents, see `InvertibleScorer.invert`."""
        return self._program(_invert)(self._state, (latents,))


METHOD = Method(
    title="FastFlow",
    fit=fit,
    fit_shared=fit_shared,
    read=read,
    load=load,
    layers=layers,
    fields={
        "flow": {
            "norm": str,  # "whiten", "standardise", "layer", "layer_plain" or "none"
            "steps": int,  # steps of the flow of each scale
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
            "feature_weight": 2.0,  # of distances of features, over that of other energies
            "coarse_weight": 0.5,  # of maps with a stride above 16, over that of other maps
            "border": 5,  # weight at the border, see `maps.border_weights`; 1: as elsewhere
            "bank": 2000,  # rows of each memory bank, see `bank`; 0: no banks
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
        "map.feature_weight": (0, 1000),
        "map.coarse_weight": (1e-3, 1000),
        "map.border": (1, 99),
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
