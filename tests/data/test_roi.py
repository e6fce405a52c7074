"""Regions of interest from masks: reading, sizes, names, and model inputs."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from fastflow_jax.data.arrays import as_dataset
from fastflow_jax.data.dataset import Dataset, Source
from fastflow_jax.data.inputs import Outputs, cut
from fastflow_jax.data.pipeline import as_input, batches
from fastflow_jax.data.roi import CommonRegion, open_region, with_regions
from fastflow_jax.data.tiling import Tiling
from fastflow_jax.data.transforms import counted, normalise
from fastflow_jax.errors import InputError

RNG = np.random.default_rng(0)
LEFT = np.arange(30)[None].repeat(20, 0) < 12  # of 20 x 30 pixels


def write(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return path


def source(names, size=(20, 30), roi=None):
    images = RNG.integers(0, 256, (len(names), *size, 3), np.uint8)
    return Source(tuple(names), ("good",) * len(names), lambda i: (images[i], None), roi=roi)


def section(**fields):
    return ConfigDict({"roi": None, "roi_dir": None, **fields})


def test_a_mask_is_resized_by_the_nearest_pixel_to_images_of_its_aspect_ratio(tmp_path):
    region = open_region(write(tmp_path / "mask.png", LEFT))
    np.testing.assert_array_equal(region("a.png", (20, 30)), LEFT)
    np.testing.assert_array_equal(region("a.png", (40, 60)), LEFT.repeat(2, 0).repeat(2, 1))
    assert region("a.png", (667, 1000)).mean() == pytest.approx(0.4, abs=0.01)  # rounded
    with pytest.raises(InputError, match=r"a\.png has 20 x 20 pixels, but .* has 30 x 20\. Both"):
        region("a.png", (20, 20))


def test_missing_broken_and_black_masks_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.png does not exist\. Pass an image"):
        open_region(tmp_path / "none.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    with pytest.raises(InputError, match=r"broken\.png"):
        open_region(tmp_path / "broken.png")
    with pytest.raises(InputError, match=r"black\.png is black everywhere.* Paint"):
        open_region(write(tmp_path / "black.png", np.zeros((4, 4), bool)))
    with pytest.raises(InputError, match=r"must be \[H, W\], of bool or uint8"):
        open_region(np.zeros((4, 4, 3)))


def test_a_mask_in_json_is_the_mask():
    again = CommonRegion.from_plain(CommonRegion(LEFT).to_plain())
    np.testing.assert_array_equal(again.mask, LEFT)


def test_all_splits_have_the_common_mask(tmp_path):
    file = write(tmp_path / "mask.png", LEFT)
    dataset = Dataset("folder", source(["good/a.png"]), source(["good/a.png"]), {})
    found = with_regions(dataset, section(roi=str(file)))
    for split in (found.train, found.test):
        assert split is not None
        assert split.roi is not None
        np.testing.assert_array_equal(split.roi(0, (20, 30)), LEFT)
    assert with_regions(dataset, section(roi="auto")).train.roi is None
    with pytest.raises(InputError, match=r"is the directory .* as --config\.data\.roi_dir"):
        with_regions(dataset, section(roi=str(tmp_path)))


def test_a_white_mask_and_headers_of_another_aspect_ratio_are_reported(tmp_path, caplog):
    file = write(tmp_path / "mask.png", np.ones((20, 30), bool))
    images = as_dataset([write(tmp_path / f"{name}.png", LEFT) for name in "ab"])
    with_regions(images, section(roi=str(file)))
    assert "mask.png is white everywhere, so all pixels count" in caplog.text
    write(file, LEFT[:, :20])
    with pytest.raises(InputError, match=r"a\.png has 30 x 20 pixels, but .*mask\.png has 20 x 20"):
        with_regions(images, section(roi=str(file)))


def test_masks_of_images_are_found_by_split_and_name(tmp_path):
    write(tmp_path / "train/good/sub/a.png", LEFT)
    write(tmp_path / "test/crack/a_mask.png", ~LEFT)
    dataset = Dataset("folder", source(["good/sub/a.jpg"]), source(["crack/a.bmp"]), {})
    found = with_regions(dataset, section(roi_dir=str(tmp_path)))
    assert found.train.roi is not None
    np.testing.assert_array_equal(found.train.roi(0, (20, 30)), LEFT)
    assert found.test is not None
    assert found.test.roi is not None
    np.testing.assert_array_equal(found.test.roi(0, (20, 30)), ~LEFT)
    (tmp_path / "test/crack/a_mask.png").unlink()
    with pytest.raises(InputError, match=r"test/crack/a\.png does not exist\. Put the mask of"):
        found.test.roi(0, (20, 30))
    with pytest.raises(InputError, match="is not a directory"):
        with_regions(dataset, section(roi_dir=str(tmp_path / "none")))


def test_a_bare_directory_needs_no_directory_of_the_split(tmp_path):
    write(tmp_path / "a.png", LEFT)
    found = with_regions(
        Dataset("folder", source(["good/a.png"]), None, {}), section(roi_dir=str(tmp_path))
    )
    assert found.train.roi is not None
    np.testing.assert_array_equal(found.train.roi(0, (20, 30)), LEFT)


def test_two_images_never_share_a_mask_by_accident(tmp_path):
    write(tmp_path / "good/a.png", LEFT)
    dataset = Dataset("folder", source(["good/a.png"]), source(["good/a.png"]), {})
    with pytest.raises(InputError, match=r"one mask for train/good/a\.png and test/good/a\.png"):
        with_regions(dataset, section(roi_dir=str(tmp_path)))


def test_subsets_keep_the_regions_of_their_images(tmp_path):
    for name, mask in (("a", LEFT), ("b", ~LEFT)):
        write(tmp_path / f"{name}.png", mask)
    images = as_dataset([write(tmp_path / f"images/{name}.png", LEFT) for name in "ab"])
    found = with_regions(images, section(roi_dir=str(tmp_path))).train.subset(np.array([1]))
    assert found.roi is not None
    np.testing.assert_array_equal(found.roi(0, (20, 30)), ~LEFT)


@pytest.mark.parametrize("how", ["square", "crop", "pad"])
def test_inputs_keep_pixels_outside_of_the_region_and_zero_padding(how):
    image = RNG.integers(1, 256, (20, 30, 3), np.uint8)
    given, valid, _ = as_input(image, (24, 24), how, LEFT)
    plain, padding, _ = as_input(image, (24, 24), how)
    expected, _, _ = as_input(LEFT[..., None].repeat(3, 2).astype(np.uint8) * 255, (24, 24), how)
    np.testing.assert_array_equal(given, plain)
    # Pillow interpolates images, so the edge may differ by a pixel.
    assert (counted(valid) != (expected[..., 0] > 127)).mean() < 0.05
    mean, std = (0.5,) * 3, (0.2,) * 3
    np.testing.assert_array_equal(
        normalise(given, mean, std, valid), normalise(plain, mean, std, padding)
    )


def test_batches_have_the_pixels_that_count():
    right = source(["a", "b"], roi=lambda i, size: LEFT if i else ~LEFT)
    how = {"image_size": (20, 30), "mean": (0.5,) * 3, "std": (0.2,) * 3, "batch_size": 2}
    (batch,) = batches(right, **how)
    np.testing.assert_array_equal(batch.valid, np.stack([~LEFT, LEFT]))
    assert batch.image.all(-1).mean() > 0.9  # not zeroed


def test_a_region_without_a_pixel_in_the_input_is_an_error():
    thin = np.zeros((200, 200), bool)
    thin[100, 101] = True
    dot = source(["dot.png"], (200, 200), roi=lambda i, size: thin)
    how = {"image_size": (4, 4), "mean": (0.5,) * 3, "std": (0.2,) * 3, "batch_size": 1}
    with pytest.raises(InputError, match=r"No pixel of dot\.png counts"):
        list(batches(dot, **how))
    with pytest.raises(InputError, match=r"No pixel of dot\.png counts"):
        cut(np.zeros((200, 200, 3), np.uint8), "dot.png", (4, 4), "square", region=thin)


def test_tiles_are_cut_from_the_region_and_left_out_without_a_pixel():
    image, region = RNG.integers(0, 256, (20, 90, 3), np.uint8), np.zeros((20, 90), bool)
    region[5:10, 3:12] = True
    inputs = cut(image, "a", (20, 20), "square", Tiling((20, 20)), region=region)
    outputs, n = Outputs(inputs), 0
    for part in inputs.parts:
        assert part.valid is not None
        np.testing.assert_array_equal(counted(part.valid), region[part.where])
        outputs.add(part, np.float32(n), np.full((20, 20), 2.0 + n, np.float32))
        n += 1
    assert 0 < n == inputs.n < len(inputs.where)
    assert outputs.is_complete
    assert outputs.score == n - 1
    found = outputs.anomaly_map
    assert np.unique(found[~region]).tolist() == [found[region].min()]
    assert found.min() >= 2
