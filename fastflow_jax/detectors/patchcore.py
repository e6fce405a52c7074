"""PatchCore: distances of patch features to a coreset of those of normal images.

Roth et al., Towards Total Recall in Industrial Anomaly Detection (arXiv 2106.08265); the authors'
code is github.com/amazon-science/patchcore-inspection.

As in the paper: the coreset is greedy k-center from one point drawn at random, in randomly
projected features (algorithm 1; the reference starts from the mean distance to ten points);
distances are not squared (the reference's are); an image's score may be re-weighted (equation 7),
which the reference leaves out, as is the default here. As in the reference: neighbourhoods are
aggregated by adaptive average pooling of all their numbers, channel by channel, first each level
to the dimension, then the levels together; a score may be the mean over several neighbours. Ours:
the bank has a largest size, and the blur of maps grows with them. Transformers give one level.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fastflow_jax import parallel
from fastflow_jax.backbones import deepest_maps
from fastflow_jax.detectors.fastflow.model import resize_map
from fastflow_jax.detectors.nearest import nearest
from fastflow_jax.detectors.pickling import PickledByFields
from fastflow_jax.detectors.scorer import without_likelihood
from fastflow_jax.features.extract import Features, TrainingFeatures, inside, without_padding
from fastflow_jax.files import read_arrays, write_arrays
from fastflow_jax.training.loop import Interrupted, signalled, signals_set_a_flag

_BANK = "checkpoints/bank.npz"
_PICKS = 64  # points of a coreset that are chosen between two passes over all rows
_CANDIDATES = 4096  # rows that they are chosen from

# Fields of the configuration that differ from the default.
RECIPE = {"length_power": 1.0, "data": {"holdout": 0.0}}


def layers(spec) -> tuple[str, ...]:
    """Levels 2 and 3 of the paper, by their strides."""
    return deepest_maps(spec, (8, 16))


def fit(
    config,
    features: TrainingFeatures,
    holdout: Features | None,
    holdout_valid: np.ndarray | None = None,
    *,
    seed: int,
    folder: pathlib.Path,
    beside: Sequence[tuple[int, pathlib.Path]] = (),
    on_epoch: Callable | None = None,
    progress: str = "train",
) -> "PatchCoreScorer":
    """Fill the memory bank, or load the one that lies in the folder.

    The patches of the training images are computed twice, projected to choose the coreset and
    whole for what was chosen of them, so that all of them are never held whole.

    Args:
      config: filled, see `config.fill`.
      features: of the training images.
      holdout: not used.
      holdout_valid: not used.
      seed: of the projection and of the coreset's first point.
      folder: gets the bank, as `checkpoints/bank.npz`.
      beside: not used.
      on_epoch: not used: there are no epochs.
      progress: label of the progress bars.

    Raises:
      Interrupted: SIGTERM or SIGINT came. A bank that is not whole is not kept: the next call
        begins anew.
    """
    if parallel.on_main((folder / _BANK).exists):
        return load(config, features.shapes, folder)
    c = config.patchcore
    rng = np.random.default_rng(seed)
    projection = rng.normal(scale=c.projection**-0.5, size=(c.dimension, c.projection))
    state = pooling_kernels(features.shapes, c.dimension), jnp.asarray(projection, jnp.float32)

    def whole(state, batch):
        return embed(state[0], *batch)

    def projected(state, batch):
        patches, seen = whole(state, batch)
        return jnp.matmul(patches, state[1], precision="highest"), seen

    with signals_set_a_flag() as received:

        def rows(function, what):
            """Of each batch the rows that lie in images, [n, C]."""
            run = parallel.per_example(function, config.parallel, config.batch_size)
            bar = tqdm(total=features.n, desc=f"{progress}, {what}", unit="img", dynamic_ncols=True)
            with bar:
                for maps, valid in features.in_batches(config.batch_size):
                    _stop_if(received)
                    found, seen = run(state, (maps, valid))
                    yield found[seen]
                    bar.update(len(found))

        parts = list(rows(projected, "patches"))
        counts = [len(part) for part in parts]
        points = np.concatenate(parts)
        del parts
        n = min(c.max_points, max(1, round(c.coreset * len(points))))
        chosen = np.zeros(len(points), bool)
        with tqdm(total=n, desc=f"{progress}, coreset", unit="pt", dynamic_ncols=True) as bar:
            for picked in k_center(points, n, int(rng.integers(len(points)))):
                _stop_if(received)
                chosen[picked] = True
                bar.update(len(picked))
        kept = np.split(chosen, np.cumsum(counts)[:-1])
        bank = [part[k] for part, k in zip(rows(whole, "bank"), kept, strict=True)]
        scorer = PatchCoreScorer(config, features.shapes, np.concatenate(bank))
        (folder / _BANK).parent.mkdir(parents=True, exist_ok=True)
        write_arrays(folder / _BANK, {"bank": scorer.bank})
        _stop_if(received, "after the memory bank was saved")
    return scorer


def load(config, shapes, folder: pathlib.Path) -> "PatchCoreScorer":
    """The scorer that `fit` left in a folder, see `fastflow.scorer.load`."""
    return PatchCoreScorer(config, shapes, read_arrays(folder / _BANK)["bank"])


def _stop_if(
    received: list[int], when: str = "while filling the memory bank, which begins anew"
) -> None:
    signum = signalled(received)
    if signum:
        raise Interrupted(signum, when)


def pooling_kernels(shapes, dimension: int) -> tuple[jax.Array, ...]:
    """The aggregation of 3x3 patches as a convolution for each level, [3, 3, C, dimension].

    Both poolings are linear. The first averages the 9 C numbers of a patch, channel by channel, to
    `dimension`; the second does the same to what all levels have become, one after the other. The
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
    """[length, bins]: what makes averages over `bins` equal parts, widened to whole numbers."""
    edges = np.arange(bins + 1) * length
    low, high = edges[:-1] // bins, -(-edges[1:] // bins)
    place = np.arange(length)[:, None]
    return ((place >= low) & (place < high)) / (high - low)


def embed(
    kernels: tuple[jax.Array, ...], maps: Features, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Locally aware patch features on the grid of the finest level (section 3.1).

    Args:
      kernels: see `pooling_kernels`.
      maps: [B, h, w, C] a level.
      valid: bool [B, H, W], False in padding, which is taken as what lies outside of a map: zero.

    Returns:
      [B, h, w, dimension], and which of them lie in the image, bool [B, h, w].
    """
    grid = max(m.shape[1:3] for m in maps)
    total = 0.0
    for m, kernel in zip(maps, kernels, strict=True):
        m = m.astype(jnp.float32)
        if valid is not None:
            m = jnp.where(inside(valid, m.shape[1:3])[..., None], m, 0)
        layout = ("NHWC", "HWIO", "NHWC")
        patches = jax.lax.conv_general_dilated(
            m, kernel, (1, 1), "SAME", dimension_numbers=layout, precision="highest"
        )
        size = (len(m), *grid, kernel.shape[-1])
        total += jax.image.resize(patches, size, "bilinear", antialias=False)
    return total, jnp.ones(total.shape[:3], bool) if valid is None else inside(valid, grid)


def k_center(rows: np.ndarray, n: int, start: int) -> Iterator[np.ndarray]:
    """Greedy k-center: again and again the row farthest from all that are chosen (algorithm 1).

    Exact (but for ties), and quicker than a pass over all rows for each point: distances to what
    is chosen only fall. So while the farthest of some candidates, whose distances are kept up to
    date, is farther than any other row was at the last pass, it is the farthest of all.

    Args:
      rows: [N, C], float32; they are spread over the devices.
      n: how many to choose, up to N.
      start: the first.

    Yields:
      The indices of the next points, the start first.
    """
    missing = -len(rows) % parallel.n_own_devices()
    padded = np.pad(rows - rows.mean(0), ((0, missing), (0, 0)))
    squares = parallel.split(np.sum(padded**2, axis=1))
    # Of padding and of what is chosen it is -1, and they are never the farthest.
    far = parallel.split(np.where(np.arange(len(padded)) < len(rows), np.inf, -1.0).astype("f"))
    rows = parallel.split(padded)
    far = _update(rows, squares, far, jnp.full(1, start))
    yield np.array([start])
    left = n - 1
    while left:
        far, picked, count = _pick(rows, squares, far, min(left, _PICKS))
        yield np.asarray(picked)[: int(count)]
        left -= int(count)


@jax.jit
def _pick(rows, squares, far, most):
    """At least one and up to `most` points, [_PICKS] with their count, and `far` after them."""
    bounds, index = jax.lax.top_k(far, min(_CANDIDATES, len(far)))
    candidates = rows[index]
    others = bounds[-1] if len(index) < len(far) else -jnp.inf

    def goes_on(state):
        count, far, _ = state
        return (count < most) & ((count == 0) | (far.max() > others))

    def body(state):
        count, far, picked = state
        i = far.argmax()
        far = jnp.minimum(far, jnp.sum((candidates - candidates[i]) ** 2, axis=1)).at[i].set(-1)
        return count + 1, far, picked.at[count].set(index[i])

    picked = jnp.full(_PICKS, index[0])
    count, _, picked = jax.lax.while_loop(goes_on, body, (0, bounds, picked))
    return _update(rows, squares, far, picked), picked, count


@jax.jit
def _update(rows, squares, far, picked):
    """Squared distances [N] to what is chosen, with the points `picked` chosen too."""
    points = rows[picked]
    products = jnp.matmul(rows, points.T, precision="highest")
    distances = squares[:, None] - 2 * products + squares[picked]
    return jnp.minimum(far, distances.min(1).clip(0)).at[picked].set(-1)


@dataclasses.dataclass(frozen=True)
class PatchCoreScorer(PickledByFields):
    """Scores features; higher is more anomalous."""

    config: object  # filled, see `config.fill`
    shapes: tuple[tuple[int, ...], ...]  # (h, w, C) of each level
    bank: np.ndarray  # [M, dimension]

    def score_features(
        self,
        features: Features,
        valid: np.ndarray | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features of images -> scores [B] and anomaly maps [B, H, W].

        Args: see `FastFlowScorer.score_features`.
        """
        run = self._programs(tuple(size or self.config.image_size))
        return run(self._state, (features, valid))

    predict_features = without_likelihood

    @functools.cached_property
    def _state(self):
        centre = self.bank.mean(0)
        kernels = pooling_kernels(self.shapes, self.bank.shape[1])
        return parallel.on_devices((kernels, centre, self.bank - centre))

    @functools.cached_property
    def _programs(self):
        """From the size of images to what scores their features."""
        config = self.config  # not `self`: what holds itself is freed late
        c = config.patchcore

        def program(size):
            def score(state, batch):
                kernels, centre, bank = state
                patches, seen = embed(kernels, *batch)
                patches = (patches - centre).reshape(len(patches), -1, patches.shape[-1])
                neighbours = min(c.neighbours, len(bank))
                # One image at a time: the distances of all would take much memory.
                distances, index = jax.lax.map(lambda p: nearest(p, bank, neighbours), patches)
                scores = distances.mean(-1).reshape(seen.shape)
                scores = without_padding(scores, seen)
                image_score = scores.max((1, 2))
                if c.reweight:
                    worst = scores.reshape(len(scores), -1).argmax(1)
                    image, nearest_row = jnp.arange(len(worst)), index[..., 0]
                    image_score *= weights(
                        patches[image, worst], nearest_row[image, worst], bank, c.reweight
                    )
                return image_score, resize_map(scores, size, config.map.sigma)

            return parallel.per_example(score, config.parallel, config.batch_size)

        return functools.cache(program)


def weights(patches: jax.Array, rows: jax.Array, bank: jax.Array, k: int) -> jax.Array:
    """1 - exp |p - m| / sum of exp |p - m'| over the k nearest m' to m in the bank (equation 7).

    A patch whose nearest row m is a lonely one counts for more. m is one of its own neighbours.

    Args:
      patches: p, [B, C].
      rows: index of m in the bank, [B].
      bank: [M, C].
      k: neighbours, as many of them as there are rows.
    """
    _, index = nearest(bank[rows], bank, min(k, len(bank)))
    distances = jnp.linalg.norm(patches[:, None] - bank[index], axis=-1)  # [B, k]
    own = jnp.linalg.norm(patches - bank[rows], axis=-1)
    return 1 - jnp.exp(own - jax.nn.logsumexp(distances, axis=-1))
