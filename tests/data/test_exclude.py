"""Lists of normal images to leave out."""

import numpy as np
import pytest
from PIL import Image

from fastflow_jax import Detector, data
from fastflow_jax.config import default, fill, name_data
from fastflow_jax.errors import InputError


@pytest.fixture
def photos(tmp_path):
    """Six grey images to train on, two for calibration, one to test on; the level is the number."""
    root = tmp_path / "photos"
    for split, numbers in (("train", range(6)), ("calibration", (6, 7)), ("test", (8,))):
        folder = root / split / "good"
        folder.mkdir(parents=True)
        for i in numbers:
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def opened(photos, tmp_path):
    """A function that opens the data set without the images that a text names."""

    def open_with(text):
        file = tmp_path / "exclude.txt"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        c = default()
        c.data.root, c.data.exclude = str(photos), str(file)
        return data.open_dataset(fill(c).data)

    return open_with


def levels(source):
    return [int(source[i].image[0, 0, 0]) for i in range(len(source))]


def test_named_images_are_left_out(opened):
    dataset = opened("# bent\r\ngood/1.png\r\n\n  good/4.png  \ncalibration/good/7.png\n")
    assert levels(dataset.train) == [0, 2, 3, 5]
    assert dataset.train.names == tuple(f"good/{i}.png" for i in (0, 2, 3, 5))
    assert [file.st_size > 0 for file in dataset.train.files] == [True] * 4
    assert dataset.train.header(2).size == (8, 8)
    assert levels(dataset.calibration) == [6]
    assert levels(dataset.test) == [8]
    assert dataset.provenance["excluded_images"] == 3
    assert dataset.provenance["train_images"] == 6


def test_a_list_of_comments_leaves_out_nothing(opened):
    dataset = opened("# nothing\n")
    assert len(dataset.train) == 6
    assert dataset.provenance["excluded_images"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("good/0.png\ngood/9.png\n", r"names good/9.png, which is not .* such as good/0.png"),
        ("good/8.png\n", "names good/8.png"),  # a test image
        ("calibration/good/0.png\n", "names calibration/good/0.png"),
        ("".join(f"good/{i}.png\n" for i in range(6)), "names all 6 images, such as good/0.png"),
        ("calibration/good/6.png\ncalibration/good/7.png\n", "names all 2 images"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_impossible_lists_are_refused(opened, text, message):
    with pytest.raises(InputError, match=message):
        opened(text)


def test_a_missing_list_is_refused(photos, tmp_path):
    c = default()
    c.data.root, c.data.exclude = str(photos), str(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        data.open_dataset(fill(c).data)


def test_lists_of_several_categories_name_the_category(tmp_path):
    file = tmp_path / "exclude.txt"
    c = default()
    name_data(c, "synthetic/brick,gravel")
    c.data.exclude = str(file)
    whole = default()
    name_data(whole, "synthetic/brick")
    names = data.open_dataset(whole.data).train.names
    file.write_text(f"brick/{names[0]}\nbrick/{names[2]}\ngravel/{names[1]}\n")
    open_category = data.opener(c.data)
    assert open_category("brick").train.names == (names[1], *names[3:])
    assert open_category("gravel").train.names == (names[0], *names[2:])
    c.data.category = "gravel"  # one category alone
    assert data.open_dataset(c.data).train.names == (names[0], *names[2:])
    file.write_text(f"{names[1]}\n")
    assert data.open_dataset(c.data).train.names == (names[0], *names[2:])
    c.data.category = "brick,gravel"
    with pytest.raises(InputError, match=f"Use names such as brick/{names[0]}"):
        data.opener(c.data)("brick")


def test_a_subset_of_shared_images_keeps_its_place_in_them():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    names = tuple("abcde")
    whole = data.Source(names, ("good",) * 5, lambda i: (images[i], None), groups=tuple("vwxyz"))
    part = data.Source(
        names[1:], ("good",) * 4, lambda i: (images[i + 1], None), part_of=(whole, slice(1, None))
    )
    found = data.subset(part, [1, 3])
    assert found.names == ("c", "e")
    assert levels(found) == [2, 4]
    assert found.part_of[1].tolist() == [2, 4]
    assert data.subset(whole, [4]).groups == ("z",)


def test_the_configuration_of_a_fit_leaves_out_images_of_a_list(tmp_path, photos):
    file, c = tmp_path / "exclude.txt", default()
    paths = sorted((photos / "train/good").iterdir())
    file.write_text(f"{paths[0]}\n")
    c.data.exclude = str(file)
    c.update(weights="random", image_size=(32,), layers=("blocks.2",), detector="gaussian")
    Detector.fit(paths, config=c, workdir=tmp_path / "run")
    known = (tmp_path / "run/learns_from.json").read_text()
    assert "0.png" not in known
    assert "1.png" in known
    file.write_text(f"{paths[1]}\n")
    with pytest.raises(InputError, match="training images are not those"):
        Detector.fit(paths, config=c, workdir=tmp_path / "run")
