"""State dicts: named arrays, their names, shapes and types, and their .safetensors form.

The name of an array in a tree is its path, such as `params/flow_0/affine_0/scale`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from fastflow_jax.errors import InputError

State = Mapping[str, np.ndarray]

_TYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
_DTYPES = {f"{name[0].upper()}{8 * int(name[1])}": np.dtype(name) for name in _TYPES}
_DTYPES |= {"BF16": np.dtype(jnp.bfloat16), "BOOL": np.dtype(np.bool_)}


def flatten(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """State dict of a tree of arrays."""
    return {name: np.asarray(x) for name, x in flatten_dict(dict(tree), sep="/").items()}


def unflatten(state: State) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return unflatten_dict(dict(state), sep="/")


class Slot(NamedTuple):
    """Shape and type of an array in a state dict."""

    shape: tuple[int | None, ...]  # None: any size from 1 on
    kind: Any = jnp.floating  # type of the numbers, or a group of types


def check(state: State, slots: Mapping[str, Slot]) -> None:
    """Checks that a state dict has the arrays of `slots` and no others.

    Args:
      state: arrays by name.
      slots: shape and type of each array by its name.

    Raises:
      InputError: an array is missing, unknown, or of another shape or type.
    """
    problem = next(_problems(state, slots), None)
    if problem is not None:
        raise InputError(
            f"The saved arrays do not fit the detector: {problem}. Restore the detector from a "
            "copy, or train again."
        )


def _problems(state: State, slots: Mapping[str, Slot]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in slots if name not in state)
    yield from (f"{ascii(name)[:99]} is unknown" for name in state if name not in slots)
    for name, (shape, kind) in slots.items():
        x = state[name]
        fits = len(x.shape) == len(shape) and all(
            size >= 1 if wanted is None else size == wanted
            for size, wanted in zip(x.shape, shape, strict=True)
        )
        if not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            yield f"{name} has the shape {x.shape}, not ({sizes})"
        if not jnp.issubdtype(x.dtype, kind):
            yield f"{name} has the type {x.dtype}, not {kind.__name__}"


def to_bytes(state: State) -> bytes:
    """A state dict as the content of a .safetensors file."""
    return safetensors.numpy.save({name: np.asarray(x, order="C") for name, x in state.items()})


def from_bytes(data: bytes) -> dict[str, np.ndarray]:
    """The inverse of `to_bytes`.

    Raises:
      Exception: the data are damaged.
    """
    # `safetensors.numpy.load` does not read bfloat16.
    return {
        name: np.frombuffer(x["data"], _DTYPES[x["dtype"]]).reshape(x["shape"])
        for name, x in safetensors.deserialize(data)
    }
