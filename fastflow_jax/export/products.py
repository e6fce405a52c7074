"""Convolutions and products of matrices as operations of ONNX."""

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastflow_jax.errors import InputError
from fastflow_jax.export.graph import (
    Constant,
    Graph,
    Tensor,
    Value,
    aligned,
    with_axes,
    written_out,
)


def convolution(graph: Graph, eqn: Any, x: Value, kernel: Value) -> Tensor:
    """A convolution, channels first; without padding between entries."""
    p, d = eqn.params, eqn.params["dimension_numbers"]
    if set(p["lhs_dilation"]) != {1} or p["batch_group_count"] != 1:
        raise InputError("The ONNX export does not support transposed convolutions.")
    low, high = zip(*p["padding"], strict=True)
    name = graph.add(
        "Conv",
        written_out(graph, x, d.lhs_spec),
        written_out(graph, kernel, d.rhs_spec),
        kernel_shape=[kernel.shape[axis] for axis in d.rhs_spec[2:]],
        strides=p["window_strides"],
        pads=[*low, *high],
        dilations=p["rhs_dilation"],
        group=p["feature_group_count"],
    )
    return Tensor(eqn.outvars[0].aval.shape, name, d.out_spec)


def product(graph: Graph, eqn: Any, x: Value, y: Value) -> Tensor:
    """Sums products over some axes."""
    (over_x, over_y), (batch, of_y) = eqn.params["dimension_numbers"]
    if len(over_x) == 1 and not batch:
        if isinstance(y, Constant) and len(y.shape) == 2:
            return _with_matrix(graph, eqn, x, over_x[0], _matrix(y, over_y[0]), 1)
        if isinstance(x, Constant) and len(x.shape) == 2:
            return _with_matrix(graph, eqn, y, over_y[0], _matrix(x, over_x[0]), 0)
    rows, columns = _free(x, (*over_x, *batch)), _free(y, (*over_y, *of_y))
    if len(over_x) == len(rows) == len(columns) == 1:
        return _of_batches(graph, eqn, x, y, rows[0], columns[0])
    return _einsum(graph, eqn, x, y)


def _free(x: Value, used: Sequence[int]) -> list[int]:
    """Axes that are not used; without those of size 1 if there are others."""
    free = [axis for axis in range(len(x.shape)) if axis not in used]
    return [axis for axis in free if x.shape[axis] != 1] or free[:1]


def _matrix(value: Constant, over: int) -> np.ndarray:
    """The matrix [K, N] of a constant whose axis `over` has the size K."""
    array = np.broadcast_to(value.array, value.shape)
    return array if over == 0 else array.T


def _with_matrix(
    graph: Graph, eqn: Any, x: Value, over: int, matrix: np.ndarray, operand: int
) -> Tensor:
    """x, summed over an axis with a matrix [K, N]; moves axes only if `over` is in front.

    Args:
      graph: to add to.
      eqn: of the product.
      x: the other operand.
      over: its axis of size K.
      matrix: [K, N].
      operand: 0 if the matrix is the first operand, so that N is the first size of the result, or 1
        if it is the last.
    """
    n = len(x.shape)
    others = [axis for axis in range(n) if axis != over]
    places = {axis: i + 1 - operand for i, axis in enumerate(others)}
    places[over] = (n - 1) * operand
    x = with_axes(graph, x, [over])
    axes, name = x.axes, x.name
    if len(axes) == 4 and axes[1] == over:
        kernel = graph.constant(matrix.T[:, :, None, None])
        name = graph.add("Conv", name, kernel, kernel_shape=[1, 1])
    elif len(axes) > 1 and axes[-2] == over:
        name = graph.add("MatMul", graph.constant(matrix.T), name)
    else:
        axes = (*(axis for axis in axes if axis != over), over)
        name = graph.add("MatMul", aligned(graph, x, axes), graph.constant(matrix))
    return Tensor(eqn.outvars[0].aval.shape, name, tuple(places[axis] for axis in axes))


def _of_batches(graph: Graph, eqn: Any, x: Value, y: Value, rows: int, columns: int) -> Tensor:
    """Product of a matrix of x and a matrix of y for each index of the batch axes."""
    ((over_x,), (over_y,)), (batch_x, batch_y) = eqn.params["dimension_numbers"]
    first = written_out(graph, x, [*batch_x, rows, over_x])
    second = written_out(graph, y, [*batch_y, over_y, columns])
    places = [axis for axis in range(len(x.shape)) if axis not in (over_x, *batch_x)]
    others = [axis for axis in range(len(y.shape)) if axis not in (over_y, *batch_y)]
    n = len(batch_x)
    axes = (*range(n), n + places.index(rows), n + len(places) + others.index(columns))
    return Tensor(eqn.outvars[0].aval.shape, graph.add("MatMul", first, second), axes)


def _einsum(graph: Graph, eqn: Any, x: Value, y: Value) -> Tensor:
    """Any product, as a sum over letters."""
    (over_x, over_y), (batch_x, batch_y) = eqn.params["dimension_numbers"]
    letters = iter(string.ascii_lowercase)
    of_x = {axis: next(letters) for axis in range(len(x.shape))}
    of_y = {
        axis: of_x[other]
        for axis, other in zip((*batch_y, *over_y), (*batch_x, *over_x), strict=True)
    }
    of_y |= {axis: next(letters) for axis in range(len(y.shape)) if axis not in of_y}
    result = [of_x[axis] for axis in batch_x]
    result += [c for axis, c in of_x.items() if axis not in (*batch_x, *over_x)]
    result += [of_y[axis] for axis in sorted(of_y) if axis not in (*batch_y, *over_y)]
    terms = "".join(of_x.values()), "".join(of_y[axis] for axis in sorted(of_y))
    name = graph.add(
        "Einsum",
        written_out(graph, x),
        written_out(graph, y),
        equation=f"{terms[0]},{terms[1]}->{''.join(result)}",
    )
    shape = eqn.outvars[0].aval.shape
    return Tensor(shape, name, tuple(range(len(shape))))


HANDLERS: Mapping[str, Callable] = {"conv_general_dilated": convolution, "dot_general": product}
