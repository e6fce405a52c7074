"""A detector's programs on as many images as there are: one, or any number of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fastflow_jax import parallel
from fastflow_jax.backbones import Backbone
from fastflow_jax.features.extract import Features, in_batches
from fastflow_jax.features.prepare import extractor_of

# Images that are computed together; the smallest that holds all there are: a single image costs
# what one does, and many use the machine well, at three compilations in the worst case.
_BATCHES = (1, 8, 32)
LARGEST = _BATCHES[-1]


class Programs:
    """From images [B, H, W, 3], normalised, or features [B, h, w, C] a scale, to results.

    For `valid` see `FastFlowScorer.score_features`, for the scorer `detectors.registry`.
    """

    def __init__(self, config, backbone: Backbone, scorer):
        self._config, self._backbone, self._scorer = config, backbone, scorer
        self._made = {}  # by their batch size

    def features(self, images: np.ndarray) -> Features:
        """What the scorer sees of images."""
        return self._run(lambda extract, _, x: extract(x), images)

    def predict(
        self, images: np.ndarray, valid: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Scores [B], maps [B, H, W] and log-likelihoods [B]."""
        return self._run(lambda extract, s, x, v: s.predict_features(extract(x), v), images, valid)

    def latents(self, features: Features) -> Features:
        """See `FastFlowScorer.latents`."""
        return self._run(lambda _, scorer, x: scorer.latents(x), features)

    def invert(self, latents: Features) -> Features:
        """See `FastFlowScorer.invert`."""
        return self._run(lambda _, scorer, z: scorer.invert(z), latents)

    def _run(self, function: Callable, *arrays: Any) -> Any:
        """`function(extract, scorer, *arrays)`, a batch at a time; None stands for no array."""
        parallel.check_not_forked()

        def run(part):
            n = len(jax.tree.leaves(part)[0])
            return function(*self._of(next(size for size in _BATCHES if n <= size)), *part)

        return in_batches(run, arrays, LARGEST)

    def _of(self, batch: int) -> tuple[Callable[[np.ndarray], Features], Any]:
        """What extracts features of a batch of this size, and what scores them."""
        if batch not in self._made:
            config = self._config.copy_and_resolve_references()
            with config.unlocked():
                config.batch_size = batch
            scorer = dataclasses.replace(self._scorer, config=config)
            self._made[batch] = extractor_of(config, self._backbone), scorer
        return self._made[batch]
