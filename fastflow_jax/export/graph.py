"""The graph under construction, and its values with their layouts.

A value has the shape that it has in JAX. The tensor that holds it may have its axes in another
order, and lacks those along which all entries are equal. So convolutions run channels first, as
ONNX defines them, and elementwise operations after them need neither transposes nor copies.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastflow_jax.errors import InputError

Dim = Any  # an int, or a symbolic dimension of `jax.export`


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the graph.

    Attributes:
      shape: of the value, as in JAX.
      name: of the tensor.
      axes: axes of the value in the order of the tensor's dimensions. The value is constant along
        an axis that is missing.
    """

    shape: tuple[Dim, ...]
    name: str
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Constant:
    """A value that does not depend on the inputs.

    Attributes:
      shape: of the value, as in JAX.
      array: the value, with a size of 1 along axes of equal entries.
    """

    shape: tuple[Dim, ...]
    array: np.ndarray

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes along which entries may differ."""
        return tuple(axis for axis, size in enumerate(self.array.shape) if size != 1)


Value = Tensor | Constant


@dataclasses.dataclass(frozen=True)
class Node:
    """An operation of ONNX; an attribute may be a numpy dtype."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


class Graph:
    """Nodes and constants. Equal nodes and equal constants are added once.

    Attributes:
      nodes: in the order of computation.
      constants: by the name of their tensor.
      scope: prefix of the names of new nodes, such as the path of a module.
    """

    def __init__(self, inputs: Mapping[str, Sequence[Dim]], outputs: Sequence[str]):
        """Starts a graph of inputs with these shapes, and of outputs with these names."""
        self.nodes: list[Node] = []
        self.constants: dict[str, np.ndarray] = {}
        self.scope = ""
        self._producers: dict[str, Node] = {}
        self._known: dict[tuple, Any] = {}
        self._names: dict[str, int] = dict.fromkeys([*inputs, *outputs], 1)
        self._symbols = {
            str(size): (name, axis)
            for name, shape in inputs.items()
            for axis, size in enumerate(shape)
            if not isinstance(size, int)
        }

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output, and returns the output's name."""
        (name,) = self.add_with_outputs(1, op, *inputs, **attributes)
        return name

    def add_with_outputs(self, n: int, op: str, *inputs: str, **attributes: Any) -> tuple[str, ...]:
        """Adds a node with n outputs, and returns their names."""
        key = (op, inputs, n, *sorted((k, str(v)) for k, v in attributes.items()))
        if key not in self._known:
            name = self._unique(op)
            outputs = (name,) if n == 1 else tuple(f"{name}:{i}" for i in range(n))
            node = Node(op, name, inputs, outputs, attributes)
            self.nodes.append(node)
            self._producers |= dict.fromkeys(outputs, node)
            self._known[key] = outputs
        return self._known[key]

    def constant(self, array: Any, dtype: Any = None) -> str:
        """Adds a constant, and returns the name of its tensor."""
        array = np.array(array, dtype, order="C")
        key = ("constant", array.dtype.name, array.shape, hashlib.sha256(array).digest())
        if key not in self._known:
            name = self._unique("constant")
            self.constants[name], self._known[key] = array, name
        return self._known[key]

    def integers(self, *values: int) -> str:
        """Adds an int64 vector, and returns the name of its tensor."""
        return self.constant(values, np.int64)

    def sizes(self, shape: Sequence[Dim]) -> str:
        """The name of an int64 vector of sizes, which may be symbolic."""
        if all(isinstance(size, int) for size in shape):
            return self.integers(*shape)
        return self.add("Concat", *map(self._size, shape), axis=0)

    def producer(self, name: str) -> Node | None:
        """The node that computes a tensor; None for inputs and constants."""
        return self._producers.get(name)

    def needed(self, outputs: Sequence[str]) -> tuple[list[Node], dict[str, np.ndarray]]:
        """The nodes and constants that the outputs depend on."""
        wanted, nodes = set(outputs), []
        for node in reversed(self.nodes):
            if wanted & set(node.outputs):
                nodes.append(node)
                wanted |= set(node.inputs)
        constants = {name: array for name, array in self.constants.items() if name in wanted}
        return nodes[::-1], constants

    def _size(self, size: Dim) -> str:
        """The name of an int64 vector with one size."""
        if isinstance(size, int):
            return self.integers(size)
        if str(size) not in self._symbols:
            raise InputError(
                f"The ONNX export cannot compute the size {size}. Only the sizes "
                f"{', '.join(self._symbols)} of the inputs may be free."
            )
        name, axis = self._symbols[str(size)]
        return self.add("Shape", name, start=axis, end=axis + 1)

    def _unique(self, name: str) -> str:
        name = f"{self.scope}/{name}" if self.scope else name
        self._names[name] = count = self._names.get(name, 0) + 1
        return name if count == 1 else f"{name}_{count}"


def layout(*values: Value, needed: Iterable[int] = ()) -> tuple[int, ...]:
    """The order of axes for an operation on several values: that of the tensor with most axes.

    Of several such tensors, one whose axes a convolution has moved decides, so that the others are
    moved once. Other axes, of the other values and those that are needed in addition, are inserted
    in front of the next one.
    """
    tensors = [value.axes for value in values if isinstance(value, Tensor)]
    axes = list(max(tensors, key=lambda axes: (len(axes), list(axes) != sorted(axes)), default=()))
    others = {*needed, *(axis for value in values for axis in value.axes)} - set(axes)
    for axis in sorted(others):
        at = next((i for i, other in enumerate(axes) if other > axis), len(axes))
        axes.insert(at, axis)
    return tuple(axes)


def aligned(graph: Graph, value: Value, axes: Sequence[int]) -> str:
    """The name of a tensor of a value with a size of 1 along the axes that the value lacks.

    Args:
      graph: of the value.
      value: any.
      axes: of the tensor, in their order; those of the value, or without axes of size 1.
    """
    if isinstance(value, Constant):
        others = [axis for axis in range(value.array.ndim) if axis not in axes]
        array = value.array.transpose([*axes, *others])
        return graph.constant(array.reshape(array.shape[: len(axes)]))
    name, own = value.name, [axis for axis in value.axes if axis in axes]
    if own != list(value.axes):
        dropped = [i for i, axis in enumerate(value.axes) if axis not in axes]
        name = graph.add("Squeeze", name, graph.integers(*dropped))
    order = [axis for axis in axes if axis in own]
    if order != own:
        name = graph.add("Transpose", name, perm=[own.index(axis) for axis in order])
    missing = [i for i, axis in enumerate(axes) if axis not in own]
    return graph.add("Unsqueeze", name, graph.integers(*missing)) if missing else name


def with_axes(graph: Graph, value: Value, axes: Iterable[int]) -> Tensor:
    """The value as a tensor that has at least these axes."""
    if isinstance(value, Tensor) and set(axes) <= set(value.axes):
        return value
    order = layout(value, needed=axes)
    return Tensor(value.shape, written_out(graph, value, order), order)


def written_out(graph: Graph, value: Value, axes: Sequence[int] | None = None) -> str:
    """The name of a tensor with all entries of the value along these axes.

    Args:
      graph: of the value.
      value: any.
      axes: see `aligned`; all axes by default.
    """
    axes = range(len(value.shape)) if axes is None else axes
    shape = [value.shape[axis] for axis in axes]
    if isinstance(value, Constant) and all(isinstance(size, int) for size in shape):
        sizes = [n if a in axes else 1 for a, n in enumerate(value.shape)]
        value = Constant(value.shape, np.broadcast_to(value.array, sizes))
    name = aligned(graph, value, axes)
    if any(axis not in value.axes and value.shape[axis] != 1 for axis in axes):
        name = graph.add("Expand", name, graph.sizes(shape))
    return name
