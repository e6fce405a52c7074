"""PatchCore: distances of patch features to a memory bank of patch features of normal images.

Roth et al., Towards Total Recall in Industrial Anomaly Detection (arXiv 2106.08265). The reference
code is github.com/amazon-science/patchcore-inspection. Where paper and reference differ:

    choice                         here                        paper    reference
    start of the greedy k-center   one random point            same     mean distance to 10 points
    distances                      not squared                 same     squared
    re-weighting (equation 7)      optional, off by default    on       off
    aggregation of neighbourhoods  adaptive average pooling    open     same
    score of a patch               mean over k neighbours      k = 1    same

In addition, the bank has a largest size, and the blur of anomaly maps grows with their size. Of a
transformer a single level is used.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fastflow_jax import parallel
from fastflow_jax.backbones import deepest_maps
from fastflow_jax.detectors.base import CompiledScorer, Method, Rows
from fastflow_jax.detectors.maps import resize_map, where_counted
from fastflow_jax.detectors.nearest import k_center, nearest
from fastflow_jax.detectors.teaching import choose_rows, grown
from fastflow_jax.errors import InputError, Interrupted
from fastflow_jax.features.extract import Features, in_batches, inside, without_padding
from fastflow_jax.files import create_folder, read_arrays, write_arrays
from fastflow_jax.state import Slot, State, check
from fastflow_jax.training.context import FitContext
from fastflow_jax.training.loop import signalled, signals_set_a_flag

_BANK = "checkpoints/bank.npz"


def layers(config: ConfigDict, spec: Any) -> tuple[str, ...]:
    """The maps of strides 8 and 16, levels 2 and 3 of the paper."""
    return deepest_maps(spec, (8, 16))


def fill(config: ConfigDict, spec: Any) -> None:
    """Checks the number of re-weighting neighbours, see `Method.fill`."""
    if config.patchcore.reweight == 1:
        raise InputError("config.patchcore.reweight must be 0 or at least 2.")


def fit(context: FitContext) -> "PatchCoreScorer":
    """Fills the memory bank, or loads the one in the directory.

    Patch features are computed twice, projected to choose the coreset, and then in full for the
    chosen ones, so that they are never all in memory. An interrupted fit starts again.
    """
    config, file = context.config, context.directory / _BANK
    if parallel.on_main(file.exists):
        return load(config, context.train.shapes, read(config, context.directory))
    with signals_set_a_flag() as received:
        chosen = _choose(context, received)
        rows = _patch_rows(context, "bank", received)
        bank = [patches[here] for patches, here in zip(rows, chosen, strict=True)]
        scorer = PatchCoreScorer(config, context.train.shapes, np.concatenate(bank))
        create_folder(file.parent)
        write_arrays(file, scorer.state_dict())
        _stop_if(received, "after the memory bank was saved")
    return scorer


def read(config, directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads what `fit` has saved, see `Method.read`."""
    return read_arrays(directory / _BANK)


def load(config, shapes, state: State) -> "PatchCoreScorer":
    """Rebuilds a scorer, see `Method.load`."""
    check(state, {"bank": Slot((None, config.patchcore.dimension))})
    return PatchCoreScorer(config, shapes, state["bank"])


def _choose(context: FitContext, received: list[int]) -> list[np.ndarray]:
    """Chooses the coreset: bool [n] for each batch of the patches of `_patch_rows`."""
    c, rng = context.config.patchcore, np.random.default_rng(context.seed)
    projection = rng.normal(scale=c.projection**-0.5, size=(c.dimension, c.projection))
    parts = list(_patch_rows(context, "patches", received, projection))
    counts = [len(part) for part in parts]
    points = np.concatenate(parts)
    del parts
    n = min(c.max_points, max(1, round(c.coreset * len(points))))
    chosen = np.zeros(len(points), bool)
    label = f"{context.label}, coreset"
    with tqdm(total=n, desc=label, unit="pt", dynamic_ncols=True) as bar:
        for picked in k_center(points, n, int(rng.integers(len(points)))):
            _stop_if(received)
            chosen[picked] = True
            bar.update(len(picked))
    return np.split(chosen, np.cumsum(counts)[:-1])


def _patch_rows(
    context: FitContext, label: str, received: list[int], projection: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Yields features [n, C] of the patches of each batch without padding, projected if given."""
    config, features = context.config, context.train

    def function(state, batch):
        kernels, projection = state
        patches, seen = embed(kernels, *batch)
        if projection is None:
            return patches, seen
        return jnp.matmul(patches, projection, precision="highest"), seen

    matrix = None if projection is None else jnp.asarray(projection, jnp.float32)
    state = pooling_kernels(features.shapes, config.patchcore.dimension), matrix
    run = parallel.per_example(function, config.parallel, config.batch_size)
    label = f"{context.label}, {label}"
    with tqdm(total=features.n, desc=label, unit="img", dynamic_ncols=True) as bar:
        for batch in features.in_batches(config.batch_size):
            _stop_if(received)
            found, seen = run(state, batch)
            yield found[seen]
            bar.update(len(found))


def _stop_if(
    received: list[int], when: str = "while filling the memory bank, which will start again"
) -> None:
    signum = signalled(received)
    if signum:
        raise Interrupted(signum, when)


def pooling_kernels(shapes, dimension: int) -> tuple[jax.Array, ...]:
    """The aggregation of 3x3 patches as a convolution for each level, [3, 3, C, dimension].

    Both poolings are linear. The first averages the 9 C values of a patch, channel by channel, to
    `dimension` values; the second does the same to the concatenated results of all levels. A
    patch's feature is the sum over the levels.

    Args:
      shapes: (h, w, C) of each level.
      dimension: of a patch's feature.
    """
    second = _adaptive_mean(len(shapes) * dimension, dimension)
    second = second.reshape(len(shapes), dimension, dimension)
    kernels = []
    for (_, _, channels), to_all in zip(shapes, second, strict=True):
        kernel = _adaptive_mean(9 * channels, dimension) @ to_all
        kernel = kernel.reshape(channels, 3, 3, dimension).transpose(1, 2, 0, 3)
        kernels.append(jnp.asarray(kernel, jnp.float32))
    return tuple(kernels)


def _adaptive_mean(length: int, bins: int) -> np.ndarray:
    """Matrix [length, bins] of averages over equal parts, widened to whole numbers."""
    edges = np.arange(bins + 1) * length
    low, high = edges[:-1] // bins, -(-edges[1:] // bins)
    index = np.arange(length)[:, None]
    return ((index >= low) & (index < high)) / (high - low)


def embed(
    kernels: tuple[jax.Array, ...], maps: Features, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Locally aware patch features on the grid of the finest level (section 3.1).

    Args:
      kernels: see `pooling_kernels`.
      maps: [B, h, w, C] per level.
      valid: bool [B, H, W], False in padded pixels, whose features are set to zero.

    Returns:
      [B, h, w, dimension], and bool [B, h, w], False in padding.
    """
    grid = max(m.shape[1:3] for m in maps)
    total = jnp.zeros(())
    for m, kernel in zip(maps, kernels, strict=True):
        m = jnp.asarray(m, jnp.float32)
        if valid is not None:
            m = jnp.where(inside(valid, m.shape[1:3])[..., None], m, 0)
        layout = ("NHWC", "HWIO", "NHWC")
        patches = jax.lax.conv_general_dilated(
            m, kernel, (1, 1), "SAME", dimension_numbers=layout, precision="highest"
        )
        size = (m.shape[0], *grid, kernel.shape[-1])
        total += jax.image.resize(patches, size, "bilinear", antialias=False)
    return total, jnp.ones(total.shape[:3], bool) if valid is None else inside(valid, grid)


def _embed(config, kernels, batch) -> jax.Array:
    """The patch features [B, h, w, dimension] of a batch."""
    return embed(kernels, *batch)[0]


def weights(patches: jax.Array, rows: jax.Array, bank: jax.Array, k: int) -> jax.Array:
    """1 - exp |p - m| / sum of exp |p - m'| over the k nearest m' to m in the bank (equation 7).

    A patch whose nearest row m is isolated gets more weight. m is one of its own neighbours.

    Args:
      patches: p, [B, C].
      rows: index of m in the bank, [B].
      bank: [M, C].
      k: number of neighbours, at most M are used.
    """
    _, index = nearest(bank[rows], bank, min(k, len(bank)))
    distances = jnp.linalg.norm(patches[:, None] - bank[index], axis=-1)  # [B, k]
    own = jnp.linalg.norm(patches - bank[rows], axis=-1)
    return 1 - jnp.exp(own - jax.nn.logsumexp(distances, axis=-1))


def _score(config, size, state, batch):
    """Scores [B] and anomaly maps [B, *size] of a batch, see `CompiledScorer.function`."""
    kernels, centre, bank = jax.tree.map(jnp.asarray, state)
    c = config.patchcore
    patches, seen = embed(kernels, *batch)
    patches = (patches - centre).reshape(patches.shape[0], -1, patches.shape[-1])
    neighbours = min(c.neighbours, len(bank))
    # One image at a time: the distances of all images would need much memory.
    distances, index = jax.lax.map(lambda p: nearest(p, bank, neighbours), patches)
    scores = without_padding(distances.mean(-1).reshape(seen.shape), seen)
    image_score = scores.max((1, 2))
    if c.reweight:
        worst = scores.reshape(scores.shape[0], -1).argmax(1)[:, None]
        take = functools.partial(jnp.take_along_axis, axis=1, mode="promise_in_bounds")
        patch, row = take(patches, worst[..., None])[:, 0], take(index[..., 0], worst)[:, 0]
        image_score *= weights(patch, row, bank, c.reweight)
    return image_score, where_counted(resize_map(scores, size, config.map.sigma), batch[1])


@dataclasses.dataclass(frozen=True)
class PatchCoreScorer(CompiledScorer):
    """Scores by distances to the memory bank."""

    function = staticmethod(_score)
    config: ConfigDict  # filled
    shapes: tuple[tuple[int, ...], ...]  # (h, w, C) of each level
    bank: np.ndarray  # [M, dimension]

    def arrays(self) -> tuple[Any, ...]:
        """Kernels of the patches, the mean of the bank, and the centred bank."""
        centre = self.bank.mean(0)
        return pooling_kernels(self.shapes, self.bank.shape[1]), centre, self.bank - centre

    def state_dict(self) -> dict[str, np.ndarray]:
        """See `Scorer.state_dict`."""
        return {"bank": self.bank}

    def new_rows(self, features: Features, valid: np.ndarray | None, share: float) -> Rows:
        """See `TeachableScorer.new_rows`."""
        if self.config.patchcore.reweight:
            raise InputError(
                "With patchcore.reweight, scores may rise when images are taught. Train with "
                "config.patchcore.reweight=0."
            )
        run = functools.partial(self._program(_embed), self._state[0])
        patches = in_batches(run, (features, valid), self.config.batch_size)
        n = round(share * self.config.patchcore.max_points)
        return choose_rows({"bank": patches}, valid, {"bank": self.bank}, n)

    def extended(self, rows: Sequence[Rows]) -> "PatchCoreScorer":
        """See `TeachableScorer.extended`."""
        banks = grown({"bank": self.bank}, rows, self.config.patchcore.max_points)
        return dataclasses.replace(self, bank=banks["bank"])


METHOD = Method(
    title="PatchCore",
    fit=fit,
    read=read,
    load=load,
    layers=layers,
    fields={
        "patchcore": {
            "dimension": 1024,  # of a patch's feature
            "projection": 128,  # dimensions in which the coreset is chosen
            "coreset": 0.1,  # part of all patches that the memory bank keeps
            "max_points": 10_000,  # largest size of the memory bank, which limits the time
            "neighbours": 1,  # their mean distance is the score of a patch
            "reweight": 0,  # neighbours that re-weight an image's score; 9 in the paper; 0: none
        }
    },
    recipe={"length_power": 1.0, "data": {"holdout": 0.0}},
    reads=("patchcore",),
    fill=fill,
    scoring=("patchcore.neighbours", "patchcore.reweight"),
    bounds={
        "patchcore.dimension": (1, 10**5),
        "patchcore.projection": (1, 10**5),
        "patchcore.coreset": (1e-9, 1),
        "patchcore.max_points": (1, 10**9),
        "patchcore.neighbours": (1, 1000),
        "patchcore.reweight": (0, 1000),
    },
)
