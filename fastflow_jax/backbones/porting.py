"""Conversion of timm's tensors to the variables of a module.

The modules have timm's names, so one rule converts all backbones: `layer1.0.conv1` becomes
`layer1_0/conv1`, `stages.1.blocks.0` `stages_1_blocks_0`, `weight` a kernel or a scale, and running
statistics `batch_stats`; kernels are transposed from OIHW to HWIO, or from [out, in] to [in, out].
"""

import difflib
import functools
import re
import zlib
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fastflow_jax.errors import InputError

_TIMM_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0)}  # axes of a kernel, by their number
_LISTED = 12  # differences of one kind in an error


class Slot(NamedTuple):
    """A variable of a module, filled by one tensor of timm."""

    path: tuple[str, ...]
    shape: tuple[int, ...]  # in Flax

    @property
    def axes(self) -> tuple[int, ...]:
        """Axis of timm's tensor for each axis of the variable."""
        n = len(self.shape)
        return _TO_FLAX[n] if self.path[-1] == "kernel" else tuple(range(n))

    @property
    def timm_shape(self) -> tuple[int, ...]:
        """Shape of timm's tensor."""
        return tuple(int(n) for n in np.array(self.shape, int)[np.argsort(self.axes)])


def slots(module: nn.Module, image_size: tuple[int, int]) -> Mapping[str, Slot]:
    """Returns the variables of a module by timm's names of their tensors; computes nothing."""
    return _slots(cast(Hashable, module), image_size)


@functools.lru_cache(maxsize=4)  # called again for each seed of random weights
def _slots(module: Any, image_size: tuple[int, int]) -> Mapping[str, Slot]:
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    image = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, key, image)
    found = {}
    for keys, leaf in jax.tree.leaves_with_path(shapes):
        path = tuple(str(key.key) for key in keys)
        _, *modules, name = path
        parts = [re.sub(r"_(\d+)_?", r".\1.", part).rstrip(".") for part in modules]
        found[".".join([*parts, _TIMM_LEAVES.get(name, name)])] = Slot(path, leaf.shape)
    return dict(sorted(found.items()))


def port(
    wanted: Mapping[str, Slot],
    state: Mapping[str, np.ndarray],
    *,
    is_known: Callable[[str], bool],
    title: str,
) -> dict:
    """Converts a state dict of timm to the variables of a module, float32.

    Args:
      wanted: variables of the module, from `slots`.
      state: tensors by timm's names.
      is_known: whether a tensor that is not in `wanted` belongs to another part of the model.
      title: first line of an error, such as "file.pth does not fit resnet18".

    Raises:
      InputError: tensors are missing, unknown or of another shape (it lists them, each with the
        closest name), or have numbers that are not floating-point, not finite, or negative
        variances.
    """
    missing = [name for name in wanted if name not in state]
    unknown = [
        name
        for name in state
        if not (name in wanted or name.endswith(".num_batches_tracked") or is_known(name))
    ]
    misshapen = [
        name for name in wanted if name in state and state[name].shape != wanted[name].timm_shape
    ]
    if missing or unknown or misshapen:
        lines = _listed(missing, lambda name: f"- {name} is missing{_closest(name, unknown)}")
        lines += _listed(unknown, lambda name: f"+ {name} is unknown{_closest(name, missing)}")
        lines += _listed(
            misshapen,
            lambda name: f"~ {name} is {state[name].shape}, not {wanted[name].timm_shape}",
        )
        raise InputError("\n  ".join([f"{title}:", *lines]))

    def value(name: str, slot: Slot) -> np.ndarray:
        if not jnp.issubdtype(state[name].dtype, jnp.floating):
            raise InputError(f"{title}: {name} must be floating-point, not {state[name].dtype}.")
        array = np.asarray(state[name], np.float32).transpose(slot.axes)
        if not np.isfinite(array).all():
            raise InputError(f"{title}: {name} has numbers that are not finite.")
        if name.endswith("running_var") and (array < 0).any():
            raise InputError(f"{title}: {name} has negative variances.")
        return np.ascontiguousarray(array)

    return unflatten_dict({slot.path: value(name, slot) for name, slot in wanted.items()})


def state_dict(wanted: Mapping[str, Slot], variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `port`: tensors by timm's names.

    Args:
      wanted: variables of the module, from `slots`.
      variables: of the module.
    """
    arrays = flatten_dict(variables)
    return {
        name: np.asarray(arrays[slot.path]).transpose(np.argsort(slot.axes))
        for name, slot in wanted.items()
    }


def _listed(names: list[str], line: Callable[[str], str]) -> list[str]:
    more = [f"... and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return [line(name) for name in names[:_LISTED]] + more


def _closest(name: str, others: list[str]) -> str:
    close = difflib.get_close_matches(name, others[:1000], n=1)
    return f"; the closest name is {close[0]}" if close else ""


def random_variables(wanted: Mapping[str, Slot], seed: int) -> dict:
    """Returns the variables of an untrained model, the control for pretrained features.

    Kernels are normal with variance 1 / fan-in (LeCun), which keeps the variance of signals
    without trained batch statistics. Scales, LayerScale and running variances are 1, biases and
    running means 0, tokens and position embeddings normal with standard deviation 0.02. Each
    variable depends only on the seed and its name, so it is the same on every platform and for any
    layers.
    """

    def value(name: str, slot: Slot) -> np.ndarray:
        leaf = slot.path[-1]
        if leaf in ("bias", "mean"):
            return np.zeros(slot.shape, np.float32)
        if leaf in ("scale", "var") or leaf.startswith("gamma"):
            return np.ones(slot.shape, np.float32)
        deviation = np.prod(slot.shape[:-1]) ** -0.5 if leaf == "kernel" else 0.02
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return rng.standard_normal(slot.shape, np.float32) * np.float32(deviation)

    return unflatten_dict({slot.path: value(name, slot) for name, slot in wanted.items()})
