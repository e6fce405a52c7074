"""Detectors by name, and what they make of images."""

import dataclasses
import functools
import importlib
from types import ModuleType

import numpy as np
from ml_collections import ConfigDict

from fastflow_jax.backbones import Backbone
from fastflow_jax.features import extractor

# Each module has two functions, see `fastflow.fit` and `fastflow.load`; what they return scores
# features as `fastflow.FastFlowScorer` does.
KINDS = {
    "fastflow": "fastflow_jax.fastflow",
    "cflow": "fastflow_jax.baselines.cflow",
    "vae": "fastflow_jax.baselines.vae",
    "gan": "fastflow_jax.baselines.gan",
}


def kind(config: ConfigDict) -> ModuleType:
    """The module of the detector that a filled configuration names."""
    return importlib.import_module(KINDS[config.detector])


@dataclasses.dataclass(frozen=True)
class Detector:
    """Scores images; higher is more anomalous."""

    config: ConfigDict  # filled, see `config.fill`
    backbone: Backbone
    scorer: object  # see `kind`

    def score(
        self, images: np.ndarray, valid: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images -> scores [B] and anomaly maps [B, H, W].

        Args:
          images: [B, H, W, 3], normalised, B up to the batch size of the configuration.
          valid: bool [B, H, W], False in padding; None without padding. What lies there counts
            for nothing.
        """
        return self.scorer.score_features(self._extract(images), valid, size=images.shape[1:3])

    @functools.cached_property
    def _extract(self):
        c = self.config
        return extractor(self.backbone, c.length_power, c.parallel, c.train.batch_size)
