"""Primitives of JAX that select entries by indices, or find indices, as operations of ONNX."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastflow_jax.errors import InputError
from fastflow_jax.export.graph import Constant, Graph, Tensor, Value, with_axes, written_out
from fastflow_jax.export.shapes import renamed, sliced, without


def gather(graph: Graph, eqn: Any, x: Value, indices: Value) -> Value:
    """Selects entries, or one constant range of each axis."""
    d = eqn.params["dimension_numbers"]
    if isinstance(indices, Constant) and indices.array.size == len(d.start_index_map):
        return _range(graph, eqn, x, indices.array.ravel().tolist())
    if {*d.operand_batching_dims, *d.start_index_map} != {
        *d.operand_batching_dims,
        *d.collapsed_slice_dims,
    }:
        raise InputError("The ONNX export does not support ranges at variable indices.")
    indices = _in_bounds(graph, eqn, x, indices)
    if d.operand_batching_dims or len(d.start_index_map) > 1:
        return _gather_nd(graph, eqn, x, indices)
    return _take(graph, eqn, x, indices)


def _range(graph: Graph, eqn: Any, x: Value, starts: Sequence[int]) -> Value:
    """The range of each axis that begins at a constant index."""
    d, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    begin = dict.fromkeys(range(len(x.shape)), 0) | dict(
        zip(d.start_index_map, starts, strict=True)
    )
    part = sliced(graph, x, list(begin.values()), sizes, [1] * len(sizes))
    rest = without(graph, part, d.collapsed_slice_dims)
    return renamed(graph, rest, eqn.outvars[0].aval.shape, dict(enumerate(d.offset_dims)))


def _in_bounds(graph: Graph, eqn: Any, x: Value, indices: Value) -> Value:
    """The indices, limited to those that exist if the mode asks for it.

    Raises:
      InputError: JAX would fill in values for indices that do not exist.
    """
    mode, axes = eqn.params["mode"].name, eqn.params["dimension_numbers"].start_index_map
    if mode == "PROMISE_IN_BOUNDS":
        return indices
    highest = np.array([x.shape[axis] - 1 for axis in axes], eqn.invars[1].aval.dtype)
    if isinstance(indices, Constant):
        limited = indices.array.clip(0, highest)
        if mode == "CLIP" or np.array_equal(limited, indices.array):
            return Constant(indices.shape, limited)
    if mode != "CLIP":
        raise InputError(
            "The ONNX export does not support indices that may be out of bounds. Pass JAX "
            'mode="clip" or mode="promise_in_bounds".'
        )
    name = graph.add("Max", written_out(graph, indices), graph.constant(highest * 0))
    name = graph.add("Min", name, graph.constant(highest))
    return Tensor(indices.shape, name, tuple(range(len(indices.shape))))


def _take(graph: Graph, eqn: Any, x: Value, indices: Value) -> Tensor:
    """Entries of one axis."""
    d, shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    (axis,) = d.start_index_map
    x = with_axes(graph, x, [axis])
    others = [a for a in range(len(x.shape)) if a != axis]
    places: dict[int, tuple[int, ...]] = {
        a: (place,) for a, place in zip(others, d.offset_dims, strict=True)
    }
    places[axis] = tuple(a for a in range(len(shape)) if a not in d.offset_dims)
    which = written_out(graph, without(graph, indices, [len(indices.shape) - 1]))
    name = graph.add("Gather", x.name, which, axis=x.axes.index(axis))
    return Tensor(shape, name, tuple(place for a in x.axes for place in places[a]))


def _gather_nd(graph: Graph, eqn: Any, x: Value, indices: Value) -> Tensor:
    """Entries at vectors of indices, for each index of the batch axes."""
    d, shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    batch, picked = d.operand_batching_dims, d.start_index_map
    rest = [a for a in range(len(x.shape)) if a not in (*batch, *picked)]
    entries = written_out(graph, x, [*batch, *picked, *rest])
    last = len(indices.shape) - 1
    first = d.start_indices_batching_dims
    order = [*first, *(a for a in range(last) if a not in first)]
    which = written_out(graph, indices, [*order, last])
    which = graph.add("Cast", which, to=np.dtype(np.int64))
    name = graph.add("GatherND", entries, which, batch_dims=len(batch))
    places = [a for a in range(len(shape)) if a not in d.offset_dims]
    return Tensor(shape, name, (*(places[a] for a in order), *d.offset_dims))


def top_k(graph: Graph, eqn: Any, x: Value) -> list[Tensor]:
    """The largest values of an axis and their indices."""
    axis = eqn.params.get("axis", -1) % len(x.shape)
    k = graph.integers(eqn.params["k"])
    x = with_axes(graph, x, [axis])
    values, which = graph.add_with_outputs(2, "TopK", x.name, k, axis=x.axes.index(axis))
    which = graph.add("Cast", which, to=np.dtype(eqn.outvars[1].aval.dtype))
    shape = eqn.outvars[0].aval.shape
    return [Tensor(shape, values, x.axes), Tensor(shape, which, x.axes)]


def extreme(graph: Graph, eqn: Any, x: Value) -> Value:
    """Index of the first largest or smallest value of an axis."""
    (axis,) = eqn.params["axes"]
    x = with_axes(graph, x, [axis])
    op = {"argmax": "ArgMax", "argmin": "ArgMin"}[eqn.primitive.name]
    name = graph.add(op, x.name, axis=x.axes.index(axis), keepdims=1)
    name = graph.add("Cast", name, to=np.dtype(eqn.params["index_dtype"]))
    shape = tuple(1 if a == axis else size for a, size in enumerate(x.shape))
    return without(graph, Tensor(shape, name, x.axes), [axis])


HANDLERS: Mapping[str, Callable] = {
    "gather": gather,
    "top_k": top_k,
    "argmax": extreme,
    "argmin": extreme,
}
