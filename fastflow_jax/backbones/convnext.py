"""ConvNeXt, https://arxiv.org/abs/2201.03545, also as trained by DINOv3 (arXiv 2508.10104)."""

import functools
from collections.abc import Iterator

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from fastflow_jax.backbones.convolution import Conv
from fastflow_jax.backbones.spec import Architecture, Maps, Spec, collect
from fastflow_jax.backbones.vit import Mlp

_EPSILON = 1e-6


class Block(nn.Module):
    """Depthwise 7x7 convolution, norm and two dense layers on [B, h, w, C], with a shortcut."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        gamma = self.param("gamma", nn.initializers.ones, (c,))
        y = Conv(c, 7, 1, 3, c, use_bias=True, dtype=self.dtype, name="conv_dw")(x)
        y = nn.LayerNorm(_EPSILON, dtype=self.dtype, name="norm")(y)
        y = Mlp(4 * c, "gelu", self.dtype, name="mlp")(y)
        return x + y * gamma.astype(y.dtype).reshape(1, 1, 1, -1)


class ConvNeXt(Architecture):
    """ConvNeXt with its stages "stages.0" to "stages.3" as layers; h = floor(H / stride).

    Attributes:
      depths: number of blocks of each stage.
      width: channels of the first stage; each stage has twice as many as the one before.
    """

    depths: tuple[int, ...] = ()
    width: int = 96

    @property
    def maps(self) -> Maps:
        return {f"stages.{i}": (self.width * 2**i, 4 * 2**i) for i in range(4)}

    @property
    def blocks(self) -> Maps:
        found = {}
        for (stage, shape), depth in zip(self.maps.items(), self.depths, strict=True):
            found |= {f"{stage}.blocks.{j}": shape for j in range(depth)} | {stage: shape}
        return found

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        conv = functools.partial(Conv, padding=0, use_bias=True, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, _EPSILON, dtype=self.dtype)

        def outputs() -> Iterator[tuple[str, jax.Array]]:
            x = conv(self.width, 4, 4, name="stem_0")(images)
            x = norm(name="stem_1")(x)
            for i, (stage, (channels, _)) in enumerate(self.maps.items()):
                if i > 0:
                    x = norm(name=f"stages_{i}_downsample_0")(x)
                    x = conv(channels, 2, 2, name=f"stages_{i}_downsample_1")(x)
                for j in range(self.depths[i]):
                    x = Block(self.dtype, name=f"stages_{i}_blocks_{j}")(x)
                    yield f"{stage}.blocks.{j}", x
                yield stage, x

        return collect(outputs(), self.layers)


def _spec(
    name: str, parameters: int, depths: tuple[int, ...], width: int, tag: str = "in12k_ft_in1k"
) -> Spec:
    return Spec(
        name=name,
        tag=tag,
        parameters=parameters,
        architecture=ConvNeXt(depths=depths, width=width),
        layers=("stages.0", "stages.1", "stages.2"),
        image_size=(256, 256),
        # Not published for FastFlow: the values for ResNets.
        flow={"norm": "layer", "steps": 8, "kernels": (3, 1), "hidden_ratio": 1.0},
        unused=("head.",),
    )


_DEEP = (3, 3, 27, 3)

CONVNEXTS = (
    _spec("convnext_tiny", 28_589_128, (3, 3, 9, 3), 96),
    _spec("convnext_small", 50_223_688, _DEEP, 96),
    _spec("convnext_base", 88_591_464, _DEEP, 128, tag="fb_in22k_ft_in1k"),
)
