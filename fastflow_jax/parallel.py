"""The one place that knows devices.

Training and scoring are written as pure functions of a global batch. Here they are compiled for
all devices of this process, as `jax.pmap` over the batch ("pmap", the default) or as `jax.jit`
over a mesh ("jit"). The state is replicated and the batch is split. What the devices do not divide
is padded: in training the rows of padding carry weight zero, in scoring they are cut off again.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fastflow_jax.errors import InputError

AXIS = "batch"
KINDS = ("pmap", "jit")


def total(tree: Any, axis_name: str | None) -> Any:
    """Sum over the devices of a named axis; the tree itself where there is none."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def step(function: Callable, kind: str) -> Callable:
    """Compile `function(state, batch, weight, axis_name=...) -> state`.

    Args:
      function: pure; sums what it reduces over the batch with `total(..., axis_name)`.
      kind: "pmap" or "jit".

    Returns:
      `(state, batch, weight) -> state`; `weight` and the leaves of `batch` have one leading size,
      which the number of devices divides.
    """
    return _compile(function, kind, shared=1, axis=0, reduces=True)


def epoch(function: Callable, kind: str) -> Callable:
    """Compile `function(state, cache, index, weight, axis_name=...) -> state`.

    As `step`, for arguments `index` and `weight` of [steps, B] each, split along B; every device
    holds the whole `cache`.
    """
    return _compile(function, kind, shared=2, axis=1, reduces=True)


def per_example(function: Callable, kind: str, batch_size: int) -> Callable:
    """Compile `function(state, batch) -> outputs`, one output an example.

    Returns:
      `(state, batch) -> outputs` as numpy arrays with the leading size of `batch`. Shorter batches
      are padded to `batch_size`, so that every call runs the same program.
    """
    run = _compile(function, kind, shared=1, axis=0, reduces=False)
    devices = jax.local_device_count()
    size = -(-batch_size // devices) * devices

    def call(state, batch):
        n = jax.tree.leaves(batch)[0].shape[0]
        if n < size:
            repeat = np.minimum(np.arange(size), n - 1)
            batch = jax.tree.map(lambda leaf: leaf[repeat], batch)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:n], run(state, batch))

    return call


def split(array: np.ndarray) -> jax.Array:
    """An array spread over the devices along its first axis, which their number divides.

    What `jax.jit` makes of it, it makes on all of them.
    """
    return jax.device_put(array, NamedSharding(_mesh(), PartitionSpec(AXIS)))


def _mesh():
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)


def _compile(function, kind, *, shared, axis, reduces):
    """`function(*shared, *split)` on all local devices: the first arguments whole, others split.

    `axis` is the one that the batch lies on; `reduces` says that the result is the same on all
    devices, not split along the batch.
    """
    if kind not in KINDS:
        raise InputError(f"parallel is one of {', '.join(KINDS)}, not '{kind}'")
    devices = jax.local_devices()
    if kind == "jit":
        mesh = _mesh()
        whole = NamedSharding(mesh, PartitionSpec())
        split = NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))

        def call(*arguments):
            return function(*arguments, **({"axis_name": None} if reduces else {}))

        def run(*arguments):
            shardings = [whole] * shared + [split] * (len(arguments) - shared)
            return compiled(*map(jax.device_put, arguments, shardings))

        compiled = jax.jit(call, out_shardings=whole if reduces else split)
        return run

    def call(arguments, batch):
        return function(*arguments, *batch, **({"axis_name": AXIS} if reduces else {}))

    def divide(array):
        local = array.shape[axis] // len(devices)
        return array.reshape(*array.shape[:axis], len(devices), local, *array.shape[axis + 1 :])

    mapped = jax.pmap(
        call, AXIS, in_axes=(None, axis), out_axes=None if reduces else 0, devices=devices
    )

    def run(*arguments):
        out = mapped(arguments[:shared], jax.tree.map(divide, arguments[shared:]))
        return out if reduces else jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)

    return run
