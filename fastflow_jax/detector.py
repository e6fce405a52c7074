"""Detectors by name, and what they make of images."""

import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fastflow_jax.backbones import Backbone, create_backbone
from fastflow_jax.features import Features, extractor

# Each module has two functions, see `fastflow.fit` and `fastflow.load`; what they return scores
# features as `fastflow.FastFlowScorer` does. `layers(spec)`, where a module has it, names the maps
# that its detector takes of a backbone unless told otherwise, and `RECIPE` the fields in which its
# configuration differs from the default.
KINDS = {
    "fastflow": "fastflow_jax.fastflow",
    "patchcore": "fastflow_jax.baselines.patchcore",
    "spade": "fastflow_jax.baselines.spade",
    "cflow": "fastflow_jax.baselines.cflow",
    "vae": "fastflow_jax.baselines.vae",
    "gan": "fastflow_jax.baselines.gan",
}


def kind(name: str) -> ModuleType:
    """The module of the detector of this name."""
    return importlib.import_module(KINDS[name])


def recipe(name: str) -> dict:
    """Fields of the configuration that make a run of it one of the detector of this name."""
    return {"detector": name} | getattr(kind(name), "RECIPE", {})


@dataclasses.dataclass(frozen=True)
class Detector:
    """Scores images; higher is more anomalous."""

    config: ConfigDict  # filled, see `config.fill`
    backbone: Backbone
    scorer: object  # see `kind`

    @classmethod
    def load(cls, config: ConfigDict, folder: pathlib.Path, seed: int = 0) -> "Detector":
        """What the training in a folder left.

        Args:
          config: filled, that it was trained with.
          folder: of one training, see `experiment.run`.
          seed: that it was trained with: of random backbones.
        """
        backbone = create_backbone(
            config.backbone, weights=config.weights, layers=config.layers, seed=seed
        )
        images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
        maps = jax.eval_shape(backbone.module.apply, backbone.variables, images)
        scorer = kind(config.detector).load(config, [m.shape[1:] for m in maps], folder)
        return cls(config, backbone, scorer)

    def score(
        self, images: np.ndarray, valid: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images -> scores [B] and anomaly maps [B, H, W].

        Args:
          images: [B, H, W, 3], normalised, B up to the batch size of the configuration.
          valid: bool [B, H, W], False in padding; None without padding. What lies there counts
            for nothing.
        """
        return self.scorer.score_features(self.extract(images), valid, size=images.shape[1:3])

    @functools.cached_property
    def extract(self) -> Callable[[np.ndarray], Features]:
        """Images [B, H, W, 3] -> what `scorer` scores, see `features.extractor`."""
        c = self.config
        size = c.train.batch_size
        return extractor(self.backbone, c.length_power, c.parallel, size, c.feature_dtype)
