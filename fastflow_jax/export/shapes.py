"""Primitives of JAX that change shapes, or select and join parts, as operations of ONNX."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastflow_jax.errors import InputError
from fastflow_jax.export.graph import (
    Constant,
    Dim,
    Graph,
    Tensor,
    Value,
    layout,
    with_axes,
    written_out,
)


def renamed(graph: Graph, x: Value, shape: Sequence[Dim], places: Mapping[int, int]) -> Value:
    """A value whose axis `a` becomes the axis `places[a]` of a shape; others have a size of 1.

    Entries are repeated along axes of the shape that are new, or had a size of 1.
    """
    shape = tuple(shape)
    if isinstance(x, Constant):
        kept = sorted(places, key=places.__getitem__)
        array = x.array.transpose([*kept, *(a for a in range(x.array.ndim) if a not in places)])
        sizes = [1] * len(shape)
        for axis in kept:
            sizes[places[axis]] = x.array.shape[axis]
        return Constant(shape, array.reshape(sizes))
    dropped = [a for a in x.axes if a not in places or x.shape[a] != shape[places[a]]]
    name, axes = x.name, [a for a in x.axes if a not in dropped]
    if dropped:
        name = graph.add("Squeeze", name, graph.integers(*(x.axes.index(a) for a in dropped)))
    return Tensor(shape, name, tuple(places[a] for a in axes))


def broadcast(graph: Graph, eqn: Any, x: Value) -> Value:
    """Repeats entries along new axes."""
    return renamed(
        graph, x, eqn.params["shape"], dict(enumerate(eqn.params["broadcast_dimensions"]))
    )


def squeeze(graph: Graph, eqn: Any, x: Value) -> Value:
    """Removes axes of size 1."""
    return without(graph, x, eqn.params["dimensions"])


def without(graph: Graph, x: Value, axes: Sequence[int]) -> Value:
    """Removes axes of size 1."""
    kept = [axis for axis in range(len(x.shape)) if axis not in axes]
    return renamed(graph, x, [x.shape[a] for a in kept], {a: i for i, a in enumerate(kept)})


def transpose(graph: Graph, eqn: Any, x: Value) -> Value:
    """Permutes axes."""
    order = eqn.params["permutation"]
    return renamed(graph, x, [x.shape[a] for a in order], {a: i for i, a in enumerate(order)})


def reshape(graph: Graph, eqn: Any, x: Value) -> Value:
    """Splits and merges axes; axes of size 1 come and go without a node."""
    shape = eqn.outvars[0].aval.shape
    before, after = ([a for a, size in enumerate(s) if size != 1] for s in (x.shape, shape))
    if [x.shape[a] for a in before] == [shape[a] for a in after]:
        return renamed(graph, x, shape, dict(zip(before, after, strict=True)))
    free = [size for size in shape if not isinstance(size, int)]
    if len(free) > 1:
        raise InputError(f"The ONNX export cannot reshape {x.shape} to {shape}: two free sizes.")
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    name = graph.add("Reshape", written_out(graph, x), graph.integers(*sizes))
    return Tensor(shape, name, tuple(range(len(shape))))


def concatenate(graph: Graph, eqn: Any, *values: Value) -> Value:
    """Joins values along an axis."""
    return _joined(graph, values, eqn.outvars[0].aval.shape, eqn.params["dimension"])


def _joined(graph: Graph, values: Sequence[Value], shape: tuple[Dim, ...], axis: int) -> Tensor:
    axes = layout(*values, needed=range(len(shape)))
    names = [written_out(graph, value, axes) for value in values]
    return Tensor(shape, graph.add("Concat", *names, axis=axes.index(axis)), axes)


def stack(graph: Graph, eqn: Any, *values: Value) -> Value:
    """Joins values along a new axis."""
    shape = eqn.outvars[0].aval.shape
    axis = eqn.params["axis"] % len(shape)
    others = [a for a in range(len(shape)) if a != axis]
    part = tuple(1 if a == axis else size for a, size in enumerate(shape))
    places = dict(enumerate(others))
    return _joined(graph, [renamed(graph, x, part, places) for x in values], shape, axis)


def split(graph: Graph, eqn: Any, x: Value) -> list[Value]:
    """Cuts a value into parts along an axis."""
    return _cut(graph, x, eqn.params["axis"], eqn.params["sizes"])


def unstack(graph: Graph, eqn: Any, x: Value) -> list[Value]:
    """Cuts a value into its entries along an axis, which is removed."""
    axis = eqn.params["axis"] % len(x.shape)
    entries = _cut(graph, x, axis, [1] * len(eqn.outvars))
    return [without(graph, entry, [axis]) for entry in entries]


def _cut(graph: Graph, x: Value, axis: int, sizes: Sequence[int]) -> list[Value]:
    x = with_axes(graph, x, [axis])
    names = graph.add_with_outputs(
        len(sizes), "Split", x.name, graph.integers(*sizes), axis=x.axes.index(axis)
    )
    shapes = [(*x.shape[:axis], size, *x.shape[axis + 1 :]) for size in sizes]
    return [Tensor(shape, name, x.axes) for shape, name in zip(shapes, names, strict=True)]


def slice_(graph: Graph, eqn: Any, x: Value) -> Value:
    """Takes a range of each axis."""
    p = eqn.params
    strides = p["strides"] or (1,) * len(x.shape)
    return sliced(graph, x, p["start_indices"], eqn.outvars[0].aval.shape, strides)


def sliced(
    graph: Graph, x: Value, starts: Sequence[int], shape: Sequence[Dim], strides: Sequence[int]
) -> Tensor:
    """A range of each axis, from `starts` in steps of `strides`, of the given shape."""
    cut = [a for a, size in enumerate(x.shape) if size != shape[a]]
    own = [a for a in cut if a in x.axes]  # along the others all entries are equal
    x = with_axes(graph, x, own)
    if own:
        begin = [starts[a] for a in own]
        end = [starts[a] + (shape[a] - 1) * strides[a] + 1 for a in own]
        where, steps = [x.axes.index(a) for a in own], [strides[a] for a in own]
        ranges = [graph.integers(*numbers) for numbers in (begin, end, where, steps)]
        return Tensor(tuple(shape), graph.add("Slice", x.name, *ranges), x.axes)
    return Tensor(tuple(shape), x.name, x.axes)


def pad(graph: Graph, eqn: Any, x: Value, value: Value) -> Value:
    """Adds a constant before and after each axis, or removes entries there."""
    config = eqn.params["padding_config"]
    if any(inner for _, _, inner in config):
        raise InputError("The ONNX export does not support padding between entries.")
    x = with_axes(graph, x, [a for a, (low, high, _) in enumerate(config) if low or high])
    pads = [config[a][side] for side in (0, 1) for a in x.axes]
    name = graph.add("Pad", x.name, graph.integers(*pads), written_out(graph, value))
    return Tensor(eqn.outvars[0].aval.shape, name, x.axes)


def iota(graph: Graph, eqn: Any) -> Value:
    """Counts from 0 along an axis."""
    p, shape = eqn.params, eqn.outvars[0].aval.shape
    axis = p["dimension"]
    if not isinstance(shape[axis], int):
        raise InputError("The ONNX export does not support counting along a free axis.")
    sizes = [-1 if a == axis else 1 for a in range(len(shape))]
    return Constant(shape, np.arange(shape[axis]).astype(p["dtype"]).reshape(sizes))


def size(graph: Graph, eqn: Any) -> Tensor:
    """A free size as a number."""
    name = graph.add("Squeeze", graph.sizes([eqn.params["dim"]]))
    return Tensor((), graph.add("Cast", name, to=np.dtype(eqn.outvars[0].aval.dtype)), ())


HANDLERS: Mapping[str, Callable] = {
    "broadcast_in_dim": broadcast,
    "squeeze": squeeze,
    "transpose": transpose,
    "reshape": reshape,
    "concatenate": concatenate,
    "stack": stack,
    "split": split,
    "unstack": unstack,
    "slice": slice_,
    "pad": pad,
    "iota": iota,
    "dim_as_value": size,
}
