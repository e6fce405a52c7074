"""Maps come back to where the image was, however it came to the input."""

import numpy as np
import pytest

from fastflow_jax.backbones import find_spec
from fastflow_jax.config import default
from fastflow_jax.data.transforms import seen_part
from fastflow_jax.inputs import cut, whole_box, whole_map

SPEC = find_spec("pixels")


def inputs_of(image, resize_by="square", tile=False):
    c = default()
    c.image_size, c.data.resize = (32, 48), resize_by
    return cut(image, "an image", c, SPEC, tile=tile)


def brightness(inputs):
    """A map that shows what a backbone was shown, [k, 32, 48]."""
    return inputs.images.mean(-1)


def spot(size, rows, columns):
    image = np.full((*size, 3), 60, np.uint8)
    image[rows, columns] = 220
    return image


@pytest.mark.parametrize("resize_by", ["square", "crop", "pad"])
@pytest.mark.parametrize("size", [(40, 90), (100, 50), (32, 48), (9, 9)])
def test_maps_lie_where_the_image_does(resize_by, size):
    rows, columns = (slice(n // 3, n // 3 + n // 4) for n in size)
    inputs = inputs_of(spot(size, rows, columns), resize_by)
    anomaly_map = whole_map(inputs, brightness(inputs))
    assert anomaly_map.shape == size
    assert anomaly_map.dtype == np.float32
    bright = np.argwhere(anomaly_map > anomaly_map.min() + 0.7 * np.ptp(anomaly_map))
    seen = np.zeros(size, bool)
    seen[rows, columns] = True
    np.testing.assert_allclose(bright.mean(0), np.argwhere(seen).mean(0), atol=max(size) / 25)


@pytest.mark.parametrize("resize_by", ["square", "crop", "pad"])
def test_boxes_lie_where_maps_do(resize_by):
    inputs = inputs_of(spot((64, 80), slice(16, 40), slice(30, 50)), resize_by)
    bright = np.argwhere(brightness(inputs)[0] > 0.2)
    box = (*bright.min(0), *(bright.max(0) + 1))
    np.testing.assert_allclose(whole_box(inputs, box), (16, 30, 40, 50), atol=2)


def test_tiles_show_the_image_at_its_own_resolution_without_seams():
    y, x = np.mgrid[:70, :100]
    image = np.repeat((y + x).astype(np.uint8)[..., None], 3, -1)
    inputs = inputs_of(image, tile=True)
    assert len(inputs.images) > 4
    expected = ((y + x) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(whole_map(inputs, brightness(inputs)), expected, atol=1e-5)
    assert len(inputs_of(image).images) == 1


@pytest.mark.parametrize("resize_by", ["square", "crop", "pad"])
@pytest.mark.parametrize("size", [(12, 200), (200, 20), (31, 49), (33, 47), (70, 100)])
def test_tiles_leave_nothing_of_the_image_out(resize_by, size):
    inputs = inputs_of(np.zeros((*size, 3), np.uint8), resize_by, tile=True)
    seen = np.zeros(size, bool)
    for where, placed in zip(inputs.where, inputs.placed, strict=True):
        seen_part(seen[where], placed)[:] = True
    assert seen.all()


def test_what_is_not_larger_than_the_input_is_not_cut():
    assert len(inputs_of(np.zeros((32, 48, 3), np.uint8), tile=True).images) == 1
    # One side is larger: tiles are as high as the image.
    inputs = inputs_of(np.zeros((20, 100, 3), np.uint8), tile=True)
    assert len(inputs.images) > 1
    assert all(rows == slice(0, 20) for rows, _ in inputs.where)
