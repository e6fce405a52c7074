"""From energies of locations to anomaly maps and image scores."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy

from fastflow_jax.features.extract import inside


def resize_map(scores: jax.Array, size: tuple[int, int], sigma: float = 0.0) -> jax.Array:
    """Resizes maps, bilinearly with half-pixel centres (torch's align_corners=False), and blurs.

    Args:
      scores: [B, h, w].
      size: (H, W) of the result.
      sigma: standard deviation of the Gaussian blur in pixels of a map whose shorter side is 224,
        scaled to other sizes; borders are mirrored as in scipy's gaussian_filter.

    Returns:
      [B, *size].
    """
    sigma *= min(size) / 224
    # Both are linear and separable: one matrix for rows and one for columns.
    down, across = (
        _interpolation(*sides, sigma) for sides in zip(scores.shape[1:], size, strict=True)
    )
    return jnp.einsum("ih,bhw,jw->bij", down, scores, across, precision="highest")


def _interpolation(before: int, after: int, sigma: float) -> np.ndarray:
    """Matrix [after, before] that interpolates between the centres of cells, and blurs."""
    centres = (np.arange(after) + 0.5) * before / after - 0.5
    centres = np.clip(centres, 0, before - 1)[:, None]
    weights = np.maximum(0, 1 - np.abs(centres - np.arange(before)))
    return scipy.ndimage.gaussian_filter1d(weights, sigma, axis=0) if sigma else weights


def border_weights(size: tuple[int, int], side: int) -> np.ndarray:
    """Share of the neighbourhood of each location that is inside the map, float32 [h, w].

    Args:
      size: (h, w).
      side: height and width of the neighbourhood; 1 for weights of 1. An even side is taken as the
        next odd one.
    """
    reach = side // 2

    def shares(n: int) -> np.ndarray:
        i = np.arange(n)
        return (np.minimum(i + reach, n - 1) - np.maximum(i - reach, 0) + 1) / (2 * reach + 1)

    return np.outer(shares(size[0]), shares(size[1])).astype(np.float32)


def where_counted(anomaly_map: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Replaces the pixels of each map that do not count by the lowest one that does.

    Args:
      anomaly_map: [B, H, W].
      valid: bool [B, h, w], False in pixels that do not count; None if all do.
    """
    if valid is None:
        return anomaly_map
    counts = inside(valid, anomaly_map.shape[1:])
    lowest = anomaly_map.min((1, 2), where=counts, initial=jnp.inf, keepdims=True)
    return jnp.where(counts, anomaly_map, lowest)


def top_mean(anomaly_map: jax.Array, part: float, valid: jax.Array | None = None) -> jax.Array:
    """Mean of the highest `part` of the pixels of each map [B, H, W]; the maximum for 0.

    Args:
      anomaly_map: see `where_counted`, which it is the result of.
      part: of the pixels that count.
      valid: see `where_counted`.
    """
    pixels = anomaly_map.reshape(anomaly_map.shape[0], -1)
    most = max(1, round(part * pixels.shape[1]))
    highest = jax.lax.top_k(pixels, most)[0]
    if valid is None or most == 1:
        return highest.mean(-1)
    share = inside(valid, anomaly_map.shape[1:]).mean((1, 2))
    taken = jnp.maximum(1, jnp.round(share * most))[:, None]
    return highest.mean(-1, where=jnp.arange(most) < taken)


def window_maxima(scores: jax.Array) -> jax.Array:
    """Highest mean of each map [B, h, w] over square windows of sides 1, 2, 4, ... up to its half.

    A scan statistic: a small defect stands out in small windows, a large and faint one in large
    windows. Windows are placed at every location.

    Returns:
      [B, K], in the order of sides.
    """
    maxima, side = [], 1
    while side <= max(1, min(scores.shape[1:]) // 2):
        windows = nn.avg_pool(scores[..., None], (side, side), padding="VALID")
        maxima.append(windows.max((1, 2, 3)))
        side *= 2
    return jnp.stack(maxima, axis=-1)
