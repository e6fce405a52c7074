"""Model inputs of images of any size, and the way back of their maps."""

import numpy as np
import pytest

from fastflow_jax.data.inputs import Outputs, cut, stacked
from fastflow_jax.data.tiling import Tiling
from fastflow_jax.data.transforms import seen_part


def inputs_of(image, resize_by="square", tile=False):
    return cut(image, "an image", (32, 48), resize_by, Tiling((32, 48)) if tile else None)


def brightness(inputs):
    """Returns the map of an image, given the function from a model input to its map."""
    outputs = Outputs(inputs)
    for part in inputs.parts:
        assert not outputs.is_complete
        outputs.add(part, part.image.max(), part.image.mean(-1, dtype=np.float32))
    assert outputs.is_complete
    return outputs.anomaly_map


def spot(size, rows, columns):
    image = np.full((*size, 3), 60, np.uint8)
    image[rows, columns] = 220
    return image


@pytest.mark.parametrize("resize_by", ["square", "crop", "pad"])
@pytest.mark.parametrize("size", [(40, 90), (100, 50), (32, 48), (9, 9)])
def test_maps_are_aligned_with_the_image(resize_by, size):
    rows, columns = (slice(n // 3, n // 3 + n // 4) for n in size)
    inputs = inputs_of(spot(size, rows, columns), resize_by)
    anomaly_map = brightness(inputs)
    assert anomaly_map.shape == size
    assert anomaly_map.dtype == np.float32
    bright = np.argwhere(anomaly_map > anomaly_map.min() + 0.7 * np.ptp(anomaly_map))
    seen = np.zeros(size, bool)
    seen[rows, columns] = True
    np.testing.assert_allclose(bright.mean(0), np.argwhere(seen).mean(0), atol=max(size) / 25)


def test_tiles_show_the_image_at_its_own_resolution_without_seams():
    y, x = np.mgrid[:70, :100]
    image = np.repeat((y + x).astype(np.uint8)[..., None], 3, -1)
    inputs = inputs_of(image, tile=True)
    assert len(inputs.where) > 4
    np.testing.assert_allclose(brightness(inputs), y + x, atol=1e-3)
    assert len(inputs_of(image).where) == 1


@pytest.mark.parametrize("resize_by", ["square", "crop", "pad"])
@pytest.mark.parametrize("size", [(12, 200), (200, 20), (31, 49), (33, 47), (70, 100)])
def test_tiles_cover_the_image(resize_by, size):
    inputs = inputs_of(np.zeros((*size, 3), np.uint8), resize_by, tile=True)
    seen = np.zeros(size, bool)
    for part in inputs.parts:
        seen_part(seen[part.where], part.placed)[:] = True
    assert seen.all()


def test_an_image_not_larger_than_the_input_is_not_tiled():
    assert len(inputs_of(np.zeros((32, 48, 3), np.uint8), tile=True).where) == 1
    # One side is larger: tiles are as high as the image.
    inputs = inputs_of(np.zeros((20, 100, 3), np.uint8), tile=True)
    assert len(inputs.where) > 1
    assert all(rows == slice(0, 20) for rows, _ in inputs.where)


def test_the_score_is_the_maximum_and_the_log_likelihood_the_mean_of_the_parts():
    inputs = inputs_of(np.zeros((32, 100, 3), np.uint8), tile=True)
    parts = list(inputs.parts)
    assert len(parts) == 3
    outputs = Outputs(inputs)
    for part, score in zip(parts, np.float32([1, 7, 4]), strict=True):
        outputs.add(part, score, part.image[..., 0].astype("f"), -score)
    assert (outputs.score, outputs.log_likelihood) == (7, -4)
    outputs = Outputs(inputs)
    for part, score in zip(parts, np.float32([1, np.nan, 4]), strict=True):
        outputs.add(part, score, part.image[..., 0].astype("f"))
    assert np.isnan(outputs.score)
    assert outputs.log_likelihood is None


@pytest.mark.parametrize("resize_by", ["square", "pad"])
def test_parts_are_stacked_with_their_padding(resize_by):
    parts = list(inputs_of(np.zeros((40, 100, 3), np.uint8), resize_by, tile=True).parts)
    images, valid = stacked(parts)
    assert images.shape == (len(parts), 32, 48, 3)
    assert (valid is None) == (resize_by == "square")
    if valid is not None:
        assert valid.shape == images.shape[:3]


def test_a_stated_resolution_changes_the_tiles_but_not_the_size_of_the_map():
    y, x = np.mgrid[:60, :120]
    image = np.repeat((y + x).astype(np.uint8)[..., None], 3, -1)
    inputs = cut(image, "an image", (32, 48), "square", Tiling((32, 48), resolution=240))
    assert (inputs.size, inputs.own_size) == ((120, 240), (60, 120))
    assert all(part.image.shape == (32, 48, 3) for part in inputs.parts)
    inputs = cut(image, "an image", (32, 48), "square", Tiling((32, 48), resolution=240))
    assert brightness(inputs).shape == (60, 120)
    inputs = cut(image, "an image", (32, 48), "square", Tiling((32, 48), resolution=240))
    np.testing.assert_allclose(brightness(inputs)[2:-2, 2:-2], (y + x)[2:-2, 2:-2], atol=1)
