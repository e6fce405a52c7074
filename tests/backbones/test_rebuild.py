"""Backbones are rebuilt from their state dicts, without weight files."""

import jax
import numpy as np
import pytest

from fastflow_jax.backbones import create_backbone, find_spec, rebuild_backbone
from fastflow_jax.errors import InputError

FAMILIES = {
    "resnet18": ("layer1",),
    "tf_efficientnet_lite0": ("blocks.1", "blocks.0"),
    "tf_efficientnet_b5": ("blocks.1.0",),
    "convnext_tiny": ("stages.1", "stages.0.blocks.1"),
    "vit_small_patch14_dinov2": ("blocks.0",),
    "vit_small_patch14_reg4_dinov2": ("blocks.0",),
    "vit_small_plus_patch16_dinov3": ("blocks.0",),
    "cait_xxs24_224": ("blocks.0",),
    "pixels": ("image",),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rebuilt_backbone_is_the_same_function(name):
    backbone = create_backbone(name, weights="random", layers=FAMILIES[name], seed=3)
    state = backbone.state_dict()
    again = rebuild_backbone(name, FAMILIES[name], state, backbone.weights)
    assert again.module == backbone.module
    assert (again.layers, again.channels, again.strides, again.weights) == (
        *(backbone.layers, backbone.channels, backbone.strides),
        backbone.weights,
    )
    jax.tree.map(np.testing.assert_array_equal, again.variables, backbone.variables)
    assert len(state) == len(jax.tree.leaves(backbone.variables))


def test_tensors_have_the_names_and_the_layout_of_timm():
    state = create_backbone("resnet18", weights="random", layers=("layer1",)).state_dict()
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    assert state["layer1.1.conv2.bias"].shape == (64,)  # of the batch norm
    assert not [name for name in state if ".bn" in name]


def test_positions_are_resized_as_with_the_weight_file():
    name = "vit_small_patch14_dinov2"
    backbone = create_backbone(name, weights="random", layers=("blocks.0",))
    for file, antialias in (("model.onnx", False), ("model.safetensors", True)):
        weights = {"source": "file", "file": file}
        again = rebuild_backbone(name, ("blocks.0",), backbone.state_dict(), weights)
        assert again.module.antialias == antialias


def test_tensors_that_do_not_fit_are_listed():
    spec = find_spec("resnet18")
    state = create_backbone("resnet18", weights="random", layers=("layer1",)).state_dict()
    state["layer9.weight"] = state.pop("conv1.weight")
    with pytest.raises(InputError, match=r"do not fit resnet18:\n.*conv1\.weight is missing"):
        rebuild_backbone(spec.name, ("layer1",), state, {})
