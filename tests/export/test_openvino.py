"""OpenVINO in float32 equals onnxruntime; it leaves out the rounding of features to 16 bits."""

import numpy as np
import pytest

from fastflow_jax.backbones import create_backbone
from fastflow_jax.exported import Exported

openvino = pytest.importorskip("openvino", reason="the package openvino is an optional oracle")


def compiled(model, precision="f32"):
    """A function of inputs by name to outputs by name, on one thread of the CPU."""
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
    return openvino.Core().compile_model(model, "CPU", settings)


@pytest.fixture(scope="module")
def file(grey, tmp_path_factory):
    """An exported file of the detector `grey` that takes images of the input size."""
    path = tmp_path_factory.mktemp("fixed") / "grey.onnx"
    grey[0].export(path)
    return path


@pytest.mark.parametrize("batch", [1, 5])
def test_a_detector_equals_onnxruntime(file, batch):
    images = np.random.default_rng(2).integers(118, 138, (batch, 16, 16, 3), np.uint8)
    images[0, 3:9, 3:9] = (250, 20, 20)
    exported = Exported(file)
    expected, found = exported.run(images), compiled(file)({"images": images})
    for name, tolerance in (("score", 5e-3), ("anomaly_map", 2e-2)):
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=tolerance * scale)
    np.testing.assert_allclose(found["p_value"], expected["p_value"], rtol=1e-6)
    np.testing.assert_array_equal(found["is_anomalous"], expected["is_anomalous"])
    # Pixels next to the threshold may differ, as the map does.
    distance = np.abs(expected["anomaly_map"] - exported.pixel_threshold.value)
    is_clear = distance > tolerance * scale
    assert is_clear.mean() > 0.5
    np.testing.assert_array_equal(found["mask"][is_clear], expected["mask"][is_clear])
    assert expected["is_anomalous"][0]
    assert expected["mask"][0].any()


@pytest.fixture(scope="module")
def backbone(exported):
    """A model of a backbone, its inputs, and its outputs in onnxruntime."""
    layers = ("blocks.1", "blocks.3")
    backbone = create_backbone("tf_efficientnet_lite0", weights="random", layers=layers)

    def function(images):
        return dict(zip(layers, backbone.module.apply(backbone.variables, images), strict=True))

    inputs = {"images": np.random.default_rng(0).normal(size=(2, 64, 48, 3)).astype(np.float32)}
    model, run = exported(function, inputs)
    return openvino.Core().read_model(model.SerializeToString()), inputs, run(**inputs)


def largest_difference(backbone, precision):
    """Of a map, over its largest value."""
    model, inputs, expected = backbone
    found = compiled(model, precision)(inputs)
    return max(np.abs(found[name] - m).max() / np.abs(m).max() for name, m in expected.items())


def test_a_backbone_equals_onnxruntime(backbone):
    assert largest_difference(backbone, "f32") < 1e-5


def test_bfloat16_is_too_coarse(backbone):
    """It is the default on CPUs that have it."""
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    assert largest_difference(backbone, "bf16") > 1e-3
