"""Reductions over axes and windows as operations of ONNX."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastflow_jax.errors import InputError
from fastflow_jax.export.graph import Graph, Tensor, Value, with_axes, written_out

_REDUCTIONS = {
    "reduce_sum": "ReduceSum",
    "reduce_prod": "ReduceProd",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_or": "ReduceMax",
    "reduce_and": "ReduceMin",
}


def reduce(graph: Graph, eqn: Any, x: Value) -> Value:
    """Combines all entries along some axes."""
    axes, op = eqn.params["axes"], _REDUCTIONS[eqn.primitive.name]
    x = with_axes(graph, x, axes)
    is_bool = eqn.invars[0].aval.dtype == bool
    name = graph.add("Cast", x.name, to=np.dtype(np.int32)) if is_bool else x.name
    if axes:
        where = graph.integers(*sorted(x.axes.index(axis) for axis in axes))
        name = graph.add(op, name, where, keepdims=0)
    if is_bool:
        name = graph.add("Cast", name, to=np.dtype(bool))
    kept = [axis for axis in range(len(x.shape)) if axis not in axes]
    order = tuple(kept.index(axis) for axis in x.axes if axis not in axes)
    return Tensor(eqn.outvars[0].aval.shape, name, order)


def reduce_window(graph: Graph, eqn: Any, x: Value) -> Value:
    """Sums or maxima of windows in two of four axes."""
    p = eqn.params
    settings = list(
        zip(p["window_dimensions"], p["window_strides"], map(tuple, p["padding"]), strict=True)
    )
    moving = [axis for axis, each in enumerate(settings) if each != (1, 1, (0, 0))]
    if not moving:
        return x
    if len(settings) != 4 or len(moving) > 2 or {*p["base_dilation"], *p["window_dilation"]} != {1}:
        raise InputError("The ONNX export supports windows in two of four axes only.")
    resting = [axis for axis in range(4) if axis not in moving]
    spatial = sorted([*moving, *resting[2:]])
    axes = (*resting[:2], *spatial)
    window, strides, padding = zip(*(settings[axis] for axis in spatial), strict=True)
    attributes = {"kernel_shape": window, "strides": strides, "pads": _pads(padding)}
    shape, name = eqn.outvars[0].aval.shape, written_out(graph, x, axes)
    if eqn.primitive.name == "reduce_window_max":
        return Tensor(shape, graph.add("MaxPool", name, **attributes), axes)
    mean = graph.add("AveragePool", name, count_include_pad=1, **attributes)
    entries = graph.constant(math.prod(window), eqn.invars[0].aval.dtype)
    return Tensor(shape, graph.add("Mul", mean, entries), axes)


def _pads(padding: Sequence[tuple[int, int]]) -> list[int]:
    """Padding in ONNX's order: all beginnings, then all ends."""
    low, high = zip(*padding, strict=True)
    return [*low, *high]


HANDLERS: Mapping[str, Callable] = {
    **dict.fromkeys(_REDUCTIONS, reduce),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max"), reduce_window),
}
