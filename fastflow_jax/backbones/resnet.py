"""ResNet, https://arxiv.org/abs/1512.03385, and Wide ResNet, https://arxiv.org/abs/1605.07146."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastflow_jax.backbones.convolution import conv_norm


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    channels: int
    stride: int
    conv_norm: Callable

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv_norm(x, self.channels, 3, self.stride, names=("conv1", "bn1"))
        y = self.conv_norm(nn.relu(y), self.channels, 3, names=("conv2", "bn2"))
        return nn.relu(y + _shortcut(self, x))


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1, beside a shortcut."""

    channels: int
    width: int  # channels between the 1x1 convolutions
    stride: int
    conv_norm: Callable

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv_norm(x, self.width, 1, names=("conv1", "bn1"))
        y = self.conv_norm(nn.relu(y), self.width, 3, self.stride, names=("conv2", "bn2"))
        y = self.conv_norm(nn.relu(y), self.channels, 1, names=("conv3", "bn3"))
        return nn.relu(y + _shortcut(self, x))


def _shortcut(block: BasicBlock | Bottleneck, x: jax.Array) -> jax.Array:
    if block.stride == 1 and x.shape[-1] == block.channels:
        return x
    names = ("downsample_0", "downsample_1")
    return block.conv_norm(x, block.channels, 1, block.stride, names=names)


class ResNet(nn.Module):
    """Images [B, H, W, 3] -> a map [B, h, w, C] for each of `layers`, "layer1" to "layer4".

    Computes up to the last of `layers`; h = ceil(H / stride).
    """

    spec: "ResNetSpec"
    layers: tuple[str, ...]
    folded: bool = False  # batch norm is folded into the convolutions
    dtype: jnp.dtype = jnp.float32  # of the computation; maps are float32

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        conv = functools.partial(conv_norm, epsilon=1e-5, folded=self.folded, dtype=self.dtype)
        x = nn.relu(conv(images, 64, 7, 2, names=("conv1", "bn1")))
        # Zeros do for padding: after the ReLU nothing is smaller.
        x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        x = nn.max_pool(x, (3, 3), strides=(2, 2))

        maps = {}
        for i, (layer, (channels, _)) in enumerate(self.spec.maps.items()):
            block = functools.partial(BasicBlock, channels)
            if self.spec.bottleneck:
                block = functools.partial(Bottleneck, channels, self.spec.base_width * 2**i)
            for j in range(self.spec.depths[i]):
                stride = 2 if i > 0 and j == 0 else 1
                x = block(stride, conv, name=f"{layer}_{j}")(x)
            maps[layer] = x.astype(jnp.float32)
            if maps.keys() >= set(self.layers):
                break
        return tuple(maps[layer] for layer in self.layers)


@dataclass(frozen=True)
class ResNetSpec:
    """A ResNet by timm's name, and the published FastFlow's use of it."""

    name: str
    tag: str  # of the weights: timm/<name>.<tag> on the hub
    parameters: int  # of the whole classifier
    depths: tuple[int, ...]  # blocks in each stage
    bottleneck: bool
    base_width: int = 64
    image_size: tuple[int, int] = (256, 256)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    layers: tuple[str, ...] = ("layer1", "layer2", "layer3")
    kernels: tuple[int, ...] = (3,)  # of the flow
    package: str | None = None  # none on PyPI holds the weights
    unused: tuple[str, ...] = ("fc.",)  # what timm's file holds after the last layer

    @property
    def flow(self) -> dict:
        """FastFlow's settings for this backbone."""
        return {"norm": "layer", "steps": 8, "kernels": self.kernels, "hidden_ratio": 1.0}

    @property
    def maps(self) -> dict[str, tuple[int, int]]:
        """Channels and stride of each layer that can be asked for, in order of depth."""
        expansion = 4 if self.bottleneck else 1
        return {f"layer{i + 1}": (64 * expansion * 2**i, 4 * 2**i) for i in range(4)}

    def module(self, layers: tuple[str, ...], dtype: jnp.dtype = jnp.float32) -> ResNet:
        return ResNet(self, layers, dtype=dtype)

    def timm_name(self, name: str) -> str:
        """The name in timm of a tensor in a weight file: itself."""
        return name


RESNETS = (
    ResNetSpec("resnet18", "tv_in1k", 11_689_512, (2, 2, 2, 2), bottleneck=False),
    ResNetSpec("resnet34", "tv_in1k", 21_797_672, (3, 4, 6, 3), bottleneck=False),
    ResNetSpec("resnet50", "tv_in1k", 25_557_032, (3, 4, 6, 3), bottleneck=True, kernels=(3, 1)),
    ResNetSpec(
        "wide_resnet50_2",
        "racm_in1k",
        68_883_240,
        (3, 4, 6, 3),
        bottleneck=True,
        base_width=128,
        kernels=(3, 1),
    ),
)
