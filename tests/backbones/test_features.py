"""Feature maps equal timm's, folded or not, whatever layers are asked for."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from timm_oracle import relative_error, sample, seeded_images, seeded_state, timm_maps

from fastflow_jax.backbones import BACKBONES, convolution, create_backbone, porting

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "backbones.npz")
CASES = sorted({tuple(key.split("/")[:2]) for key in GOLDENS.files})

needs_timm = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("torch", "torchvision", "timm")),
    reason="timm, the oracle, needs torch",
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A backbone of seeded numbers, by name; each is made once."""

    @functools.cache
    def create(name):
        layers = BACKBONES[name].layers
        path = tmp_path_factory.mktemp(name) / "seeded.npz"
        np.savez(path, **seeded_state(name, layers))
        created = create_backbone(name, weights=str(path))
        path.unlink()
        return created

    return create


@pytest.fixture(scope="module")
def maps(backbone):
    """Its maps of the seeded images of a size; each is compiled once."""
    return functools.cache(
        lambda name, size: [np.asarray(m) for m in backbone(name)(seeded_images(*size))]
    )


def parse(size: str) -> tuple[int, int]:
    height, width = size.split("x")
    return int(height), int(width)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_golden(maps, name, size):
    ours = maps(name, parse(size))
    for layer, picked in zip(BACKBONES[name].layers, sample(ours), strict=True):
        assert relative_error(picked, GOLDENS[f"{name}/{size}/{layer}"]) < 1e-4


@needs_timm
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "size"), CASES)
def test_equals_timm(maps, name, size):
    layers = BACKBONES[name].layers
    theirs = timm_maps(name, seeded_state(name, layers), seeded_images(*parse(size)), layers)
    for mine, their in zip(maps(name, parse(size)), theirs, strict=True):
        assert mine.shape == their.shape
        assert relative_error(mine, their) < 1e-4


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_channels_and_strides_are_as_the_spec_says(maps, backbone, name):
    height, width = 192, 320
    b = backbone(name)
    for m, channels, stride in zip(maps(name, (height, width)), b.channels, b.strides, strict=True):
        assert m.shape == (2, height // stride, width // stride, channels)
        assert m.dtype == np.float32
    assert (b.channels, b.strides) == tuple(zip(*(b.spec.maps[x] for x in b.layers), strict=True))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "tf_efficientnet_lite0"])
def test_folded_batch_norm_changes_nothing(name):
    spec = BACKBONES[name]
    layer = tuple(spec.maps)[1:2]
    state = seeded_state(name, layer)
    module = spec.module(layer)
    slots = porting.slots(module, spec.image_size)
    variables = porting.port(slots, state, may_hold=lambda _: False, title="")
    folded, without = convolution.fold_batch_norm(module, variables)
    assert set(without) == {"params"}
    images = seeded_images(32, 48)
    (before,), (after,) = module.apply(variables, images), folded.apply(without, images)
    assert relative_error(after, np.asarray(before)) < 1e-5


def test_layers_come_in_the_order_asked_and_no_later_one_is_held():
    one = create_backbone("resnet18", weights="random", layers=("layer1",))
    assert not any(name.startswith("layer2") for name in one.variables["params"])
    two = create_backbone("resnet18", weights="random", layers=("layer2", "layer1"))
    assert two.channels == (128, 64)
    images = jnp.asarray(seeded_images(32, 32))
    coarse, fine = two(images)
    assert (coarse.shape[1], fine.shape[1]) == (4, 8)
    # The same seed means the same numbers, whatever else is asked for.
    np.testing.assert_array_equal(fine, one(images)[0])


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, "SAME"), (5, 2, "SAME")]
)
@pytest.mark.parametrize("size", [(7, 10), (8, 9)])
def test_depthwise_sum_of_shifts_is_the_native_convolution(kernel, stride, padding, size):
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
    ours = convolution._sum_of_shifts(x, k, stride, padding)
    np.testing.assert_allclose(ours, native, atol=1e-5)
