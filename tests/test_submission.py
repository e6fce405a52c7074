"""Results of the private test images of MVTec AD 2, on a miniature tree."""

import io

import numpy as np
import pytest
from PIL import Image

from fastflow_jax import Detector
from fastflow_jax.config import default
from fastflow_jax.data.tfds.mvtec_ad_2 import CATEGORIES, PRIVATE
from fastflow_jax.errors import InputError
from fastflow_jax.submission import encode_tiff, submit

RNG = np.random.default_rng(0)
SUFFIXES = {"test_private": "regular", "test_private_mixed": "mixed"}


def photograph(path, bright=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = RNG.integers(118, 138, (20, 24, 3), np.uint8)
    if bright:
        image[4:12, 6:15] = 250
    Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run directory with a detector for each category, all the same."""
    folder = tmp_path_factory.mktemp("run")
    for i in range(12):
        photograph(folder / f"images/{i}.png")
    config = default()
    config.update_from_flattened_dict(
        {
            "detector": "gaussian",
            "backbone": "pixels",
            "image_size": (16,),
            "data.holdout": 0.25,
            "batch_size": 4,
        }
    )
    detector = Detector.fit(folder / "images", config=config)
    for category in CATEGORIES:
        detector.save(folder / category)
    return folder, detector


@pytest.fixture
def root(tmp_path):
    for category in CATEGORIES:
        for split, suffix in SUFFIXES.items():
            for i in range(2):
                photograph(tmp_path / f"raw/{category}/{split}/00{i}_{suffix}.png", bright=i == 1)
    return tmp_path / "raw"


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_maps_and_masks_in_the_layout_of_the_server(run, root, tmp_path, caplog):
    folder, detector = run
    assert submit(folder, root, tmp_path / "out") == 32
    names = {
        f"{category}/{split}/00{i}_{SUFFIXES[split]}"
        for category in CATEGORIES
        for split in PRIVATE
        for i in range(2)
    }
    assert files_below(tmp_path / "out") == {f"anomaly_images/{name}.tiff" for name in names} | {
        f"anomaly_images_thresholded/{name}.png" for name in names
    }
    assert "can/test_private has 2 images, but the server expects 321" in caplog.text
    expected = detector.predict(root / "vial/test_private/001_regular.png")
    mask = np.asarray(
        Image.open(tmp_path / "out/anomaly_images_thresholded/vial/test_private/001_regular.png")
    )
    assert set(np.unique(mask)) == {0, 255}
    np.testing.assert_array_equal(mask == 255, expected.mask)
    tifffile = pytest.importorskip("tifffile", reason="it comes with scikit-image")
    found = tifffile.imread(tmp_path / "out/anomaly_images/vial/test_private/001_regular.tiff")
    assert (found.dtype, found.shape) == (np.float16, (20, 24))
    np.testing.assert_array_equal(found, expected.anomaly_map.astype(np.float16))


def test_floats_of_a_tiff_file():
    tifffile = pytest.importorskip("tifffile", reason="it comes with scikit-image")
    values = np.array([[0, -1.5, 2.25], [1e-3, 1e9, -1e9]], np.float32)
    found = tifffile.imread(io.BytesIO(encode_tiff(values)))
    # The largest float16 is 65504; .001 is rounded to 11 bits.
    np.testing.assert_allclose(found, [[0, -1.5, 2.25], [1e-3, 65504, -65504]], rtol=5e-4)


def test_the_command(run, root, tmp_path, started, capsys):
    options = [f"--workdir={run[0]}", f"--input={root}", f"--output={tmp_path / 'out'}"]
    assert started(["--mode=submit", *options]) == 0
    assert capsys.readouterr().out == f"Results of 32 images: {tmp_path / 'out'}\n"
    assert started(["--mode=submit", *options[:2]]) == 2


def test_a_missing_category(run, root, tmp_path):
    with pytest.raises(InputError, match=r"other/can does not exist\. The server needs all"):
        submit(tmp_path / "other", root, tmp_path / "out")
    (root / "vial/test_private").rename(root / "vial/gone")
    with pytest.raises(InputError, match=r"vial/test_private does not exist\. Pass the directory"):
        submit(run[0], root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_detector_without_a_threshold(run, root, tmp_path):
    folder, detector = run
    for category in CATEGORIES:
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / category).symlink_to(folder / category)
    (tmp_path / "runs/can").unlink()
    config = detector.config.copy_and_resolve_references()
    with config.unlocked():
        config.data.holdout = 0.0
    Detector.fit(folder / "images", config=config).save(tmp_path / "runs/can")
    with pytest.raises(InputError, match=r"runs/can has no pixel threshold"):
        submit(tmp_path / "runs", root, tmp_path / "out")
