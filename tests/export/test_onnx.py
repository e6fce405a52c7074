"""Files of `to_onnx`: inputs, outputs, versions, metadata, shared and dropped nodes, errors."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastflow_jax
from fastflow_jax.errors import InputError
from fastflow_jax.export import to_onnx

X = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)


def kinds(model):
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("opset", [18, 21])
def test_opsets(agree, opset):
    def function(x):
        padded = jnp.pad(x, [(0, 0), (1, 1), (0, 0)])
        values, _ = jax.lax.top_k(padded, 2)
        return {"y": jnp.tanh(values @ jnp.ones((2, 3))).max(1), "z": x.astype(jnp.float16)}

    model = agree(function, {"x": X}, batches=(1, 3), opset=opset)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", opset)]
    assert model.ir_version == {18: 9, 21: 10}[opset]


@pytest.mark.parametrize("opset", [11, 99])
def test_other_opsets_are_refused(exported, opset):
    with pytest.raises(
        InputError, match=f"opset {opset} is not supported. Choose one from 18 to 21"
    ):
        exported(lambda x: {"y": x}, {"x": X}, opset=opset)


def test_inputs_outputs_and_metadata(exported):
    def function(images, valid):
        mean = images.astype(jnp.float32).mean((1, 2), where=valid)
        return {"score": mean, "mask": valid, "alone": jnp.arange(2), "again": mean}

    arrays = {"images": np.ones((3, 4, 5), np.uint8), "valid": np.ones((3, 4, 5), bool)}
    model, run = exported(function, arrays, metadata={"classes": "normal, anomalous"})
    graph = model.graph
    assert [each.name for each in graph.input] == ["images", "valid"]
    assert [each.name for each in graph.output] == ["score", "mask", "alone", "again"]
    first = graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in first] == ["batch", 4, 5]
    assert {p.key: p.value for p in model.metadata_props} == {"classes": "normal, anomalous"}
    assert (model.producer_name, model.producer_version) == (
        "fastflow_jax",
        fastflow_jax.__version__,
    )
    for n in (1, 7):
        found = run(**{name: np.repeat(array[:1], n, 0) for name, array in arrays.items()})
        np.testing.assert_array_equal(found["score"], np.ones(n))
        np.testing.assert_array_equal(found["again"], np.ones(n))
        assert found["mask"].shape == (n, 4, 5)
        np.testing.assert_array_equal(found["alone"], [0, 1])


def test_a_fixed_batch():
    pytest.importorskip("onnx", reason="the package onnx writes the file")
    model = to_onnx(lambda x: {"y": x + 1}, {"x": jax.ShapeDtypeStruct((2, 3), jnp.float32)})
    dims = model.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims] == [2, 3]


def test_equal_nodes_are_shared_and_unused_ones_dropped(agree):
    def function(x):
        jnp.sin(x).sum()  # is not used
        return {"y": jnp.exp(x) + jnp.exp(x) * 2, "z": jnp.exp(x).sum(1)}

    found = kinds(agree(function, {"x": X}))
    assert found.count("Exp") == 1
    assert "Sin" not in found


def test_constants_are_computed_and_stored_once(agree):
    matrix = jnp.ones((5, 5))

    def function(x):
        scale = jnp.exp(jnp.arange(5.0)).sum() * jnp.ones((x.shape[0], 1, 1))
        return {"y": (x * scale) @ (matrix / 2), "z": jnp.sqrt(x * x) @ (matrix / 2)}

    model = agree(function, {"x": X})
    assert sorted(kinds(model)) == sorted(
        ["Mul", "MatMul", "Mul", "Sqrt", "MatMul", *["Identity"] * 2]
    )
    sizes = [int(np.prod(each.dims)) for each in model.graph.initializer]
    assert sorted(sizes) == [1, 25]  # the broadcast scale, and the matrix of both products


def test_neutral_operations_are_dropped(agree):
    def function(x):
        y = (x + 0.0) * 1.0 - jnp.zeros(x.shape)
        return {"y": jnp.maximum(y * 4 / 4, 0.0)}

    assert kinds(agree(function, {"x": X})) == ["Relu", "Identity"]


def test_a_missing_package_is_named():
    code = """
import sys
sys.modules["onnx"] = None
import jax, numpy as np
from fastflow_jax.errors import InputError
from fastflow_jax.export import to_onnx
try:
    to_onnx(lambda x: {"y": x}, {"x": jax.ShapeDtypeStruct((2,), np.float32)})
except InputError as error:
    print(error)
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "pip install 'fastflow-jax[onnx]'" in process.stdout


def test_the_module_of_an_unknown_primitive_is_named(exported):
    def function(x):
        with jax.named_scope("pooling"):
            return {"y": jnp.cumsum(x, 1)}

    with pytest.raises(InputError, match=r"primitive 'cumsum' in .*pooling"):
        exported(function, {"x": X})


def test_sizes_that_are_not_those_of_an_input_are_named(exported):
    def function(x):
        return {"y": jnp.ones((2 * x.shape[0], 3))}

    with pytest.raises(InputError, match=r"cannot compute the size 2\*batch"):
        exported(function, {"x": X})
