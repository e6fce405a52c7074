"""What the trained baselines give back: a pure function that scores features, and its numbers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from fastflow_jax import parallel
from fastflow_jax.features import Features


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores features; higher is more anomalous."""

    config: object  # filled, see `config.fill`
    state: Any  # what training learnt
    # (state, (features, valid), size=(H, W)) -> scores [B] and maps [B, H, W], purely
    function: Callable

    def score_features(
        self,
        features: Features,
        valid: np.ndarray | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `fastflow.FastFlowScorer.score_features`."""
        run = self._programs(tuple(size or self.config.image_size))
        return run(self.state, (features, valid))

    @functools.cached_property
    def _programs(self):
        """From the size of images to what scores their features."""
        function, c = self.function, self.config  # not `self`: what holds itself is freed late

        def program(size):
            score = functools.partial(function, size=size)
            return parallel.per_example(score, c.parallel, c.train.batch_size)

        return functools.cache(program)
