"""Checks of data sets for probable mistakes."""

import numpy as np
import pytest
from PIL import Image

from fastflow_jax.data import checks
from fastflow_jax.data.folder import source
from fastflow_jax.data.formats import read_header
from fastflow_jax.data.layout import pages
from fastflow_jax.errors import InputError

RNG = np.random.default_rng(0)


@pytest.fixture
def split(tmp_path):
    """Function from {"good/0.png": image or seed, ...} to a source of such files."""

    def make(name, images):
        records = []
        for path, image in images.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(image, int):
                image = np.random.default_rng(image).integers(0, 255, (8, 6), np.uint8)
            Image.fromarray(image).save(file)
            defect = path.partition("/")[0]
            records += pages(file, read_header(file), path, defect=defect)
        return source(records)

    return make


@pytest.mark.parametrize(("bits", "is_dark"), [(10, True), (12, True), (14, False), (16, False)])
def test_camera_bits_in_16_bit_files_are_reported(split, bits, is_dark):
    images = {f"good/{i}.png": RNG.integers(0, 2**bits, (8, 6), np.uint16) for i in range(3)}
    message = checks.dark_images(split("train", images))
    assert (message is not None) == is_dark
    if is_dark:
        assert "pass --config.data.bits=10 or 12" in message


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.95])
def test_masks_that_mark_most_of_an_image_are_reported(split, share):
    test = split("test", {f"{d}/{i}.png": i for i, d in enumerate(["good", "crack", "hole"])})
    masks = np.zeros((3, 10, 10), bool)
    masks[1:, : round(10 * share)] = True
    message = checks.inverted_masks(masks, test)
    assert (message is not None) == (share > 0.5)
    if message:
        assert "the masks of 2 of 2 defective images" in message


def test_good_images_in_training_and_test_are_reported(split):
    train = split("train", {f"good/{i}.png": i for i in range(5)})
    test = split("test", {"good/a.png": 3, "good/b.png": 9, "crack/c.png": 10})
    message = checks.tested_on_training_images(train, test)
    assert message.startswith("1 test images are equal to training images, such as good/a.png and")
    assert "good/3.png" in message
    other = split("other", {"good/b.png": 9, "crack/c.png": 10})
    assert checks.tested_on_training_images(train, other) is None


def test_a_defective_test_image_among_the_training_images_is_refused(split):
    train = split("train", {f"good/{i}.bmp": i for i in range(5)})
    test = split("test", {"good/a.bmp": 9, "crack/c.bmp": 2})
    with pytest.raises(InputError, match=r"crack/c\.bmp is equal to .* good/2\.bmp\. Remove it"):
        checks.tested_on_training_images(train, test)
