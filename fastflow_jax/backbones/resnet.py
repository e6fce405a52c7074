"""ResNet, https://arxiv.org/abs/1512.03385, and Wide ResNet, https://arxiv.org/abs/1605.07146."""

import functools
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastflow_jax.backbones.convolution import conv_norm
from fastflow_jax.backbones.spec import Architecture, Maps, Spec, collect


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    channels: int
    stride: int
    conv_norm: Callable

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv_norm(x, self.channels, 3, self.stride, names=("conv1", "bn1"))
        y = self.conv_norm(nn.relu(y), self.channels, 3, names=("conv2", "bn2"))
        return nn.relu(y + _shortcut(self, x))


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 with the stride, and 1x1, and a shortcut."""

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


class ResNet(Architecture):
    """ResNet with the layers "layer1" to "layer4"; h = ceil(H / stride).

    Their blocks are "layer1.0" and so on; "act1" is the stem.

    Attributes:
      depths: number of blocks of each layer.
      width: channels between the 1x1 convolutions of "layer1"; None for `BasicBlock`.
      folded: whether batch norm is folded into the convolutions.
    """

    depths: tuple[int, ...] = ()
    width: int | None = None
    folded: bool = False

    @property
    def maps(self) -> Maps:
        first = 64 if self.width is None else 256
        return {f"layer{i + 1}": (first * 2**i, 4 * 2**i) for i in range(4)}

    @property
    def blocks(self) -> Maps:
        found = {"act1": (64, 2)}
        for (layer, shape), depth in zip(self.maps.items(), self.depths, strict=True):
            found |= {f"{layer}.{j}": shape for j in range(depth)} | {layer: shape}
        return found

    @property
    def features(self) -> tuple[str, ...]:
        return ("act1", *self.maps)

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        conv = functools.partial(conv_norm, epsilon=1e-5, folded=self.folded, dtype=self.dtype)

        def outputs() -> Iterator[tuple[str, jax.Array]]:
            x = nn.relu(conv(images, 64, 7, 2, names=("conv1", "bn1")))
            yield "act1", x
            # Padding with zeros equals padding with -inf, since x >= 0.
            x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
            x = nn.max_pool(x, (3, 3), strides=(2, 2))
            for i, (layer, (channels, _)) in enumerate(self.maps.items()):
                block = functools.partial(BasicBlock, channels)
                if self.width is not None:
                    block = functools.partial(Bottleneck, channels, self.width * 2**i)
                for j in range(self.depths[i]):
                    stride = 2 if i > 0 and j == 0 else 1
                    x = block(stride, conv, name=f"{layer}_{j}")(x)
                    yield f"{layer}.{j}", x
                yield layer, x

        return collect(outputs(), self.layers)


def _spec(
    name: str, tag: str, parameters: int, depths: tuple[int, ...], width: int | None = None
) -> Spec:
    return Spec(
        name=name,
        tag=tag,
        parameters=parameters,
        architecture=ResNet(depths=depths, width=width),
        layers=("layer1", "layer2", "layer3"),
        image_size=(256, 256),
        flow={
            "norm": "layer",
            "steps": 8,
            "kernels": (3,) if width is None else (3, 1),
            "hidden_ratio": 1.0,
        },
        unused=("fc.",),
    )


RESNETS = (
    _spec("resnet18", "tv_in1k", 11_689_512, (2, 2, 2, 2)),
    _spec("resnet34", "tv_in1k", 21_797_672, (3, 4, 6, 3)),
    _spec("resnet50", "tv_in1k", 25_557_032, (3, 4, 6, 3), width=64),
    _spec("wide_resnet50_2", "racm_in1k", 68_883_240, (3, 4, 6, 3), width=128),
)
