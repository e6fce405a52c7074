"""Batches: order, shapes, values and errors."""

import threading
import time

import numpy as np
import pytest

from fastflow_jax.data import Source
from fastflow_jax.data.dataset import Regions
from fastflow_jax.data.pipeline import batches, regions_as_input
from fastflow_jax.data.transforms import MASK_RESIZES, resize_mask
from fastflow_jax.errors import InputError

MEAN, STD = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)


def make_source(n, *, masks=True, broken=(), delay=0.0):
    """Source whose image i has grey level i and another size than its neighbours."""

    def load(index):
        time.sleep(delay * (n - index))
        if index in broken:
            raise InputError(f"image {index} is broken")
        size = (4 + index % 3, 5 + index % 2)
        image = np.full((*size, 3), index, np.uint8)
        return image, np.full(size, index % 2 == 1) if masks else None

    defects = tuple("good" if i % 2 == 0 else "hole" for i in range(n))
    return Source(tuple(f"{defects[i]}/{i}.png" for i in range(n)), defects, load)


def read(source, **options):
    defaults = {"image_size": (6, 4), "mean": MEAN, "std": STD, "batch_size": 4}
    return batches(source, **(defaults | options))


def test_batches_have_every_example_once_and_in_order():
    read_batches = list(read(make_source(10)))
    assert [len(batch.image) for batch in read_batches] == [4, 4, 2]
    for batch in read_batches:
        n = len(batch.index)
        assert batch.image.shape == (n, 6, 4, 3)
        assert batch.image.dtype == np.float32
        assert batch.mask.shape == (n, 6, 4)
        assert batch.mask.dtype == bool
        expected = (batch.index[:, None] / 255 - MEAN) / STD
        np.testing.assert_allclose(batch.image[:, 0, 0], expected, rtol=1e-5)
        np.testing.assert_array_equal(batch.mask.all(axis=(1, 2)), batch.label == 1)
        np.testing.assert_array_equal(batch.label, batch.index % 2)
    indices = np.concatenate([batch.index for batch in read_batches])
    np.testing.assert_array_equal(indices, np.arange(10))


def wide_image(index=0):
    """Source of one image, 20 x 40, whose mask is its right half."""
    rows, columns = np.mgrid[:20, :40]
    mask = columns >= 20
    return Source(
        ("a.png",),
        ("hole",),
        lambda i: (np.stack([rows * 6, columns * 6, 0 * rows], -1).astype(np.uint8), mask),
    )


def test_padding_is_zero_and_not_valid():
    (batch,) = read(wide_image(), image_size=(16, 16), resize_by="pad")
    inside = np.zeros((16, 16), bool)
    inside[4:12] = True
    np.testing.assert_array_equal(batch.valid[0], inside)
    assert not batch.image[0][~inside].any()
    assert batch.image[0][inside].all(-1).mean() > 0.9
    np.testing.assert_array_equal(batch.mask[0, 4:12, 8:], True)
    assert batch.mask.sum() == 8 * 8


def test_crop_keeps_the_centre_of_image_and_mask():
    (batch,) = read(
        wide_image(), image_size=(20, 20), resize_by="crop", mean=(0, 0, 0), std=(1, 1, 1)
    )
    assert batch.valid is None
    image, mask = wide_image().load(0)
    np.testing.assert_allclose(batch.image[0] * 255, image[:, 10:30], atol=1e-4)
    np.testing.assert_array_equal(batch.mask[0], mask[:, 10:30])


def test_masks_are_resized_by_the_given_method():
    masks = [next(read(wide_image(), image_size=(5, 7), mask_resize=m)).mask for m in MASK_RESIZES]
    for mask, how in zip(masks, MASK_RESIZES, strict=True):
        np.testing.assert_array_equal(mask[0], resize_mask(wide_image().load(0)[1], (5, 7), how))
    assert masks[1].sum() < masks[0].sum()


@pytest.mark.parametrize("indices", [[7, 2, 2, 9, 0], np.array([3, 1]), range(5, 1, -1), []])
def test_indices_are_read_in_their_order(indices):
    read_indices = [i for batch in read(make_source(10), indices=indices) for i in batch.index]
    assert read_indices == list(indices)


def test_the_order_does_not_depend_on_the_threads():
    # Later images load faster.
    source = make_source(12, delay=0.002)
    indices = np.concatenate([batch.index for batch in read(source)])
    np.testing.assert_array_equal(indices, np.arange(12))


def test_a_source_without_masks():
    assert all(batch.mask is None for batch in read(make_source(5, masks=False)))


def test_an_error_is_raised_unchanged_with_its_batch():
    reading = read(make_source(12, broken=[6]))
    np.testing.assert_array_equal(next(reading).index, range(4))
    with pytest.raises(InputError) as error:
        next(reading)
    assert str(error.value) == "image 6 is broken"


def test_images_are_decoded_ahead_of_their_use():
    loaded = []
    plain = make_source(40)

    def load(index):
        loaded.append(index)
        return plain.load(index)

    reading = read(Source(plain.names, plain.defects, load))
    next(reading)
    deadline = time.monotonic() + 5
    while len(loaded) < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(loaded) >= 12, "the first batch has 4 images, and two more must be decoded ahead"
    assert len(loaded) < 40, "must not decode the whole source"
    reading.close()


def test_threads_end_with_the_iteration():
    before = set(threading.enumerate())
    assert len(list(read(make_source(40)))) == 10
    with pytest.raises(InputError):
        list(read(make_source(40, broken=[3])))
    abandoned = read(make_source(40))
    next(abandoned)
    abandoned.close()
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("resize_by", ["square", "crop", "pad"])
def test_regions_are_resized_as_masks_are(resize_by):
    mask = np.zeros((12, 20), bool)
    mask[2:9, 3:18] = True
    regions = Regions(np.stack([mask & (np.arange(20) < 9), ~mask & mask, mask]), np.ones(3))
    source = Source(("a.png",), ("hole",), lambda i: (np.zeros((12, 20, 3), np.uint8), mask))
    (batch,) = read(source, resize_by=resize_by)
    found = regions_as_input(regions, (6, 4), resize_by, "nearest")
    np.testing.assert_array_equal(found.masks[-1], batch.mask[0])
    assert len(found.masks) == len(found.saturation) == 2  # the empty region is dropped
    assert (found.masks[0] <= found.masks[1]).all()
    none = Regions(np.zeros((0, 12, 20), bool), np.ones(0))
    assert regions_as_input(none, (6, 4), resize_by, "nearest").masks.shape == (0, 6, 4)
