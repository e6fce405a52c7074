"""The image itself as a feature map, for detectors that learn from pixels."""

import jax
import jax.numpy as jnp

from fastflow_jax.backbones.spec import HALF, Architecture, Maps, Spec


class Pixels(Architecture):
    """Identity with the one layer "image"."""

    @property
    def maps(self) -> Maps:
        return {"image": (3, 1)}

    def __call__(self, images: jax.Array) -> tuple[jax.Array]:
        return (images.astype(self.dtype).astype(jnp.float32),)


PIXELS = (
    Spec(
        name="pixels",
        tag=None,
        parameters=0,
        architecture=Pixels(),
        layers=("image",),
        image_size=(32, 32),
        mean=HALF,
        std=HALF,
        # Not published: few steps on whitened colours.
        flow={"norm": "whiten", "steps": 4, "kernels": (3,), "hidden_ratio": 16.0},
    ),
)
