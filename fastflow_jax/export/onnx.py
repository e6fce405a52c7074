"""Conversion of pure functions of JAX to ONNX."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import fastflow_jax
from fastflow_jax.errors import InputError
from fastflow_jax.export.graph import Graph, Node, Tensor, written_out
from fastflow_jax.export.jaxpr import convert

OPSETS = range(18, 22)  # versions of ONNX's operations; onnxruntime 1.20 reads all of them
_IR_VERSION = 9  # of the file format, at least


def to_onnx(
    function: Callable[..., Mapping[str, Any]],
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    *,
    opset: int = 18,
    metadata: Mapping[str, str] | None = None,
) -> Any:
    """Converts a pure function to a model in one file, with all arrays that it closes over.

        (batch,) = jax.export.symbolic_shape("batch", constraints=["batch >= 1"])
        images = jax.ShapeDtypeStruct((batch, 256, 256, 3), jnp.uint8)
        model = to_onnx(lambda images: {"score": score(images)}, {"images": images})
        onnx.save(model, "model.onnx")

    Of a choice by `jax.lax.platform_dependent` the model has the default.

    Args:
      function: called with the inputs by name; returns the outputs by name.
      inputs: shapes and types. A size may be symbolic; it is then free in the model.
      opset: version of ONNX's operations, one of `OPSETS`.
      metadata: texts that are stored in the model.

    Returns:
      An `onnx.ModelProto`.

    Raises:
      InputError: the package onnx is missing, the opset is not supported, or the function uses a
        primitive of JAX that is not supported.
    """
    onnx = _import_onnx()
    if opset not in OPSETS:
        raise InputError(
            f"opset {opset} is not supported. Choose one from {OPSETS[0]} to {OPSETS[-1]}."
        )
    names: list[str] = []

    def in_order(*arrays: jax.Array) -> list[jax.Array]:
        outputs = function(**dict(zip(inputs, arrays, strict=True)))
        names[:] = outputs
        return list(outputs.values())

    traced = jax.make_jaxpr(in_order)(*inputs.values())
    graph = Graph({name: spec.shape for name, spec in inputs.items()}, names)
    arguments = [
        Tensor(spec.shape, name, tuple(range(len(spec.shape)))) for name, spec in inputs.items()
    ]
    results = [written_out(graph, value) for value in convert(graph, traced, arguments)]
    nodes, constants = graph.needed(results)
    for result, name in zip(results, names, strict=True):
        nodes.append(Node("Identity", f"{name}/Identity", (result,), (name,), {}))
    outputs = dict(zip(names, traced.out_avals, strict=True))
    return _model(onnx, nodes, constants, inputs, outputs, opset, metadata or {})


def _model(
    onnx: Any,
    nodes: Sequence[Node],
    constants: Mapping[str, np.ndarray],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    opset: int,
    metadata: Mapping[str, str],
) -> Any:
    """The checked `onnx.ModelProto` of a graph."""
    helper = onnx.helper
    graph = helper.make_graph(
        [_node(onnx, node) for node in nodes],
        "fastflow_jax",
        [_described(onnx, name, spec) for name, spec in inputs.items()],
        [_described(onnx, name, spec) for name, spec in outputs.items()],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(
        graph,
        opset_imports=opsets,
        ir_version=max(_IR_VERSION, helper.find_min_ir_version_for(opsets)),
        producer_name="fastflow_jax",
        producer_version=fastflow_jax.__version__,
    )
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return model


def _import_onnx() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
    except ImportError:
        raise InputError(
            "Export to ONNX needs the package onnx. Run pip install 'fastflow-jax[onnx]'."
        ) from None
    return onnx


def _node(onnx: Any, node: Node) -> Any:
    attributes = {
        name: onnx.helper.np_dtype_to_tensor_dtype(value) if isinstance(value, np.dtype) else value
        for name, value in node.attributes.items()
    }
    return onnx.helper.make_node(node.op, node.inputs, node.outputs, node.name, **attributes)


def _described(onnx: Any, name: str, spec: Any) -> Any:
    """Name, type and shape of an input or output."""
    dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    shape = [size if isinstance(size, int) else str(size) for size in spec.shape]
    return onnx.helper.make_tensor_value_info(name, dtype, shape)
