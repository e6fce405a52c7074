"""Export of pure functions of JAX to formats that other runtimes read."""

from fastflow_jax.export.onnx import to_onnx

__all__ = ["to_onnx"]
