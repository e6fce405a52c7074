"""What the trained baselines give back: a pure function that scores features, and its numbers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from fastflow_jax import parallel
from fastflow_jax.detectors.pickling import PickledByFields
from fastflow_jax.features.extract import Features


@dataclasses.dataclass(frozen=True)
class Scorer(PickledByFields):
    """Scores features; higher is more anomalous."""

    config: object  # filled, see `config.fill`
    state: Any  # what training learnt
    # Both are functions of a module, so that they can be pickled, and cache what they return.
    # config -> (state, (features, valid), size=(H, W)) -> scores [B] and maps [B, H, W], purely
    function_of: Callable
    # config -> (state, (features, valid)) -> log-likelihoods [B], purely; None if there is none
    log_likelihood_of: Callable | None = None

    def score_features(
        self,
        features: Features,
        valid: np.ndarray | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `FastFlowScorer.score_features`."""
        run = self._programs(None, tuple(size or self.config.image_size))
        return run(self._on_devices, (features, valid))

    def predict_features(
        self,
        features: Features,
        valid: np.ndarray | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """See `FastFlowScorer.predict_features`; None where there is no likelihood."""
        if self.log_likelihood_of is None:
            return *self.score_features(features, valid, size=size), None
        run = self._programs(self._log_likelihood, tuple(size or self.config.image_size))
        return run(self._on_devices, (features, valid))

    @functools.cached_property
    def _on_devices(self):
        return parallel.on_devices(self.state)

    @functools.cached_property
    def _log_likelihood(self):
        return self.log_likelihood_of(self.config)

    @functools.cached_property
    def _programs(self):
        """From a likelihood and the size of images to what scores their features."""
        # Not of `self`: what holds itself is freed late.
        how = (self.function_of(self.config), self.config.parallel, self.config.batch_size)
        return functools.partial(_program, *how)


@functools.lru_cache(maxsize=8)
def _program(
    function: Callable,
    kind: str,
    batch_size: int,
    log_likelihood: Callable | None,
    size: tuple[int, int],
) -> Callable:
    def run(state, batch):
        more = () if log_likelihood is None else (log_likelihood(state, batch),)
        return *function(state, batch, size=size), *more

    return parallel.per_example(run, kind, batch_size)


def without_likelihood(
    scorer,
    features: Features,
    valid: np.ndarray | None = None,
    *,
    size: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray, None]:
    """The `predict_features` of a scorer by distances: its `score_features`, and no likelihood."""
    return *scorer.score_features(features, valid, size=size), None
