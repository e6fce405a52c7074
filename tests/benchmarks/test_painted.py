"""Synthetic defects: masks match the changed pixels, and the data set can be read."""

import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from fastflow_jax import data
from fastflow_jax.config import default

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import painted


@pytest.mark.parametrize("kind", painted.KINDS)
@pytest.mark.parametrize("shape", [(96, 64, 3), (50, 120, 3)])
def test_pixels_change_inside_the_mask_only(kind, shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(float)
    for seed in range(10):
        changed, mask = painted.KINDS[kind](np.random.default_rng(seed), image)
        assert changed.shape == shape
        assert mask.shape == shape[:2]
        assert mask.dtype == bool
        np.testing.assert_array_equal(changed[~mask], image[~mask])
        assert np.any(changed[mask] != image[mask])
        assert 0 < mask.mean() < 0.3


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["painted.py", *map(str, arguments)])
    painted.main()


def opened(root):
    c = default()
    c.data.name, c.data.root = "folder", str(root)
    return data.opener(c.data)(None)


def test_a_folder_becomes_a_data_set(tmp_path, monkeypatch):
    (tmp_path / "good").mkdir()
    rng = np.random.default_rng(0)
    for i in range(25):
        pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"good/{i}.png")
    for name in ("one", "other"):
        run(monkeypatch, tmp_path / "good", tmp_path / name, "--train", 5)
    one, other = (opened(tmp_path / name) for name in ("one", "other"))
    assert len(one.train) == 5
    assert list(one.test.labels).count(0) == 8
    assert list(one.test.labels).count(1) == 12
    for i in range(20):
        np.testing.assert_array_equal(one.test[i].image, other.test[i].image)
        assert one.test[i].mask.any() == one.test.labels[i]
    seen = {file.read_bytes() for file in (tmp_path / "one/train/good").iterdir()}
    assert not seen & {file.read_bytes() for file in (tmp_path / "one/test/good").iterdir()}


@pytest.mark.parametrize("turned", [False, True])
def test_one_image_is_split_into_a_training_and_a_test_half(tmp_path, monkeypatch, turned):
    pixels = np.full((60, 120, 3), 100, np.uint8)
    pixels[:, 60:] = 200
    Image.fromarray(pixels.swapaxes(0, 1) if turned else pixels).save(tmp_path / "cork.png")
    run(monkeypatch, tmp_path / "cork.png", tmp_path / "set", "--crop", 40, "--train", 4)
    found = opened(tmp_path / "set")
    assert {int(value) for i in range(4) for value in np.unique(found.train[i].image)} == {100}
    good = np.flatnonzero(found.test.labels == 0)
    assert len(good) == painted.GOOD
    assert {int(value) for i in good for value in np.unique(found.test[i].image)} == {200}


def test_unusable_arguments_are_named(tmp_path, monkeypatch, capsys):
    Image.fromarray(np.zeros((60, 120, 3), np.uint8)).save(tmp_path / "cork.png")
    for arguments, message in (
        (["--crop", 61], "is too small for crops of 61 pixels"),
        ([], "--crop must be given for one image"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, tmp_path / "cork.png", tmp_path / "set", *arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, tmp_path / "set", "--train", 1)
    assert "has 1 images" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
