"""No backbone: the image itself, for detectors that learn from pixels."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp


class Pixels(nn.Module):
    """Images [B, H, W, 3] -> the same, as the one map."""

    dtype: jnp.dtype = jnp.float32

    def __call__(self, images: jax.Array) -> tuple[jax.Array]:
        return (images.astype(self.dtype).astype(jnp.float32),)


@dataclass(frozen=True)
class PixelsSpec:
    """The image under the same contract as the backbones' feature maps; values from -1 to 1."""

    name: str = "pixels"
    tag: None = None
    parameters: int = 0
    image_size: tuple[int, int] = (32, 32)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    layers: tuple[str, ...] = ("image",)
    package: None = None

    @property
    def flow(self) -> dict:
        """FastFlow was never published for it; a flow of few steps on whitened colours."""
        return {"norm": "whiten", "steps": 4, "kernels": (3,), "hidden_ratio": 16.0}

    @property
    def maps(self) -> dict[str, tuple[int, int]]:
        """Channels and stride of the one layer."""
        return {"image": (3, 1)}

    def module(self, layers: tuple[str, ...], dtype: jnp.dtype = jnp.float32) -> Pixels:
        return Pixels(dtype)


PIXELS = (PixelsSpec(),)
