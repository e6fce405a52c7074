"""Profile of training images, and differences of new images from it."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from fastflow_jax.data.arrays import as_dataset
from fastflow_jax.data.folder import source
from fastflow_jax.data.formats import read_header
from fastflow_jax.data.layout import pages
from fastflow_jax.data.profile import Profile, profile_of
from fastflow_jax.data.transforms import decode_image


@pytest.fixture
def write(tmp_path):
    def save(name, size=(20, 30), *, grey=True, **options):
        pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
        image = Image.fromarray(pixels)
        (image.convert("L") if grey else image).save(tmp_path / name, **options)
        return tmp_path / name

    return save


def profile(*paths):
    records = [r for path in paths for r in pages(path, read_header(path), path.name)]
    return profile_of(source(records), np.arange(len(records)))


def differences(known, path):
    found = known.differences(read_header(path), decode_image(path.read_bytes()))
    return {field: sentence.split(",")[0] for field, sentence in found.items()}


def test_images_like_the_training_images_do_not_differ(write):
    known = profile(write("a.png"), write("b.png"))
    assert not differences(known, write("c.png"))
    assert not differences(profile(write("a.jpg", quality=75)), write("b.jpg", quality=78))


def test_another_format_quality_size_depth_or_colour_is_a_difference(write, tmp_path):
    known = profile(write("a.png"), write("b.png"))
    assert differences(known, write("c.jpg", quality=75)) == {
        "format": "is JPEG of quality 75",
    }
    assert differences(known, write("d.png", size=(40, 60))) == {"size": "has 60 x 40 pixels"}
    assert differences(known, write("e.png", grey=False)) == {"colour": "has colours"}
    Image.fromarray(np.full((20, 30), 9000, np.uint16)).save(tmp_path / "f.png")
    assert differences(known, tmp_path / "f.png") == {"depth": "has 16 bits per channel"}
    known = profile(write("a.jpg", quality=95, grey=False))
    assert differences(known, write("b.jpg", quality=75)) == {
        "quality": "is JPEG of quality 75",
        "colour": "is grey",
    }


def test_sizes_close_to_several_training_sizes_do_not_differ(write):
    known = profile(write("a.png", (20, 30)), write("b.png", (40, 50)))
    assert not differences(known, write("c.png", (49, 25)))
    assert "size" in differences(known, write("d.png", (51, 40)))
    assert "size" in differences(known, write("e.png", (15, 40)))


def test_grey_images_in_colour_files_are_grey(write, tmp_path):
    Image.open(write("a.png")).convert("RGB").save(tmp_path / "rgb.png")
    assert not differences(profile(tmp_path / "rgb.png"), write("b.png"))


def test_of_arrays_only_size_and_colour_are_known(write):
    grey = np.random.default_rng(0).integers(0, 255, (20, 30, 1), np.uint8).repeat(3, 2)
    known = profile_of(as_dataset([grey]).train, np.arange(1))
    assert not differences(known, write("a.jpg"))
    assert set(differences(known, write("b.png", (9, 9), grey=False))) == {"size", "colour"}


def test_json_round_trip(write):
    known = profile(write("a.jpg", quality=75), write("b.png"))
    assert Profile.from_plain(json.loads(json.dumps(dataclasses.asdict(known)))) == known
