"""Backbones of one's own: any function of JAX is fitted, saved, loaded and exported."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastflow_jax import Detector
from fastflow_jax.backbones import Backbone
from fastflow_jax.config import default, fill, with_function
from fastflow_jax.detectors.base import recipe
from fastflow_jax.errors import InputError
from fastflow_jax.features.prepare import feature_fingerprint

IMAGES = np.random.default_rng(0).integers(100, 150, (12, 40, 40, 3), np.uint8)


class Cnn(nn.Module):
    """Two maps, of 6 and 8 channels and strides 2 and 4."""

    @nn.compact
    def __call__(self, images):
        fine = nn.relu(nn.Conv(6, (3, 3), strides=2)(images))
        return fine, nn.relu(nn.Conv(8, (3, 3), strides=2)(fine))


class NnxCnn(nnx.Module):
    """One map, of 5 channels and stride 2."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 5, (3, 3), strides=2, rngs=rngs)

    def __call__(self, images):
        return nnx.relu(self.conv(images))


def variables(seed=0):
    return Cnn().init(jax.random.key(seed), jnp.zeros((1, 32, 32, 3)))


def cnn(seed=0, **fields):
    fields = {"channels": (6, 8), "strides": (2, 4), "image_size": (32, 32)} | fields
    return Backbone.from_function(Cnn().apply, variables(seed), **fields)


def tiny(detector="knn", **fields):
    c = default()
    c.update(recipe(detector))
    c.batch_size, c.data.holdout = 8, 0.25
    if detector == "fastflow":
        fields |= {"flow.steps": 2, "train.epochs": 1, "train.batch_size": 8, "map.bank": 50}
    c.update_from_flattened_dict(fields)
    return c


@pytest.fixture(scope="module")
def fitted():
    return Detector.fit(IMAGES, config=tiny("fastflow"), backbone=cnn(name="mine", licence="MIT"))


def test_features_are_those_of_the_function():
    backbone = cnn(mean=(0.5,) * 3, std=(0.25,) * 3)
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    expected = Cnn().apply(variables(), images)
    for ours, theirs in zip(backbone(images), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert (backbone.layers, backbone.channels, backbone.strides) == (
        ("map0", "map1"),
        (6, 8),
        (2, 4),
    )


def test_images_are_normalised_as_stated():
    """The function sees (image / 255 - mean) / std."""
    backbone = Backbone.from_function(
        lambda _, images: images, {}, (3,), (1,), image_size=(8, 8), mean=(0.5,) * 3, std=(2.0,) * 3
    )
    c = tiny(length_power=1.0, feature_dtype="float32")
    detector = Detector.fit(IMAGES[:, :8, :8], config=c, backbone=backbone)
    (features,) = detector.features(IMAGES[0, :8, :8])
    np.testing.assert_allclose(features[0], (IMAGES[0, :8, :8] / 255 - 0.5) / 2, atol=1e-6)


def test_a_detector_is_saved_without_the_function_and_loaded_with_it(fitted, tmp_path):
    path = fitted.save(tmp_path / "mine.zip")
    again = Detector.load(path, backbone=cnn(name="mine"))
    assert again.config.backbone == "mine"
    assert again.config.layers == ("map0", "map1")
    for ours, theirs in zip(again.predict(IMAGES[:3]), fitted.predict(IMAGES[:3]), strict=True):
        assert ours.score == theirs.score
        np.testing.assert_array_equal(ours.anomaly_map, theirs.anomaly_map)
    with pytest.raises(InputError, match=r"mine is a function of Python.*Detector\.load"):
        Detector.load(path)
    with pytest.raises(InputError, match="another backbone than mine: the sha256"):
        Detector.load(path, backbone=cnn(seed=1, name="mine"))
    with pytest.raises(InputError, match=r"another backbone than mine: layers are \('map0'"):
        Detector.load(path, backbone=cnn(name="mine", layers=("fine", "coarse")))


def test_other_code_with_the_same_variables_is_refused(fitted, tmp_path):
    path = fitted.save(tmp_path / "mine")

    def doubled(variables, images):
        return [2 * m for m in Cnn().apply(variables, images)]

    other = Backbone.from_function(
        doubled, variables(), (6, 8), (2, 4), name="mine", image_size=(32, 32)
    )
    with pytest.raises(InputError, match=r"mine gives other features.*Restore its code"):
        Detector.load(path, backbone=other)


def test_detectors_of_other_backbones_take_none(tmp_path):
    c = tiny(backbone="pixels", image_size=(8,))
    path = Detector.fit(IMAGES[:, :8, :8], config=c).save(tmp_path / "pixels")
    with pytest.raises(InputError, match=r"trained with pixels.*Leave backbone out"):
        Detector.load(path, backbone=cnn())


def test_a_run_directory_is_continued_with_the_same_function(tmp_path):
    c = tiny()
    first = Detector.fit(IMAGES, config=c, backbone=cnn(), workdir=tmp_path / "run")
    again = Detector.fit(IMAGES, config=c, backbone=cnn(), workdir=tmp_path / "run")
    assert again.predict(IMAGES[0]).score == first.predict(IMAGES[0]).score
    with pytest.raises(InputError, match="sha256"):
        Detector.fit(IMAGES, config=c, backbone=cnn(seed=1), workdir=tmp_path / "run")


def test_an_nnx_module_is_a_backbone():
    graph, state = nnx.split(NnxCnn(nnx.Rngs(0)))
    backbone = Backbone.from_function(
        lambda state, images: nnx.merge(graph, state)(images),
        state,
        (5,),
        (2,),
        image_size=(32,) * 2,
    )
    detector = Detector.fit(IMAGES, config=tiny(), backbone=backbone)
    assert np.isfinite(detector.predict(IMAGES[0]).score)


def test_features_are_cached_by_the_variables():
    prints = [feature_fingerprint(fill(with_function(tiny(), cnn(seed))), 0) for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": (6, 9)}, r"not \[B, h, w, C\] with \(channels, stride\) of \[\(6, 2\), \(9"),
        ({"strides": (2, 8)}, r"\(8, 8\)|\(8, 8"),
        ({"channels": (6,), "strides": (2,)}, "returns maps of the shapes"),
        ({"strides": (2,)}, "one of each for every map"),
        ({"layers": ("same", "same")}, "each layer another name"),
        ({"name": "resnet18"}, "name of another backbone"),
    ],
)
def test_wrong_descriptions_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        cnn(**fields)


@pytest.mark.parametrize("field", ["weights", "layers"])
def test_fields_of_other_backbones_are_refused(field):
    value = {"weights": "random", "layers": ("map0",)}[field]
    with pytest.raises(InputError, match=f"config.{field} has no effect on the backbone mine"):
        Detector.fit(IMAGES, config=tiny(**{field: value}), backbone=cnn(name="mine"))


def test_only_functions_are_passed():
    with pytest.raises(InputError, match=r"mine is not a function\. Set config\.backbone"):
        with_function(tiny(), dataclasses.replace(cnn(name="mine"), module=Cnn()))


def test_a_detector_on_a_function_is_exported(fitted, tmp_path):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the exported file")
    parity = fitted.export(tmp_path / "mine.onnx")
    assert parity.flips == 0
