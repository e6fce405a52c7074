"""Positions of the patches of vision transformers: embeddings and rotations."""

import jax
import jax.numpy as jnp
import numpy as np


def resize_positions(
    positions: jax.Array, height: int, width: int, antialias: bool = True
) -> jax.Array:
    """Interpolates the position embeddings of a square grid for another grid.

    Args:
      positions: embeddings of the patches, without class tokens, [1, n * n, C].
      height: number of rows of the new grid.
      width: number of columns of the new grid.
      antialias: whether to resize as timm does; False for torch's bicubic interpolation, which
        reads four points at any scale.

    Returns:
      The embeddings [1, height, width, C].
    """
    side = round(positions.shape[1] ** 0.5)
    grid = positions.reshape(side, side, -1)
    if antialias:
        resized = jax.image.resize(grid, (height, width, grid.shape[-1]), "bicubic")
    else:
        rows, columns = _cubic(side, height), _cubic(side, width)
        resized = jnp.einsum("yh,xw,hwc->yxc", rows, columns, grid, precision="highest")
    return resized[None]


def _cubic(old: int, new: int) -> np.ndarray:
    """Torch's bicubic interpolation of a row (a = -0.75, edges repeated) as a matrix [new, old]."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centres).astype(int)
    matrix = np.zeros((new, old), np.float32)
    for tap in (-1, 0, 1, 2):
        t = np.abs(centres - (first + tap))
        near = 1.25 * t**3 - 2.25 * t**2 + 1
        far = -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
        column = np.clip(first + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), column), np.where(t <= 1, near, far))
    return matrix


def rotations(height: int, width: int, channels: int, prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the rotary position embedding (RoPE) of DINOv3, arXiv 2508.10104.

    Each side of the grid has coordinates from -1 to 1, so that any size and aspect needs no table.
    The periods are float32 as in timm; Meta's own code rounds them to bfloat16.

    Args:
      height: number of rows of patches.
      width: number of columns of patches.
      channels: of a head, a multiple of 4.
      prefix: number of tokens in front of the patches, which are not rotated.

    Returns:
      float32 [prefix + height * width, channels] each, for `rotate`.
    """
    exponents = np.arange(channels // 4, dtype=np.float32) / np.float32(channels // 4)
    periods = np.float32(100) ** exponents
    sides = [
        (np.arange(n, dtype=np.float32) + np.float32(0.5)) / n * 2 - 1 for n in (height, width)
    ]
    coordinates = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 2, 1)
    angles = (np.float32(2 * np.pi) * coordinates / periods).reshape(-1, channels // 2)
    angles = np.pad(np.tile(angles, 2), ((prefix, 0), (0, 0)))
    return np.cos(angles), np.sin(angles)


def rotate(x: jax.Array, rotation: tuple[np.ndarray, np.ndarray]) -> jax.Array:
    """Rotates the pairs of channels c and c + C / 2 of queries or keys [B, N, heads, C]."""
    cos, sin = (jnp.asarray(table, x.dtype)[:, None] for table in rotation)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], -1) * sin
