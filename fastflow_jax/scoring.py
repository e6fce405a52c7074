"""The score of an image as one pure function of its pixels.

`Detector.predict`, `Detector.as_function` and exported detectors share it.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from fastflow_jax import parallel
from fastflow_jax.backbones import Backbone, spec_of
from fastflow_jax.backbones.spec import Network
from fastflow_jax.data.transforms import counted, normalise
from fastflow_jax.detectors.base import CompiledScorer, PickledByFields, Scorer
from fastflow_jax.features.extract import channel_means, extractor, image_means, maps_of
from fastflow_jax.features.foreground import Foreground, region, regions

# Numbers of images of the compiled programs. A single image is not padded to a large batch, and
# at most three programs are compiled.
BATCH_SIZES = (32, 8, 1)


def pure_function(config: Any, module: Network, function: Callable) -> Callable[..., dict]:
    """The function of a detector from pixels to scores.

    Args:
      config: filled.
      module: of the backbone.
      function: of the scorer, see `CompiledScorer.function` or `CompiledScorer.with_likelihood`.

    Returns:
      (state, (images, valid)) -> "score" [B], "anomaly_map" [B, H, W], "means" [B, C], the
      `extract.image_means`; "log_likelihood" [B] if the scorer's function has it; and "counted",
      bool [B, H, W], True in pixels that count, unless all do. `state` is that of `state_of`;
      `images` are uint8 [B, H, W, 3] of the input size, and `valid` is [B, H, W] as in
      `transforms.normalise`, or None.
    """
    spec, size = spec_of(config), tuple(config.image_size)
    extract = maps_of(module, config.length_power, config.feature_dtype)

    def run(state, batch):
        variables, arrays, foreground = state
        images, valid = batch
        features = extract(variables, normalise(images, spec.mean, spec.std, valid))
        valid = region(foreground, features, counted(valid), size)
        found = function(config, size, arrays, (features, valid))
        named = dict(zip(("score", "anomaly_map", "log_likelihood"), found, strict=False))
        means = jnp.concatenate(channel_means(features, valid, jnp.float32), 1)
        return named | {"means": means} | ({} if valid is None else {"counted": valid})

    return run


_TIE = 1e-4  # halves are rounded up, also if the product is a little below


def resize_pixels(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes images as `transforms.resize` does, to within a grey level.

    Pillow's bilinear filter is a matrix for each direction, with rounding after each. Pillow begins
    with the rows if they become fewer and the image is smaller then than after the columns.

    Args:
      images: uint8 [B, h, w, 3].
      size: (height, width) of the result.
    """
    (height, width), (rows, columns) = images.shape[1:3], size
    passes = [("bhwc,vw->bhvc", width, columns), ("bhwc,vh->bvwc", height, rows)]
    if rows < height and rows * width < height * columns:
        passes.reverse()
    x = images.astype(jnp.float32)
    for equation, before, after in passes:
        if before != after:
            product = jnp.einsum(equation, x, _triangles(before, after), precision="highest")
            x = jnp.clip(jnp.floor(product + 0.5 + _TIE), 0, 255)
    return x.astype(jnp.uint8)


def _triangles(before: int, after: int) -> np.ndarray:
    """Pillow's bilinear filter as a matrix [after, before]; it is wider when it shrinks."""
    scale = before / after
    width = max(scale, 1.0)
    centres = (np.arange(after) + 0.5)[:, None] * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(before) + 0.5 - centres) / width)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def state_of(
    backbone: Backbone, scorer: Any, foreground: Foreground | None = None
) -> tuple[Any, Any, Foreground | None]:
    """The arrays that `pure_function` depends on, of a `CompiledScorer`."""
    return backbone.variables, scorer.arrays(), foreground


def scoring_function(scorer: Scorer, *, likelihood: bool) -> Callable | None:
    """The pure function of a scorer, with log-likelihoods if it has them; None without one."""
    if not isinstance(scorer, CompiledScorer):
        return None
    return (likelihood and scorer.with_likelihood) or scorer.function


@dataclasses.dataclass(frozen=True, eq=False)
class ImageScorer(PickledByFields):
    """Scores images of the input size, in batches of `BATCH_SIZES`."""

    config: Any  # filled
    backbone: Backbone
    scorer: Scorer
    foreground: Foreground | None = None  # finds the region of interest; None if it is not found

    def __call__(self, images: np.ndarray, valid: np.ndarray | None) -> dict[str, np.ndarray]:
        """Returns the results of `pure_function` for any number of images."""
        return in_batches(lambda size, part: self._programs(size)(*part), (images, valid))

    @functools.cached_property
    def _programs(self) -> Callable[[int], Callable[..., dict]]:
        """Function from a batch size to the compiled function of images and padding masks."""
        config, backbone, scorer = self.config, self.backbone, self.scorer
        function, found = scoring_function(scorer, likelihood=True), self.foreground
        if function is None:
            return functools.cache(lambda size: _in_steps(config, backbone, scorer, found, size))
        state = parallel.on_devices(state_of(backbone, scorer, found))

        def make(size: int) -> Callable[..., dict]:
            run = _compiled(FrozenConfigDict(config), backbone.module, function, size)
            return lambda *batch: run(state, batch)

        return functools.cache(make)


def in_batches(function: Callable[[int, Any], Any], arrays: Any) -> Any:
    """Applies a function to a tree of arrays [N, ...] in batches of `BATCH_SIZES`.

    Padding is computed like images, so at most three rows of a batch of eight are padding.

    Args:
      function: of the size that a batch is padded to, and a tree of at most that many rows. Returns
        a tree of arrays with a row for each.
      arrays: tree of arrays.
    """
    parallel.check_not_forked()
    n, start, found = len(jax.tree.leaves(arrays)[0]), 0, []
    while start < n:
        left = n - start
        size = next(size for size in BATCH_SIZES if left >= size or (size == 8 and left > 4))
        rows = slice(start, start + size)
        found.append(function(size, jax.tree.map(operator.itemgetter(rows), arrays)))
        start += size
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


@parallel.cached_program
def _compiled(config: FrozenConfigDict, module: Network, function: Callable, size: int):
    return parallel.per_example(pure_function(config, module, function), config.parallel, size)


def _in_steps(
    config: Any, backbone: Backbone, scorer: Scorer, foreground: Foreground | None, size: int
) -> Callable[..., dict]:
    """The function of images and padding masks for scorers without a pure function."""
    spec, config = spec_of(config), config.copy_and_resolve_references()
    with config.unlocked():
        config.batch_size = size
    extract = extractor(backbone, config.length_power, config.parallel, size, config.feature_dtype)
    scorer = dataclasses.replace(scorer, config=config)

    def run(images: np.ndarray, valid: np.ndarray | None) -> dict:
        features = extract(normalise(images, spec.mean, spec.std, valid))
        valid = counted(valid)
        if foreground is not None:
            valid = regions(foreground, features, valid, tuple(config.image_size))
        score, anomaly_map = scorer.score(features, valid)
        found = {"score": score, "anomaly_map": anomaly_map, "means": image_means(features, valid)}
        return found | ({} if valid is None else {"counted": valid})

    return run
