"""Tampering and augmentation: masks move with images; the reading order has no influence."""

import dataclasses
import importlib.util

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from ml_collections import ConfigDict
from PIL import Image
from torchvision_oracle import import_torchvision

from fastflow_jax.config import default
from fastflow_jax.data import Source
from fastflow_jax.data.changes import augment_image, augmented, tampered, warp, with_copies
from fastflow_jax.data.dataset import Regions

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (20, 20, 3), np.uint8)
MASK = RNG.random((20, 20)) > 0.7


def smooth(height=60, width=80):
    """Image whose grey levels are known between its pixels."""
    ys, xs = np.mgrid[:height, :width]
    wave = 128 + 60 * np.sin(xs / 11) + 50 * np.cos(ys / 9)
    return np.repeat(wave[..., None], 3, -1).astype(np.uint8)


@pytest.mark.parametrize("array", [IMAGE, MASK], ids=["image", "mask"])
@pytest.mark.parametrize("quarters", [-1, 1, 2])
def test_quarter_turns_are_exact(array, quarters):
    np.testing.assert_array_equal(warp(array, rotate=90 * quarters), np.rot90(array, quarters))


@pytest.mark.parametrize("array", [IMAGE, MASK], ids=["image", "mask"])
def test_translation_by_whole_pixels_is_exact_and_mirrors_edges(array):
    moved = warp(array, down=0.1, right=-0.15)  # 2 down, 3 to the left
    np.testing.assert_array_equal(moved[2:, :-3], array[:-2, 3:])
    np.testing.assert_array_equal(moved[:2, :-3], array[1::-1, 3:])
    np.testing.assert_array_equal(moved[2:, -3:], array[:-2, :-4:-1])


def test_zoom_about_the_centre():
    image = smooth()
    larger = warp(image, zoom=2.0)
    expected = Image.fromarray(image[15:45, 20:60]).resize((80, 60), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(
        larger[3:-3, 3:-3].astype(int), np.asarray(expected)[3:-3, 3:-3], atol=2
    )
    np.testing.assert_array_equal(warp(MASK, zoom=2.0)[::2, ::2], MASK[5:15, 5:15])


@pytest.mark.parametrize("angle", [-30, 7, 45])
def test_rotation_equals_pillow_in_the_inscribed_circle(angle):
    image = smooth(60, 60)
    theirs = Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR)
    ys, xs = np.mgrid[:60, :60] - 29.5
    inside = np.hypot(ys, xs) < 27
    np.testing.assert_allclose(
        warp(image, rotate=angle)[inside].astype(int), np.asarray(theirs)[inside], atol=1
    )


moves = st.fixed_dictionaries(
    {
        "rotate": st.floats(-180, 180),
        "zoom": st.floats(0.3, 3),
        "down": st.floats(-0.5, 0.5),
        "right": st.floats(-0.5, 0.5),
    }
)


@settings(deadline=None)
@given(moves, st.integers(2, 40), st.integers(2, 40))
def test_masks_move_with_their_images(move, height, width):
    """An image of its own mask stays one, except for pixels exactly on an edge."""
    ys, xs = np.mgrid[:height, :width]
    mask = (ys * 3 + xs * 2) % (height + width) < (height + width) / 2
    image = np.repeat(mask[..., None] * np.uint8(255), 3, -1)
    image, mask = warp(image, **move)[..., 0], warp(mask, **move)
    assert image.shape == mask.shape == (height, width)
    assert mask.dtype == bool
    # Where all interpolated pixels have one colour, the nearest pixel is one of them.
    np.testing.assert_array_equal(mask[image == 255], True)
    np.testing.assert_array_equal(mask[image == 0], False)


def test_warped_images_show_no_border():
    white = np.full((30, 50, 3), 255, np.uint8)
    for move in ({"rotate": 33}, {"zoom": 0.2}, {"down": 0.9, "right": -0.9}):
        assert (warp(white, **move) == 255).all()


def source(n=6, masks=True, part_of=None):
    images = RNG.integers(0, 256, (n, 12, 16, 3), np.uint8)
    mask = images[0, ..., 0] > 128
    names = tuple(f"good/{i}.png" for i in range(n))
    return Source(
        names, ("good",) * n, lambda i: (images[i], mask if masks else None), part_of=part_of
    )


def test_tampering_changes_only_images_and_masks():
    plain, tamper = source(), default().data.tamper
    assert tampered(plain, tamper) is plain
    tamper.rotate = 180.0
    turned = tampered(plain, tamper)
    assert (turned.names, turned.defects) == (plain.names, plain.defects)
    np.testing.assert_array_equal(turned[2].image, plain[2].image[::-1, ::-1])
    np.testing.assert_array_equal(turned[2].mask, plain[2].mask[::-1, ::-1])
    assert tampered(source(masks=False), tamper)[0].mask is None


def test_regions_of_defects_move_with_their_masks():
    plain = source()
    mask = plain[0].mask
    parts = np.stack([mask & (np.arange(16) < 4), mask])

    def regions(index):  # image 0 has two of them, and the others none
        return Regions(parts[: 2 * (index == 0)], np.ones(2 * (index == 0)))

    tamper = default().data.tamper
    tamper.rotate = 180.0
    turned = tampered(dataclasses.replace(plain, regions=regions), tamper)
    np.testing.assert_array_equal(turned.regions(0).masks, parts[:, ::-1, ::-1])
    assert turned.regions(1).masks.shape == (0, *mask.shape)


def test_a_subset_of_a_tampered_source_is_tampered():
    whole, tamper = source(), default().data.tamper
    tamper.down = 0.25
    part = tampered(source(part_of=(whole, np.arange(6))), tamper)
    np.testing.assert_array_equal(part.part_of[0][3].image, warp(whole[3].image, down=0.25))


AUGMENT = ConfigDict({"copies": 0, "flips": True, "rotate": 10.0, "colour": 0.3})


def test_augmentation_depends_only_on_seed_epoch_and_index():
    plain = source()

    def read(seed, epoch, order):
        changed = augmented(plain, AUGMENT, seed, epoch)
        images = {i: changed[i].image for i in order}
        return np.stack([images[i] for i in range(len(plain))])

    first = read(1, 2, range(6))
    np.testing.assert_array_equal(read(1, 2, [3, 5, 0, 1, 2, 4]), first)
    for other in (read(1, 3, range(6)), read(2, 2, range(6))):
        assert all((a != b).any() for a, b in zip(first, other, strict=True))
    assert len({image.tobytes() for image in read(1, 2, range(6))}) == 6
    assert augmented(plain, AUGMENT, 1, 2)[0].mask is None


def test_copies_follow_the_unchanged_images():
    plain = source(part_of=(source(), np.arange(6)))
    copied = with_copies(plain, ConfigDict(AUGMENT.to_dict() | {"copies": 2}))
    assert len(copied) == 18
    for i in range(6):
        np.testing.assert_array_equal(copied[i].image, plain[i].image)
    images = [example.image.tobytes() for example in copied]
    assert len(set(images)) == 18
    again = with_copies(plain, ConfigDict(AUGMENT.to_dict() | {"copies": 1}))
    assert [again[i].image.tobytes() for i in range(12)] == images[:12]
    assert copied.names[1::6] == ("good/1.png", "good/1.png, copy 1", "good/1.png, copy 2")
    assert copied.defects == ("good",) * 18
    assert copied[0].mask is None
    assert copied.part_of is None, "their features are not those of the whole source"


@pytest.mark.parametrize("field", ["flips", "rotate", "colour"])
def test_each_kind_of_augmentation_alone(field):
    only = {"flips": False, "rotate": 0.0, "colour": 0.0} | {field: AUGMENT[field]}
    seen = {augment_image(IMAGE, np.random.default_rng(i), **only).tobytes() for i in range(60)}
    assert len(seen) == (4 if field == "flips" else 60)
    if field == "flips":
        flipped = (IMAGE, IMAGE[::-1], IMAGE[:, ::-1], IMAGE[::-1, ::-1])
        assert seen == {np.ascontiguousarray(image).tobytes() for image in flipped}


def test_no_augmentation_leaves_an_image_unchanged():
    rng = np.random.default_rng(0)
    assert augment_image(IMAGE, rng, flips=False, rotate=0.0, colour=0.0) is IMAGE


def test_colour_jitter_equals_torchvision():
    for package in ("torch", "torchvision"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: the oracle of this test")
    functional = import_torchvision().transforms.functional
    rng = np.random.default_rng(5)
    rng.random(2), rng.uniform(-1, 1)
    factors = 1 + 0.3 * rng.uniform(-1, 1, 3)
    pillow = Image.fromarray(IMAGE)
    for adjust, factor in zip(
        (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation),
        factors,
        strict=True,
    ):
        pillow = adjust(pillow, factor)
    ours = augment_image(IMAGE, np.random.default_rng(5), flips=False, rotate=0.0, colour=0.3)
    np.testing.assert_array_equal(ours, np.asarray(pillow))
