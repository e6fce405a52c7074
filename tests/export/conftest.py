"""Functions that are exported and run by onnxruntime."""

import pathlib

import jax
import numpy as np
import pytest

from fastflow_jax import Detector

DURABLE = pathlib.Path(__file__).parent.parent / "goldens" / "durable"


@pytest.fixture(scope="session")
def exported():
    """Exports a function of arrays with a free batch; returns the model and a way to run it.

    That is a function of arrays of any batch, by name, to the outputs by name.
    """
    pytest.importorskip("onnx", reason="the package onnx writes the file")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is the oracle")
    from fastflow_jax.export import to_onnx

    def export(function, arrays, **options):
        (batch,) = jax.export.symbolic_shape("batch", constraints=["batch >= 1"])
        inputs = {
            name: jax.ShapeDtypeStruct((batch, *array.shape[1:]), array.dtype)
            for name, array in arrays.items()
        }
        model = to_onnx(function, inputs, **options)
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = runtime.InferenceSession(
            model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]

        def run(**given):
            return dict(zip(names, session.run(None, given), strict=True))

        return model, run

    return export


@pytest.fixture(scope="session")
def agree(exported):
    """Checks that exported functions agree with JAX; returns the model.

    Differences are relative to the largest number of an output; `tolerance` is the largest one, or
    one for each output by name. With `batches`, the model is run on that many first rows each, for
    functions of one row.
    """

    def check(function, arrays, tolerance=1e-5, batches=(None,), **options):
        model, run = exported(function, arrays, **options)
        expected = jax.tree.map(np.asarray, jax.jit(function)(**arrays))
        for n in batches:
            found = run(**{name: array[:n] for name, array in arrays.items()})
            assert found.keys() == expected.keys()
            for name, array in found.items():
                wanted = expected[name][:n]
                assert array.dtype == wanted.dtype
                assert array.shape == wanted.shape
                bound = tolerance[name] if isinstance(tolerance, dict) else tolerance
                if array.dtype.kind == "f":
                    scale = np.abs(wanted, where=np.isfinite(wanted), out=np.zeros_like(wanted))
                    np.testing.assert_allclose(array, wanted, rtol=0, atol=bound * scale.max())
                else:
                    np.testing.assert_array_equal(array, wanted)
        return model

    return check


@pytest.fixture(scope="session")
def grey():
    """A saved FastFlow detector of grey images of 20 x 30 pixels, and a spoilt image."""
    pytest.importorskip("onnx", reason="the package onnx writes the file")
    pytest.importorskip("onnxruntime", reason="exported files are compared with onnxruntime")
    spoilt = np.random.default_rng(0).integers(118, 138, (20, 30, 3), np.uint8)
    spoilt[6:16, 12:24] = (250, 20, 20)
    return Detector.load(DURABLE / "fastflow").with_threshold(image=100.0), spoilt


@pytest.fixture(scope="session")
def any_size(grey, tmp_path_factory):
    """An exported file of the detector `grey` that takes images of any size."""
    path = tmp_path_factory.mktemp("any_size") / "grey.onnx"
    grey[0].export(path, any_size=True)
    return path
