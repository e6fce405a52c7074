"""FastFlow: feature maps -> flows -> likelihood -> anomaly map and score.

Yu et al., FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows
(arXiv 2111.07677).
"""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import gaussian_filter1d

from fastflow_jax.errors import InputError
from fastflow_jax.flows import Flow

NORMS = ("whiten", "standardise", "layer", "layer_plain", "none")
Latents = tuple[tuple[jax.Array, jax.Array], ...]  # one (z [B, h, w, C], log_det [B, h, w]) a scale


class FeatureNorm(nn.Module):
    """What stands between the frozen backbone and the flow of one scale, [B, h, w, C] -> same.

    Attributes:
      kind: "whiten" makes the channels uncorrelated, with mean 0 and deviation 1 over the
        training set, and "standardise" only the latter; their numbers lie in the collection
        "statistics", see `extract.channel_statistics`. "layer" is the reference's layer norm of
        each image over h, w and C, with a trainable scale and offset for every place and channel,
        which ties the model to one input size; "layer_plain" is the same without them. "none"
        leaves features as they are: the reference's way with transformers, which end in a norm.
    """

    kind: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind == "none":
            return x
        channels = x.shape[-1]
        if self.kind in ("whiten", "standardise"):
            mean = self.variable("statistics", "mean", jnp.zeros, (channels,)).value
            if self.kind == "standardise":
                return (x - mean) / self.variable("statistics", "std", jnp.ones, (channels,)).value
            return (x - mean) @ self.variable("statistics", "whitening", jnp.eye, channels).value
        affine = self.kind == "layer"
        axes = (-3, -2, -1)
        return nn.LayerNorm(
            epsilon=1e-5,
            use_scale=affine,
            use_bias=affine,
            reduction_axes=axes,
            feature_axes=axes,
            use_fast_variance=False,
        )(x)


class FastFlow(nn.Module):
    """A flow for each scale of a backbone's features; call it with the tuple of maps.

    Attributes:
      norm: see `FeatureNorm`.
      steps, kernels, hidden_ratio, clamp, coupling, affine, zero_init, dtype, reversible,
        out_kernel: see `flows.Flow`.
    """

    norm: str = "whiten"
    steps: int = 8
    kernels: tuple[int, ...] = (3, 1)
    hidden_ratio: float = 1.0
    clamp: float = 2.0
    coupling: str = "single"
    affine: str = "softplus"
    zero_init: bool = False
    dtype: jnp.dtype | None = None
    reversible: bool = False
    out_kernel: int | None = None

    @nn.compact
    def __call__(
        self,
        features: Sequence[jax.Array],
        cut: Callable[[int, jax.Array], jax.Array] = lambda scale, x: x,
    ) -> Latents:
        """Map features, [B, h, w, C] a scale, to (z [B, h, w, C], log_det [B, h, w]) a scale.

        Args:
          features: of the backbone.
          cut: (scale, its normalised map) -> the part that the flow sees, see `random_windows`;
            all of it by default.
        """
        latents = []
        for i, x in enumerate(features):
            norm = FeatureNorm(self.norm, name=f"norm_{i}")
            x = cut(i, norm(x.astype(jnp.float32)))
            latents.append(_flow(self, name=f"flow_{i}")(x))
        return tuple(latents)


def _flow(model: FastFlow, name: str | None = None) -> Flow:
    """The flow of one scale."""
    return Flow(
        model.steps,
        tuple(model.kernels),
        model.hidden_ratio,
        model.clamp,
        model.coupling,
        model.affine,
        model.zero_init,
        model.dtype,
        model.reversible,
        model.out_kernel,
        name=name,
    )


def invert(model: FastFlow, variables: dict, latents: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The features, [B, h, w, C] a scale, that `model` maps to z of the same shapes.

    Raises:
      InputError: the norm is one of each image, whose mean and deviation z does not tell.
    """
    if model.norm not in ("whiten", "standardise", "none"):
        raise InputError(
            f"z cannot be mapped back through flow.norm={model.norm!r}, which forgets each image's "
            "mean and deviation: train with whiten, standardise or none"
        )
    flow, features = _flow(model), []
    for i, z in enumerate(latents):
        own = {k: tree[f"flow_{i}"] for k, tree in variables.items() if f"flow_{i}" in tree}
        x, _ = flow.apply(own, z.astype(jnp.float32), inverse=True)
        statistics = variables.get("statistics", {}).get(f"norm_{i}", {})
        if "whitening" in statistics:
            x = x @ jnp.linalg.inv(statistics["whitening"])
        elif "std" in statistics:
            x = x * statistics["std"]
        features.append(x + statistics.get("mean", 0.0))
    return tuple(features)


def random_windows(x: jax.Array, side: int, keys: jax.Array) -> jax.Array:
    """A random part of each image's map, [B, h, w, C] -> up to `side` places high and wide.

    Convolutions share what they learn between places, so a few of a fine map teach them.

    Args:
      x: the maps.
      side: of the parts, in places.
      keys: [B].
    """
    height, width = (min(side, n) for n in x.shape[1:3])
    if (height, width) == x.shape[1:3]:
        return x

    def of_image(x, key):
        highest = jnp.array([x.shape[0] - height, x.shape[1] - width])
        first = jax.random.randint(key, (2,), 0, highest + 1)
        return jax.lax.dynamic_slice(x, (*first, 0), (height, width, x.shape[-1]))

    return jax.vmap(of_image)(x, keys)


def negative_log_likelihood(
    latents: Latents,
    *,
    per_dimension: bool,
    inside: Sequence[jax.Array] | None = None,
) -> jax.Array:
    """-log p of each image's features, in nats, [B] (section 3.3, equations 2 and 3).

    Args:
      latents: see `FastFlow`.
      per_dimension: the mean over all dimensions of all scales, constant included, so that it
        compares across input sizes; otherwise the reference's loss, the sum over all dimensions
        without the constant (order 1e5, and negative once the flow has learnt: a density may
        exceed 1).
      inside: bool [B, h, w] a scale, False for locations that do not count; None where all do.
    """
    energy, dimensions = 0.0, 0.0
    for i, (z, log_det) in enumerate(latents):
        counts = jnp.ones(log_det.shape) if inside is None else inside[i].astype(jnp.float32)
        energy += jnp.sum(counts * (0.5 * jnp.sum(z**2, axis=-1) - log_det), axis=(1, 2))  # [B]
        dimensions += z.shape[-1] * counts.sum((1, 2))
    if not per_dimension:
        return energy
    # A part of an image may be all padding.
    return energy / jnp.maximum(dimensions, 1.0) + 0.5 * math.log(2 * math.pi)


def location_scores(
    z: jax.Array,
    log_det: jax.Array,
    *,
    form: str,
    log_det_weight: float,
    squares: jax.Array | None = None,
) -> jax.Array:
    """How unlikely each location of one scale is, [B, h, w]; higher is more anomalous.

    Args:
      z: [B, h, w, C].
      log_det: [B, h, w].
      form: "log" is -log p per channel without the constant; "probability" is -exp of the negative
        of that, in [-1, 0] without log-det: the reference's map, which saturates where z is large.
      log_det_weight: how far the log-determinant counts: 1 in a likelihood, 0 in the reference,
        which asks how far z lies from the centre and not how dense features lie there.
      squares: [B, h, w], what stands in the place of |z|^2, if anything does: see `bank`.
    """
    squares = jnp.sum(z**2, axis=-1) if squares is None else squares
    energy = (0.5 * squares - log_det_weight * log_det) / z.shape[-1]
    return -jnp.exp(-energy) if form == "probability" else energy


def resize_map(scores: jax.Array, size: tuple[int, int], sigma: float = 0.0) -> jax.Array:
    """[B, h, w] -> [B, *size], bilinear with half-pixel centres (torch's align_corners=False).

    Args:
      scores: the maps.
      size: (H, W) of the result.
      sigma: of a Gaussian that the result is blurred by, mirrored at the borders as scipy's
        gaussian_filter does, in pixels of a map whose shorter side is 224; of others in proportion.
    """
    sigma *= min(size) / 224
    # Both are linear and work on rows and columns apart: one matrix each, whatever the blur.
    down, across = (
        _interpolation(*sides, sigma) for sides in zip(scores.shape[1:], size, strict=True)
    )
    return jnp.einsum("ih,bhw,jw->bij", down, scores, across, precision="highest")


def _interpolation(before: int, after: int, sigma: float) -> np.ndarray:
    """The matrix [after, before] that interpolates between cells' centres and blurs."""
    centres = (np.arange(after) + 0.5) * before / after - 0.5
    centres = np.clip(centres, 0, before - 1)[:, None]
    weights = np.maximum(0, 1 - np.abs(centres - np.arange(before)))
    return gaussian_filter1d(weights, sigma, axis=0) if sigma else weights


def top_mean(anomaly_map: jax.Array, part: float) -> jax.Array:
    """Mean of the highest `part` of each map [B, H, W], [B]; the maximum for 0."""
    pixels = anomaly_map.reshape(len(anomaly_map), -1)
    return jax.lax.top_k(pixels, max(1, round(part * pixels.shape[1])))[0].mean(-1)


def window_maxima(scores: jax.Array) -> jax.Array:
    """The highest average of [B, h, w] over square windows of sides 1, 2, 4, ..., up to half of it.

    A scan statistic: a small defect stands out in small windows, a large and faint one in large
    ones. Windows are placed at every location.

    Returns:
      [B, K], from the single location on.
    """
    maxima, side = [], 1
    while side <= max(1, min(scores.shape[1:]) // 2):
        windows = nn.avg_pool(scores[..., None], (side, side), padding="VALID")
        maxima.append(windows.max((1, 2, 3)))
        side *= 2
    return jnp.stack(maxima, axis=-1)
