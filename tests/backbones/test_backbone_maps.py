"""Feature maps equal timm's, with and without folding, for any layers."""

import functools
import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from timm_oracle import (
    compared_layers,
    import_timm,
    relative_error,
    sample,
    seeded_images,
    seeded_state,
    timm_maps,
)

from fastflow_jax.backbones import (
    BACKBONES,
    check_layers,
    convolution,
    create_backbone,
    porting,
    vit,
    weights,
)
from fastflow_jax.errors import InputError

unusual = pytest.mark.skipif(
    not os.environ.get("FASTFLOW_ALL_BACKBONES"), reason="FASTFLOW_ALL_BACKBONES is not set"
)
GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "backbones.npz")

# One of each family; FASTFLOW_ALL_BACKBONES=1 tests all, which takes ten minutes.
USUAL = {
    "resnet18": ("256x256", "192x320"),
    "wide_resnet50_2": ("256x256", "192x320"),
    "tf_efficientnet_lite0": ("256x256", "192x320"),
    "tf_efficientnet_b5": ("192x320",),
    "convnext_tiny": ("192x320",),
    "deit_tiny_patch16_224": ("224x224",),
    "deit_tiny_distilled_patch16_224": ("160x256",),
    "vit_small_patch14_dinov2": ("140x224",),
    "vit_small_patch14_reg4_dinov2": ("140x224",),
    "vit_small_patch16_dinov3": ("256x256",),
    "vit_small_plus_patch16_dinov3": ("160x256",),
    "cait_xxs24_224": ("160x256",),
}
CASES = [
    pytest.param(name, size, marks=() if size in USUAL.get(name, ()) else unusual)
    for name, size in dict.fromkeys(tuple(key.split("/")[:2]) for key in GOLDENS.files)
]

# Relative to the largest number of a map. The deepest map of ResNet50 differs by 4e-6.
TOLERANCE, OF_RESNET50 = 2e-6, 5e-6
HAS_TIMM = all(importlib.util.find_spec(m) for m in ("torch", "torchvision", "timm"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """Backbone with seeded numbers, by name; the last three are cached."""

    @functools.lru_cache(3)
    def create(name):
        layers = compared_layers(name)
        path = tmp_path_factory.mktemp(name) / "seeded.npz"
        np.savez(path, **seeded_state(name, layers))
        created = create_backbone(name, weights=str(path), layers=layers)
        path.unlink()
        return created

    return create


@pytest.fixture(scope="module")
def maps(backbone):
    """Feature maps of seeded images, by backbone and image size; the last eight are cached."""
    return functools.lru_cache(8)(
        lambda name, size: [np.asarray(m) for m in backbone(name)(seeded_images(*size))]
    )


def parse(size: str) -> tuple[int, int]:
    height, width = size.split("x")
    return int(height), int(width)


@pytest.mark.filterwarnings("ignore")  # torch's
@pytest.mark.parametrize(("name", "size"), CASES)
def test_equals_timm(maps, name, size):
    """Compares samples with stored maps of timm, and whole maps with timm if it is installed."""
    layers = compared_layers(name)
    ours = maps(name, parse(size))
    tolerance = OF_RESNET50 if name == "resnet50" else TOLERANCE
    for layer, picked in zip(layers, sample(ours), strict=True):
        assert relative_error(picked, GOLDENS[f"{name}/{size}/{layer}"]) < tolerance
    if HAS_TIMM:
        state, images = seeded_state(name, layers), seeded_images(*parse(size))
        theirs = timm_maps(name, state, images, layers)
        for mine, their in zip(ours, theirs, strict=True):
            assert mine.shape == their.shape
            assert relative_error(mine, their) < tolerance


@pytest.mark.skipif(not HAS_TIMM, reason="timm, the oracle, needs torch")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "pixels"])
def test_spec_equals_timm(name):
    """Compares shapes of all tensors, attention heads, normalisation and input size."""
    timm = import_timm()
    import torch

    spec = BACKBONES[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == spec.parameters
    whole = porting.slots(spec.module(tuple(spec.maps)[-1:]), spec.image_size)
    theirs = {key: tuple(x.shape) for key, x in model.state_dict().items()}
    rest = {key for key in theirs if key.startswith(spec.unused) or key.endswith("batches_tracked")}
    assert {key: slot.timm_shape for key, slot in whole.items()} == {
        key: shape for key, shape in theirs.items() if key not in rest
    }
    if isinstance(spec.architecture, vit.ViT):
        assert model.blocks[0].attn.num_heads == spec.architecture.heads
        assert model.norm.eps == spec.architecture.epsilon
    config = timm.get_pretrained_cfg(f"{name}.{spec.tag}")
    assert getattr(spec.architecture, "native", config.input_size[1]) == config.input_size[1]


@pytest.mark.skipif(not HAS_TIMM, reason="timm, the oracle, needs torch")
@pytest.mark.filterwarnings("ignore")
def test_normalisations_and_licences_of_all_tags_are_those_of_timm():
    timm = import_timm()
    words = {"cc-by-nc-4.0": "CC-BY-NC-4.0", "dinov3-license": "DINOv3 License"}
    words |= {"apache-2.0": "Apache-2.0", "bsd-3-clause": "BSD-3-Clause"}
    words |= {"fair-noncommercial-research-license": "FAIR Noncommercial Research License"}
    for spec in BACKBONES.values():
        for tag in timm.list_pretrained(f"{spec.name}.*"):
            config, record = timm.get_pretrained_cfg(tag), weights.origin(spec, tag)
            if config.license is None:
                assert weights.licence(record).startswith("stated on the page")
                continue
            assert weights.licence(record).startswith(words[config.license]), tag
            assert weights.normalisation(spec, record) == (config.mean, config.std), tag


# One of each family, with the layers of its indices -1 and 0, and a block.
FEATURES = {
    "resnet18": ("layer4", "act1", "layer2.0"),
    "convnext_tiny": ("stages.3", "stages.0", "stages.1.blocks.0"),
    "tf_efficientnet_lite0": ("blocks.6", "blocks.0", "blocks.2.0"),
    "tf_efficientnet_b5": ("blocks.6", "blocks.0", "blocks.0.1"),
    "vit_small_patch14_reg4_dinov2": ("blocks.11", "blocks.0", "blocks.1"),
    "vit_small_patch16_dinov3": ("blocks.11", "blocks.0", "blocks.1"),
    "cait_xxs24_224": ("blocks.23", "blocks.0", "blocks.1"),
    "pixels": ("image", "image", "image"),
}


@pytest.mark.parametrize("name", FEATURES)
def test_layers_are_chosen_by_timm_s_index(name):
    spec, (last, first, _) = BACKBONES[name], FEATURES[name]
    assert check_layers(spec, (-1,)) == (last,)
    assert check_layers(spec, (0,)) == (first,)
    with pytest.raises(
        InputError, match=rf"has no layer 99\. Choose from .*{first}.*indices, 0 to"
    ):
        check_layers(spec, (99,))


@pytest.mark.skipif(not HAS_TIMM, reason="timm, the oracle, needs torch")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in FEATURES if name != "pixels"])
def test_indices_are_those_of_timm(name):
    timm = import_timm()
    import torch

    spec = BACKBONES[name]
    with torch.device("meta"):
        of_all = timm.create_model(name, features_only=True).feature_info.out_indices
        info = timm.create_model(name, features_only=True, out_indices=of_all).feature_info.info
    layers = check_layers(spec, range(len(info)))
    assert [spec.blocks[layer] for layer in layers] == [
        (each["num_chs"], each["reduction"]) for each in info
    ]
    assert all(each["module"].startswith(layer) for each, layer in zip(info, layers, strict=True))


@pytest.mark.skipif(not HAS_TIMM, reason="timm, the oracle, needs torch")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "tf_efficientnet_b5"])
def test_blocks_equal_timm(name, tmp_path):
    layers = FEATURES[name][1:]
    state, images = seeded_state(name, layers), seeded_images(64, 96)
    np.savez(tmp_path / "seeded.npz", **state)
    ours = create_backbone(name, weights=str(tmp_path / "seeded.npz"), layers=layers)(images)
    for mine, their in zip(ours, timm_maps(name, state, images, layers), strict=True):
        assert relative_error(mine, their) < TOLERANCE


def test_blocks_have_no_weights_of_later_ones():
    block = create_backbone("resnet18", weights="random", layers=("layer1.0",))
    assert "layer1_1" not in block.variables["params"]
    assert (block.channels, block.strides) == ((64,), (4,))
    stage, last = create_backbone("resnet18", weights="random", layers=("layer1", "layer1.1"))(
        seeded_images(32, 32)
    )
    np.testing.assert_array_equal(stage, last)


def test_pixels_are_the_image():
    images = np.random.default_rng(0).normal(size=(2, 6, 8, 3)).astype(np.float32)
    pixels = create_backbone("pixels")
    (same,) = pixels(images)
    np.testing.assert_array_equal(same, images)
    assert (pixels.channels, pixels.strides, pixels.variables) == ((3,), (1,), {})


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_channels_and_strides_equal_the_spec(maps, backbone, name):
    height, width = 192, 320
    b = backbone(name)
    for m, channels, stride in zip(maps(name, (height, width)), b.channels, b.strides, strict=True):
        assert m.shape == (2, height // stride, width // stride, channels)
        assert m.dtype == np.float32
    assert (b.channels, b.strides) == tuple(zip(*(b.spec.maps[x] for x in b.layers), strict=True))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "tf_efficientnet_lite0"])
def test_folding_batch_norm_keeps_the_feature_maps(name):
    spec = BACKBONES[name]
    layer = tuple(spec.maps)[1:2]
    state = seeded_state(name, layer)
    module = spec.module(layer)
    slots = porting.slots(module, spec.image_size)
    variables = porting.port(slots, state, is_known=lambda _: False, title="")
    folded, without = convolution.fold_batch_norm(module, variables)
    assert set(without) == {"params"}
    images = seeded_images(32, 48)
    (before,), (after,) = (
        jax.jit(module.apply)(variables, images),
        jax.jit(folded.apply)(without, images),
    )
    assert relative_error(after, np.asarray(before)) < 1e-5


def test_layers_are_in_the_given_order_and_later_ones_have_no_weights():
    one = create_backbone("resnet18", weights="random", layers=("layer1",))
    assert not any(name.startswith("layer2") for name in one.variables["params"])
    two = create_backbone("resnet18", weights="random", layers=("layer2", "layer1"))
    assert two.channels == (128, 64)
    images = jnp.asarray(seeded_images(32, 32))
    coarse, fine = two(images)
    assert (coarse.shape[1], fine.shape[1]) == (4, 8)
    # Random weights do not depend on the other layers.
    np.testing.assert_array_equal(fine, one(images)[0])


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "deit_tiny_patch16_224"])
def test_bfloat16_is_close_to_float32(name):
    layers = tuple(BACKBONES[name].maps)[:1]
    images = seeded_images(32, 32)
    exact, rough = (
        create_backbone(name, weights="random", layers=layers, dtype=dtype)(images)[0]
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rough.dtype == jnp.float32
    assert 1e-4 < relative_error(rough, np.asarray(exact)) < 0.03


@pytest.mark.parametrize("form", ["packed", "split"])
def test_gated_mlps_equal_their_formula(form):
    """Of the giant and the plus models, which are too large for every test run."""
    rng = np.random.default_rng(0)
    gate, value, out = (rng.normal(size=s) for s in ((4, 6), (4, 6), (6, 4)))
    x, bias = rng.normal(size=(2, 5, 4)), rng.normal(size=(3, 6))

    def dense(kernel, bias):
        return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}

    params = {"fc2": dense(out, bias[2, :4])}
    if form == "packed":  # the gate is the first half
        params["fc1"] = dense(np.concatenate([gate, value], 1), np.concatenate(bias[:2]))
    else:
        params |= {"fc1_g": dense(gate, bias[0]), "fc1_x": dense(value, bias[1])}
    found = vit.Mlp(6, form, jnp.float32).apply({"params": params}, jnp.asarray(x, jnp.float32))
    g = x @ gate + bias[0]
    expected = (g / (1 + np.exp(-g)) * (x @ value + bias[1])) @ out + bias[2, :4]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_images_that_are_not_multiples_of_the_patch_are_refused():
    backbone = create_backbone("vit_small_patch14_dinov2", weights="random", layers=("blocks.0",))
    with pytest.raises(InputError, match="256x252 cannot be divided into patches of 14"):
        backbone(np.zeros((1, 256, 252, 3), np.float32))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, "SAME"), (5, 2, "SAME")]
)
@pytest.mark.parametrize("size", [(7, 10), (8, 9)])
def test_depthwise_sum_of_shifts_equals_the_native_convolution(kernel, stride, padding, size):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, *size, 6)), jnp.float32)
    k = jnp.asarray(rng.standard_normal((kernel, kernel, 1, 6)), jnp.float32)
    native = jax.lax.conv_general_dilated(
        x,
        k,
        (stride, stride),
        padding if padding == "SAME" else [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
    )
    ours = convolution.convolve(x, k, stride, padding, groups=6)
    np.testing.assert_allclose(ours, native, atol=1e-5)
