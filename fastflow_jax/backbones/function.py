"""A function of Python as a backbone: any Flax, Keras or plain JAX model."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax.backbones.spec import Maps, Spec
from fastflow_jax.errors import InputError

# FastFlow's fields with `config.published`: those for ResNets.
_FLOW = {"norm": "layer", "steps": 8, "kernels": (3,), "hidden_ratio": 1.0}


@dataclasses.dataclass(frozen=True)
class Function:
    """Network of a backbone that calls a function, with the interface of `Architecture`.

    Attributes:
      outputs: name, channels and stride of each map.
      function: `(variables, images [B, H, W, 3]) -> maps`; None in a specification, which needs
        only the maps.
    """

    outputs: tuple[tuple[str, int, int], ...]
    function: Callable | None = None

    @property
    def maps(self) -> Maps:
        return {name: (channels, stride) for name, channels, stride in self.outputs}

    @property
    def blocks(self) -> Maps:
        return self.maps

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(self.maps)

    def apply(self, variables: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        """Returns one float32 map [B, h, w, C] for each output."""
        assert self.function is not None
        found = self.function(variables, images)
        maps = tuple(found) if isinstance(found, list | tuple) else (found,)
        return tuple(m.astype(jnp.float32) for m in maps)


def function_spec(
    name: str,
    layers: Sequence[str],
    channels: Sequence[int],
    strides: Sequence[int],
    image_size: Sequence[int],
) -> Spec:
    """Specification of a backbone that is a function, for images in [0, 1].

    Raises:
      InputError: the numbers of names, channels and strides differ, or a name is repeated.
    """
    if not len(set(layers)) == len(layers) == len(channels) == len(strides) > 0:
        raise InputError(
            f"{name} has the layers {tuple(layers)}, channels {tuple(channels)} and strides "
            f"{tuple(strides)}. Give one of each for every map, and each layer another name."
        )
    return Spec(
        name=name,
        tag=None,
        parameters=0,
        architecture=cast(Any, Function(tuple(zip(layers, channels, strides, strict=True)))),
        layers=tuple(layers),
        image_size=(image_size[0], image_size[-1]),
        flow=_FLOW,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def check_maps(module: Function, variables: Any, image_size: tuple[int, int]) -> None:
    """Checks that a function returns the maps that it is said to return; computes nothing.

    Raises:
      InputError: a map is missing, or has another shape.
    """
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    found = [m.shape for m in jax.eval_shape(module.apply, variables, images)]
    described = list(module.maps.values())

    def fits(shape: tuple[int, ...], channels: int, stride: int) -> bool:
        sides = zip(image_size, shape[1:3], strict=False)
        is_map = len(shape) == 4 and shape[3] == channels
        return is_map and all(side // stride <= n <= -(-side // stride) for side, n in sides)

    if len(found) != len(described) or not all(map(fits, found, *zip(*described, strict=True))):
        raise InputError(
            f"The function returns maps of the shapes {found} for an image of "
            f"{image_size[0]}x{image_size[1]}, which are not [B, h, w, C] with (channels, stride) "
            f"of {described}. Pass the channels and strides of all maps in their order."
        )


def probe(module: Function, variables: Any, image_size: tuple[int, int]) -> tuple[float, ...]:
    """Root mean square of each map of a fixed image, to recognise the code of a function."""
    image = np.random.default_rng(0).random((1, *image_size, 3), np.float32)
    maps = jax.jit(module.apply)(variables, image)
    return tuple(float(jnp.sqrt(jnp.square(m).mean())) for m in maps)


def digest(variables: Any) -> str:
    """Sha256 of a tree of arrays: of their places in the tree, types, shapes and numbers."""
    found = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(variables):
        array = np.asarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
