"""From the tensors of a timm file to the variables of a module.

The modules carry timm's names, so one rule ports them all: a list index joins the name before it
(`layer1.0.conv1` is `layer1_0/conv1`), `weight` is a kernel or a scale, running statistics are
batch_stats, convolution kernels turn from OIHW to HWIO and linear ones are transposed.
"""

import difflib
import functools
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax.errors import InputError

_TIMM_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
_TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0)}  # axes of a kernel, by their number
_LISTED = 12  # differences of a kind that an error lists


class Slot(NamedTuple):
    """A variable of a module and the tensor of a timm file that fills it."""

    path: tuple[str, ...]
    shape: tuple[int, ...]  # in flax

    @property
    def axes(self) -> tuple[int, ...]:
        """Where each axis of the variable stands in timm's tensor."""
        n = len(self.shape)
        return _TO_FLAX[n] if self.path[-1] == "kernel" else tuple(range(n))

    @property
    def timm_shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in np.array(self.shape, int)[np.argsort(self.axes)])


@functools.lru_cache(maxsize=4)  # each seed of the control asks again
def slots(module: nn.Module, image_size: tuple[int, int]) -> Mapping[str, Slot]:
    """All variables of a module by the names of their tensors in timm; computes nothing."""
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    image = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, key, image)
    found = {}
    for keys, leaf in jax.tree.leaves_with_path(shapes):
        _, *modules, name = path = tuple(key.key for key in keys)
        parts = [re.sub(r"_(\d+)", r".\1", part) for part in modules]
        found[".".join([*parts, _TIMM_LEAVES.get(name, name)])] = Slot(path, leaf.shape)
    return dict(sorted(found.items()))


def _build(wanted: Mapping[str, Slot], value: Callable[[str, Slot], np.ndarray]) -> dict:
    variables: dict[str, Any] = {}
    for name, slot in wanted.items():
        tree = variables
        for part in slot.path[:-1]:
            tree = tree.setdefault(part, {})
        tree[slot.path[-1]] = value(name, slot)
    return variables


def port(
    wanted: Mapping[str, Slot],
    state: Mapping[str, np.ndarray],
    *,
    is_known: Callable[[str], bool],
    title: str,
) -> dict:
    """The variables of a module, float32, from a timm state dict.

    Args:
      wanted: what the module needs, from `slots`.
      state: tensors by timm's names.
      is_known: whether a tensor that is not wanted belongs to the model nevertheless.
      title: what the error says does not fit what.

    Raises:
      InputError: tensors are missing, unknown or of another shape; it lists them all, each with
        the nearest name. Or numbers are no floating-point ones, not finite, or negative variances.
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
        lines = _listed(missing, lambda name: f"- {name} is missing{_nearest(name, unknown)}")
        lines += _listed(unknown, lambda name: f"+ {name} is not known{_nearest(name, missing)}")
        lines += _listed(
            misshapen,
            lambda name: f"~ {name} is {state[name].shape}, not {wanted[name].timm_shape}",
        )
        raise InputError("\n  ".join([f"{title}:", *lines]))

    def value(name: str, slot: Slot) -> np.ndarray:
        if not jnp.issubdtype(state[name].dtype, jnp.floating):
            raise InputError(
                f"{title}: {name} holds {state[name].dtype}, no floating-point numbers"
            )
        array = np.asarray(state[name], np.float32).transpose(slot.axes)
        if not np.isfinite(array).all():
            raise InputError(f"{title}: {name} holds numbers that are not finite")
        if name.endswith("running_var") and (array < 0).any():
            raise InputError(f"{title}: {name} holds variances below zero")
        return np.ascontiguousarray(array)

    return _build(wanted, value)


def _listed(names: list[str], line: Callable[[str], str]) -> list[str]:
    more = [f"... and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return [line(name) for name in names[:_LISTED]] + more


def _nearest(name: str, others: list[str]) -> str:
    close = difflib.get_close_matches(name, others[:1000], n=1)
    return f"; {close[0]} is near" if close else ""


def random_variables(wanted: Mapping[str, Slot], seed: int) -> dict:
    """Variables of an untrained model, the control of every claim about pretrained features.

    Kernels are normal with variance 1 / fan-in (LeCun), so that signals neither die nor saturate
    without trained batch statistics; scales, LayerScale and running variances are 1, biases and
    running means 0, tokens and position embeddings normal with deviation 0.02. Each variable is
    drawn by numpy from the seed and its own name: the same on every platform, whatever layers
    are asked for.
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

    return _build(wanted, value)
