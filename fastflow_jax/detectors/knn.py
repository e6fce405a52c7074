"""k-NN: distance of whitened features to those of normal images, without any training.

The null hypothesis for a trained density. A memory bank keeps random features of each scale; the
energy of a location is its squared distance to the nearest, per channel. Nearest patch features are
the idea of SPADE (arXiv 2005.02357) and PatchCore (arXiv 2106.08265), whitening that of Rippel et
al. (arXiv 2005.14140). Everything but the energies is as in FastFlow.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from fastflow_jax.detectors.base import Method, Rows, compiled
from fastflow_jax.detectors.calibration import LocationScorer, finish_fit, load_scorer, read_fit
from fastflow_jax.detectors.fastflow import bank
from fastflow_jax.detectors.fastflow.scorer import layers
from fastflow_jax.detectors.nearest import nearest, nearest_squared_distances
from fastflow_jax.detectors.teaching import choose_rows, grown
from fastflow_jax.features.extract import Features, in_batches, inside, without_padding
from fastflow_jax.state import Slot, State
from fastflow_jax.training.context import FitContext


def fit(context: FitContext) -> "KnnScorer":
    """Whitens the training features, draws the banks, and calibrates on the held-out images."""
    config = context.config
    statistics = context.train.statistics("whiten")
    variables = {f"{k}_{i}": s[k] for i, s in enumerate(statistics.values()) for k in s}
    run = compiled(_entries, FrozenConfigDict(config))
    draw = bank.draw
    if config.knn.coreset:
        draw = functools.partial(bank.draw_coresets, label=f"{context.label}, memory banks")
    size = config.knn.points, config.batch_size
    banks = draw(lambda *b: run(variables, b), context.train, *size, context.seed)
    variables |= {f"bank_{i}": rows for i, rows in enumerate(banks)}
    return finish_fit(KnnScorer, context, variables, maps=len(context.train.shapes))


def load(config, shapes, state: State) -> "KnnScorer":
    """Rebuilds a scorer, see `Method.load`."""
    slots = {}
    for i, (_, _, channels) in enumerate(shapes):
        slots[f"mean_{i}"] = Slot((channels,))
        slots[f"whitening_{i}"] = Slot((channels, channels))
        slots[f"bank_{i}"] = Slot((None, channels))
    return load_scorer(KnnScorer, config, state, slots, maps=len(shapes))


def _entries(config, variables, batch) -> tuple[jax.Array, ...]:
    """Whitened features [B, h, w, C] of each scale, averaged over 3x3 locations if asked for."""
    features, valid = batch
    entries = []
    for i, x in enumerate(features):
        y = (x.astype(jnp.float32) - variables[f"mean_{i}"]) @ variables[f"whitening_{i}"]
        seen = None if valid is None else inside(valid, x.shape[1:3])
        entries.append(bank.averaged(y, seen) if config.knn.average else y)
    return tuple(entries)


def _locate(config, variables, batch) -> tuple[jax.Array, ...]:
    """Energies of locations, see `LocationScorer.locate`."""
    maps = []
    for i, y in enumerate(_entries(config, variables, batch)):
        energy = _mean_squares(config, y, variables[f"bank_{i}"]) / y.shape[-1]
        if (valid := batch[1]) is not None:
            energy = without_padding(energy, inside(valid, y.shape[1:3]))
        maps.append(energy)
    return tuple(maps)


def _mean_squares(config, y: jax.Array, rows: jax.Array) -> jax.Array:
    """Mean squared distance of [B, h, w, C] to the nearest rows of a bank [M, C], [B, h, w]."""
    k = min(config.knn.neighbours, rows.shape[0])
    if k == 1:
        return nearest_squared_distances(y, rows)
    rows = jnp.asarray(rows, jnp.float32)
    # One image at a time, because the distances of all need much memory.
    distances = jax.lax.map(
        lambda one: nearest(one, rows, k)[0], y.reshape(y.shape[0], -1, y.shape[-1])
    )
    return jnp.mean(distances**2, -1).reshape(y.shape[:3])


@dataclasses.dataclass(frozen=True)
class KnnScorer(LocationScorer):
    """Scores by distances to the banks; `variables` hold them and the whitening."""

    locate = staticmethod(_locate)

    def new_rows(self, features: Features, valid: np.ndarray | None, share: float) -> Rows:
        """See `TeachableScorer.new_rows`."""
        run = functools.partial(self._program(_entries), self._state[0])
        found = in_batches(run, (features, valid), self.config.batch_size)
        vectors = {f"bank_{i}": x for i, x in enumerate(found)}
        return choose_rows(vectors, valid, self.variables, round(share * self.config.knn.points))

    def extended(self, rows: Sequence[Rows]) -> "KnnScorer":
        """See `TeachableScorer.extended`."""
        banks = {name: x for name, x in self.variables.items() if name.startswith("bank_")}
        variables = self.variables | grown(banks, rows, self.config.knn.points)
        return dataclasses.replace(self, variables=variables)


METHOD = Method(
    title="Whitened k-NN",
    fit=fit,
    read=read_fit,
    load=load,
    layers=layers,
    fields={
        "knn": {
            "points": 10_000,  # approximate size of the bank of each scale
            "neighbours": 1,  # nearest rows, whose mean squared distance is the energy
            "coreset": False,  # chooses rows that cover rare regions, instead of random ones
            "average": False,  # averages whitened features over 3x3 locations, on fine maps
        }
    },
    reads=("knn", "map.standardise", "map.compress", "map.border", "score"),
    scoring=("knn.neighbours",),
    bounds={"knn.points": (1, 10**7), "knn.neighbours": (1, 1000)},
)
