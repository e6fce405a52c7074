"""Conversion of a function traced by JAX, equation by equation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from fastflow_jax.errors import InputError
from fastflow_jax.export import elementwise, indexing, products, reductions, shapes
from fastflow_jax.export.graph import Constant, Graph, Value

# Parameters of primitives that call a function.
_CALLS = {
    **{"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "checkpoint": "jaxpr"},
    **{"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"},
}


def convert(graph: Graph, closed: Any, arguments: Sequence[Value]) -> list[Value]:
    """Adds the nodes of a traced function to a graph.

    Args:
      graph: to add to.
      closed: the function, as `jax.make_jaxpr` returns it.
      arguments: of the function.

    Returns:
      The results of the function.

    Raises:
      InputError: a primitive is not supported.
    """
    values: dict[Any, Value] = dict(zip(closed.jaxpr.invars, arguments, strict=True))
    for var, array in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        values[var] = _constant(array)

    def value(atom: Any) -> Value:
        if isinstance(atom, core.Literal):
            aval: Any = atom.aval
            return _constant(np.asarray(atom.val, aval.dtype))
        return values[atom]

    outer = graph.scope
    for eqn in closed.jaxpr.eqns:
        graph.scope = _scope(outer, eqn)
        results = _convert_equation(graph, eqn, [value(atom) for atom in eqn.invars])
        values |= dict(zip(eqn.outvars, results, strict=True))
    graph.scope = outer
    return [value(atom) for atom in closed.jaxpr.outvars]


def _scope(outer: str, eqn: Any) -> str:
    """Path of an equation, of modules and functions without transformations such as vmap()."""
    inner = str(eqn.source_info.name_stack).split("/")
    return "/".join(part for part in (outer, *inner) if part and "(" not in part)


def _convert_equation(graph: Graph, eqn: Any, inputs: list[Value]) -> Sequence[Value]:
    name = eqn.primitive.name
    if inputs and (folded := _folded(eqn, inputs)) is not None:
        return folded
    if name in _CALLS:
        return convert(graph, _called(eqn), inputs)
    if name not in _HANDLERS:
        where = f" in {graph.scope}" if graph.scope else ""
        raise InputError(
            f"The ONNX export does not support JAX's primitive {name!r}{where}. Choose another "
            "format or detector."
        )
    results = _HANDLERS[name](graph, eqn, *inputs)
    return results if isinstance(results, list) else [results]


def _folded(eqn: Any, inputs: list[Value]) -> list[Value] | None:
    """The results of an equation of constants, computed by JAX; None if it has to be converted."""
    constants = [each for each in inputs if isinstance(each, Constant)]
    if len(constants) < len(inputs):
        return None
    outputs = [var.aval.shape for var in eqn.outvars]
    if any(jnp.issubdtype(var.aval.dtype, jax.dtypes.extended) for var in eqn.outvars):
        return None  # random keys
    if eqn.primitive.name in elementwise.HANDLERS:  # equal entries are computed once
        arrays = np.broadcast_arrays(*(each.array for each in constants))
    elif all(isinstance(size, int) for shape in outputs for size in shape):
        arrays = [np.broadcast_to(each.array, each.shape) for each in constants]
    else:
        return None
    if eqn.primitive.name in _CALLS:
        results = jax.jit(core.jaxpr_as_fun(_called(eqn)))(*arrays)
    else:
        results = eqn.primitive.bind(*map(jnp.asarray, arrays), **eqn.params)
        results = results if eqn.primitive.multiple_results else [results]
    return [Constant(s, np.asarray(r)) for s, r in zip(outputs, results, strict=True)]


def _called(eqn: Any) -> Any:
    """The function that a primitive calls."""
    return _closed(eqn.params[_CALLS[eqn.primitive.name]])


def _closed(inner: Any) -> Any:
    """A function of a primitive with its constants; JAX 0.11 and later have no other form."""
    if hasattr(inner, "consts"):
        return inner
    return core.ClosedJaxpr(inner, ())  # pyright: ignore[reportPrivateImportUsage]


def _constant(array: Any) -> Constant:
    array = np.asarray(array)
    return Constant(array.shape, array)


def _default_platform(graph: Graph, eqn: Any) -> Constant:
    """Index of the branch of `lax.platform_dependent` for platforms that it does not name."""
    platforms = eqn.params["platforms"]
    if None not in platforms:
        raise InputError(
            "The ONNX export needs a default of jax.lax.platform_dependent. Pass default=."
        )
    return _constant(np.int32(platforms.index(None)))


def _branch(graph: Graph, eqn: Any, index: Value, *operands: Value) -> list[Value]:
    """The results of the branch with a constant index."""
    if not isinstance(index, Constant):
        raise InputError("The ONNX export does not support branches that depend on the input.")
    return convert(graph, _closed(eqn.params["branches"][int(index.array)]), operands)


def _loop(graph: Graph, eqn: Any, *inputs: Value) -> list[Value]:
    """A loop over the rows of arrays: all rows at once if steps are independent, or unrolled."""
    body = _closed(eqn.params["jaxpr"])
    # Inputs are constants, carried values and rows; results are carried values and rows. The
    # parameters that count them differ between versions of JAX, so rows are recognised by their
    # leading axis, which a step does not have.
    n_rows = _with_leading_axis(eqn.invars, body.jaxpr.invars)
    n_carried = len(eqn.outvars) - _with_leading_axis(eqn.outvars, body.jaxpr.outvars)
    n_constants = len(inputs) - n_rows - n_carried
    if not n_carried:
        axes = [None] * n_constants + [0] * n_rows
        specs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
        at_once = jax.vmap(core.jaxpr_as_fun(body), axes)
        return convert(graph, jax.make_jaxpr(at_once)(*specs), inputs)
    constants, rows = inputs[:n_constants], inputs[n_constants + n_carried :]
    carry = list(inputs[n_constants : n_constants + n_carried])
    steps = [np.broadcast_to(each.array, each.shape) for each in rows if isinstance(each, Constant)]
    if len(steps) < len(rows) or len(eqn.outvars) > n_carried or not rows:
        raise InputError(
            "The ONNX export supports loops of dependent steps only over constants, and without "
            "results of each step."
        )
    for step in list(zip(*steps, strict=True))[:: -1 if eqn.params["reverse"] else 1]:
        carry = convert(graph, body, [*constants, *carry, *map(_constant, step)])
    return carry


def _with_leading_axis(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """How many variables of a loop have one axis more than those of a step."""
    return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outer, inner, strict=True))


_HANDLERS: Mapping[str, Callable] = {
    **elementwise.HANDLERS,
    **shapes.HANDLERS,
    **indexing.HANDLERS,
    **reductions.HANDLERS,
    **products.HANDLERS,
    "platform_index": _default_platform,
    "cond": _branch,
    "scan": _loop,
}
