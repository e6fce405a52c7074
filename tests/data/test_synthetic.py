"""Painted defects: exact masks, disjoint crops, determined by the seed."""

import importlib.util

import numpy as np
import pytest

from fastflow_jax.data import open_dataset
from fastflow_jax.data.synthetic import CATEGORIES, DEFECTS, paint_dataset
from fastflow_jax.errors import InputError

needs_textures = pytest.mark.skipif(
    importlib.util.find_spec("skimage") is None, reason="pip install scikit-image"
)


@needs_textures
@pytest.mark.parametrize("category", CATEGORIES)
def test_the_data_set(category, data_config):
    dataset = open_dataset(data_config("synthetic", category=category))
    assert dataset.name == f"{category}_synth"
    assert dataset.provenance["note"] == "defects are painted"
    assert (len(dataset.train), len(dataset.test)) == (64, 72)
    assert dataset.train.labels.sum() == 0
    assert dataset.test.labels.sum() == 48
    assert set(dataset.test.defects) == {"good", *DEFECTS}
    assert len(set(dataset.test.names)) == 72
    for source, index in ((dataset.train, 5), (dataset.test, 3), (dataset.test, 40)):
        example = source[index]
        assert example.image.shape == (128, 128, 3)
        assert example.image.dtype == np.uint8
        assert example.mask.shape == (128, 128)
        assert example.mask.any() == (example.label == 1) == (example.defect != "good")


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("seed", range(5))
def test_masks_are_exact(defect, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(90, 160, (96, 96), np.uint8)
    painted, mask = DEFECTS[defect](rng, image)
    assert painted.dtype == np.uint8
    np.testing.assert_array_equal(painted[~mask], image[~mask])
    assert (painted[mask] != image[mask]).mean() > 0.9
    assert 0.001 < mask.mean() < 0.25


@needs_textures
def test_images_are_determined_by_the_seed():
    small = {"side": 32, "train": 3, "good": 2, "defective": 3}

    def read(seed):
        dataset = paint_dataset("grass", seed=seed, **small)
        examples = [*dataset.train, *dataset.test]
        return np.stack([e.image for e in examples]), np.stack([e.mask for e in examples])

    images, masks = read(0)
    for again, first in zip(read(0), (images, masks), strict=True):
        np.testing.assert_array_equal(again, first)
    other_images, _ = read(1)
    assert (other_images != images).any(axis=(1, 2, 3)).all()


@needs_textures
def test_training_and_test_crops_share_no_pixel(monkeypatch):
    # Texture whose grey level is the column, 0 to 255 in the left half and in the right half.
    columns = np.broadcast_to(np.arange(512) // 2, (512, 512)).astype(np.uint8)
    monkeypatch.setattr("fastflow_jax.data.synthetic._read_texture", lambda category: columns)
    dataset = paint_dataset("brick", side=100, train=50, good=50, defective=0)
    assert max(example.image.max() for example in dataset.train) < 128
    assert min(example.image.min() for example in dataset.test) >= 128


def test_an_unknown_texture(data_config):
    with pytest.raises(InputError, match=r"data.category is 'bricks'.*brick, grass, gravel"):
        open_dataset(data_config("synthetic", category="bricks"))


def test_missing_scikit_image(data_config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install scikit-image"):
        open_dataset(data_config("synthetic", category="brick"))
