"""Conversion of pure functions of JAX to LiteRT, the former TensorFlow Lite. Experimental."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from fastflow_jax.errors import InputError
from fastflow_jax.exported import INPUT

# From the portable form that JAX serializes to one function without source locations.
_PASSES = (
    "builtin.module(vhlo-legalize-stablehlo,reconcile-unrealized-casts,"
    "func.func(stablehlo-legalize-composite-to-call),inline,symbol-dce,strip-debuginfo)"
)


def to_litert(
    function: Callable[[jax.Array], Mapping[str, jax.Array]], images: jax.ShapeDtypeStruct
) -> bytes:
    """Returns the content of a file with a pure function and all arrays that it closes over.

    The model has one signature, from "images" to the outputs by name.

    Args:
      function: called with images; returns the outputs by name.
      images: shape and type of the images. All sizes are fixed.

    Raises:
      InputError: a package is missing, or LiteRT lacks an operation of the function.
    """
    ir = _module("litert_converter.mlir.ir")
    passmanager = _module("litert_converter.mlir.passmanager")
    converter = _module("litert_converter.mlir._mlir_libs.converter_api_ext")

    def unrolled(images: jax.Array) -> Mapping[str, jax.Array]:
        with jax.disable_jit():  # the converter cannot write loops
            return function(images)

    # Lowered for a TPU: for a CPU, depthwise convolutions would become sums of shifts.
    lowered = jax.export.export(jax.jit(unrolled), platforms=("tpu",))(images)
    names = list(jax.tree.unflatten(lowered.out_tree, lowered.out_avals))
    options = converter.ConvertToTFLConfig()
    options.canonicalizing_inf_as_min_max_float = False  # distances may be infinite
    try:
        with ir.Context() as context:
            converter.prepare_mlir_context(context)
            module = ir.Module.parse(lowered.mlir_module_serialized)
            passmanager.PassManager.parse(_PASSES).run(module.operation)
            converter.set_signature(module.operation, "serving_default", [INPUT], names)
            converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), options)
            return converter.export_flatbuffer_to_bytes(module.operation)
    except (ValueError, ir.MLIRError) as error:
        raise InputError(
            f"The function cannot be converted to LiteRT ({str(error).splitlines()[0]}). Choose "
            "another format or detector."
        ) from error


def load_litert(content: bytes) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Returns a function of images [B, H, W, 3] that runs a model of batch 1 on each of them."""
    interpreter = _module("ai_edge_litert.interpreter").Interpreter(model_content=content)
    score = interpreter.get_signature_runner()

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        rows = [score(**{INPUT: image[None]}) for image in images]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    return run


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(
            "Export to LiteRT needs the packages litert-converter and ai-edge-litert. Run "
            "pip install 'fastflow-jax[litert]'."
        ) from None
