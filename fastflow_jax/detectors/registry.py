"""Detectors by name: the modules that train and load them."""

import importlib
from types import ModuleType

from fastflow_jax.data.dataset import check_choice

# Each module has two functions that return a scorer, see `fastflow.scorer.fit` and
# `fastflow.scorer.load`. Its `score_features` and `predict_features` are those of `FastFlowScorer`,
# its field `config` says for how large batches its programs are made. A scorer with a z has
# `latents` and `invert` too, one that held-out images calibrate has `recalibrated`.
# `layers(spec)`, where a module has it, names the maps that its detector takes of a backbone unless
# stated otherwise, and `RECIPE` the fields in which its configuration differs from the default.
KINDS = {
    "fastflow": "fastflow_jax.detectors.fastflow.scorer",
    "patchcore": "fastflow_jax.detectors.patchcore",
    "spade": "fastflow_jax.detectors.spade",
    "cflow": "fastflow_jax.detectors.cflow",
    "vae": "fastflow_jax.detectors.vae",
    "gan": "fastflow_jax.detectors.gan",
}


def kind(name: str) -> ModuleType:
    """The module of the detector of this name."""
    check_choice("the detector", name, KINDS)
    return importlib.import_module(KINDS[name])


def recipe(name: str) -> dict:
    """Fields of the configuration that make a run of it one of the detector of this name."""
    return {"detector": name} | getattr(kind(name), "RECIPE", {})
