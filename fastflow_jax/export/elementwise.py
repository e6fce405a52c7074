"""Elementwise primitives of JAX as operations of ONNX."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fastflow_jax.errors import InputError
from fastflow_jax.export.graph import Constant, Graph, Tensor, Value, aligned, layout

UNARY = {
    **{"abs": "Abs", "asinh": "Asinh", "ceil": "Ceil", "cos": "Cos", "erf": "Erf", "exp": "Exp"},
    **{"floor": "Floor", "log": "Log", "logistic": "Sigmoid", "neg": "Neg", "not": "Not"},
    **{"sign": "Sign", "sin": "Sin", "sqrt": "Sqrt", "tanh": "Tanh"},
}
BINARY = {
    **{"add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow"},
    **{"max": "Max", "min": "Min", "and": "And", "or": "Or", "eq": "Equal"},
    **{"lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"},
}
_NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "Pow": 1}  # as the second operand
_COMMUTATIVE = {"Add", "Mul", "Max", "Min"}


def combine(graph: Graph, op: str, eqn: Any, *values: Value) -> Tensor:
    """An elementwise operation with broadcasting."""
    axes = layout(*values)
    names = []
    for value in values:
        first = next((i for i, axis in enumerate(axes) if axis in value.axes), len(axes))
        names.append(aligned(graph, value, axes[first:]))  # ONNX adds axes in front
    return Tensor(eqn.outvars[0].aval.shape, graph.add(op, *names), axes)


def unary(graph: Graph, eqn: Any, x: Value) -> Value:
    """A function of one value, see `UNARY`."""
    if eqn.primitive.name == "not" and eqn.outvars[0].aval.dtype != bool:
        raise InputError("The ONNX export supports 'not' of booleans only.")
    return combine(graph, UNARY[eqn.primitive.name], eqn, x)


def binary(graph: Graph, eqn: Any, x: Value, y: Value) -> Value:
    """A function of two values, see `BINARY`, simplified if possible."""
    op = BINARY[eqn.primitive.name]
    if op in ("And", "Or") and eqn.outvars[0].aval.dtype != bool:
        raise InputError(f"The ONNX export supports {eqn.primitive.name!r} of booleans only.")
    if op in _COMMUTATIVE and isinstance(x, Constant):
        x, y = y, x
    if isinstance(x, Tensor) and isinstance(y, Constant):
        name = _with_constant(graph, op, x, y)
        if name is not None and x.shape == eqn.outvars[0].aval.shape:
            return Tensor(x.shape, name, x.axes)
    return combine(graph, op, eqn, x, y)


def _with_constant(graph: Graph, op: str, x: Tensor, y: Constant) -> str | None:
    """The name of a simpler tensor for `op(x, y)` with the axes of x, or None."""
    before = graph.producer(x.name)
    number = y.array.flat[0] if y.array.size == 1 else None
    if number is not None and number == _NEUTRAL.get(op):
        return x.name
    if op == "Max" and number == 0 and y.array.dtype == np.float32:
        return graph.add("Relu", x.name)
    if before is None:
        return None
    if op == "Min" and number is not None and before.op == "Relu":
        bounds = graph.constant(0, y.array.dtype), graph.constant(number)
        return graph.add("Clip", before.inputs[0], *bounds)
    if op == "Div" and number is not None and before.op == "Mul":
        factor = graph.constants.get(before.inputs[1])
        if factor is not None and factor.size == 1 and factor.flat[0] == number:
            return before.inputs[0]
    if op == "Add" and before.op == "Conv" and len(before.inputs) == 2:
        channel = x.axes[1]
        if set(y.axes) <= {channel}:
            bias = np.broadcast_to(y.array.ravel(), x.shape[channel : channel + 1])
            return graph.add("Conv", *before.inputs, graph.constant(bias), **before.attributes)
    return None


def not_equal(graph: Graph, eqn: Any, x: Value, y: Value) -> Value:
    """Whether x and y differ."""
    equal = combine(graph, "Equal", eqn, x, y)
    return Tensor(equal.shape, graph.add("Not", equal.name), equal.axes)


def clamp(graph: Graph, eqn: Any, low: Value, x: Value, high: Value) -> Value:
    """Limits x to [low, high]."""
    return combine(graph, "Min", eqn, combine(graph, "Max", eqn, x, low), high)


def select(graph: Graph, eqn: Any, which: Value, *cases: Value) -> Value:
    """Chooses between two values."""
    if eqn.invars[0].aval.dtype != bool:
        raise InputError("The ONNX export supports a choice between two values only.")
    return combine(graph, "Where", eqn, which, cases[1], cases[0])


def convert(graph: Graph, eqn: Any, x: Value) -> Value:
    """Converts the type; a conversion to float16 and back rounds, and is kept."""
    if eqn.invars[0].aval.dtype == eqn.params["new_dtype"]:
        return x
    name = graph.add("Cast", aligned(graph, x, x.axes), to=np.dtype(eqn.params["new_dtype"]))
    return Tensor(x.shape, name, x.axes)


def integer_power(graph: Graph, eqn: Any, x: Value) -> Value:
    """Power of x with a constant integer."""
    exponent = eqn.params["y"]
    if exponent == 2:
        return combine(graph, "Mul", eqn, x, x)
    if exponent == -1:
        return combine(graph, "Reciprocal", eqn, x)
    return combine(graph, "Pow", eqn, x, _scalar(eqn, exponent))


def square(graph: Graph, eqn: Any, x: Value) -> Value:
    """Square of x."""
    return combine(graph, "Mul", eqn, x, x)


def reciprocal_root(graph: Graph, eqn: Any, x: Value) -> Value:
    """Reciprocal of the square root of x."""
    return combine(graph, "Reciprocal", eqn, combine(graph, "Sqrt", eqn, x))


def erfc(graph: Graph, eqn: Any, x: Value) -> Value:
    """Complement of the error function."""
    return combine(graph, "Sub", eqn, _scalar(eqn, 1), combine(graph, "Erf", eqn, x))


def is_finite(graph: Graph, eqn: Any, x: Value) -> Value:
    """Whether x is neither infinite nor NaN."""
    infinite, nan = combine(graph, "IsInf", eqn, x), combine(graph, "IsNaN", eqn, x)
    either = combine(graph, "Or", eqn, infinite, nan)
    return Tensor(either.shape, graph.add("Not", either.name), either.axes)


def unchanged(graph: Graph, eqn: Any, *values: Value) -> list[Value]:
    """The values themselves."""
    return list(values)


def _scalar(eqn: Any, number: float) -> Constant:
    return Constant((), np.array(number, eqn.invars[0].aval.dtype))


HANDLERS: Mapping[str, Callable] = {
    **dict.fromkeys(UNARY, unary),
    **dict.fromkeys(BINARY, binary),
    "ne": not_equal,
    "clamp": clamp,
    "select_n": select,
    "convert_element_type": convert,
    "integer_pow": integer_power,
    "square": square,
    "rsqrt": reciprocal_root,
    "erfc": erfc,
    "is_finite": is_finite,
    **dict.fromkeys(("copy", "stop_gradient", "optimization_barrier"), unchanged),
}
