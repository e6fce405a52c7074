"""Stated depths and windows: in training, saved detectors, exported files and predictions."""

import numpy as np
import pytest
import tifffile

from fastflow_jax import Detector, InputError
from fastflow_jax.config import default, fill
from fastflow_jax.data import open_dataset
from fastflow_jax.detectors.base import recipe
from fastflow_jax.features.prepare import feature_fingerprint
from fastflow_jax.runs import experiment


def tiny(kind="knn", **fields):
    """A configuration of a detector on pixels that needs no training."""
    c = default()
    c.update(recipe(kind))
    c.backbone, c.image_size, c.batch_size, c.data.holdout = "pixels", (16,), 8, 0.25
    c.update_from_flattened_dict(fields)
    return c


def photographs(n=16, seed=0):
    """Grey, of 12 bits, uint16 [n, H, W]."""
    return np.random.default_rng(seed).integers(1900, 2100, (n, 20, 24), np.uint16)


def spoilt():
    image = photographs(1, seed=9)[0]
    image[6:14, 8:16] = 4000
    return image


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    (root / "train/good").mkdir(parents=True)
    for i, image in enumerate(photographs()):
        tifffile.imwrite(root / f"train/good/{i:02}.tif", image, photometric="minisblack")
    return root


@pytest.mark.parametrize("fields", [{"data.bits": 12}, {"data.window": (1, 99)}], ids=str)
def test_files_and_arrays_have_the_scores_of_images_mapped_by_hand(folder, fields, tmp_path):
    detector = Detector.fit(folder, config=tiny(**fields), workdir=tmp_path / "run")
    of_arrays = Detector.fit([*photographs()], config=tiny(**fields))
    low, high = (0, 4096)
    if "data.window" in fields:
        low, high = np.percentile(photographs(), (1, 99))
        assert detector.config.data["levels"] == pytest.approx((low, high))

    def mapped(images):
        return np.floor(np.clip((images - low) / (high - low) * 256, 0, 255)).astype(np.uint8)

    by_hand = Detector.fit([*mapped(photographs())], config=tiny())
    path = tmp_path / "spoilt.tif"
    tifffile.imwrite(path, spoilt(), photometric="minisblack")
    expected = by_hand.predict(mapped(spoilt()))
    loaded = Detector.load(tmp_path / "run")
    for found in (detector.predict(path), of_arrays.predict(spoilt()), loaded.predict(spoilt())):
        np.testing.assert_allclose(found.score, expected.score, rtol=1e-5)
        np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, rtol=1e-3, atol=1e-4)
        assert found.is_anomalous


def test_an_image_that_is_too_bright_as_a_whole_is_found(folder):
    detector = Detector.fit(folder, config=tiny(**{"data.window": (1, 99)}))
    normal, bright = detector.predict([photographs(1, seed=5)[0], photographs(1, seed=5)[0] + 400])
    assert bright.score > normal.score
    assert bright.is_anomalous


def test_the_levels_are_exported_and_saved(folder, tmp_path):
    pytest.importorskip("onnx", reason="ONNX export needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="ONNX export needs the extra onnx")
    from fastflow_jax.exported import Exported

    detector = Detector.fit(folder, config=tiny("gaussian", **{"data.window": (1, 99)}))
    detector.export(tmp_path / "a.onnx")
    exported = Exported(tmp_path / "a.onnx")
    assert exported.levels == detector.levels
    assert exported.metadata["input"]["levels"]["black"] == detector.levels.black
    copy = Detector.load(detector.save(tmp_path / "saved.zip"))
    assert copy.levels == detector.levels
    expected = detector.predict(spoilt()).score
    np.testing.assert_allclose(exported.predict(spoilt()).score, expected, rtol=1e-4)
    np.testing.assert_allclose(copy.predict(spoilt()).score, expected, rtol=1e-5)
    with pytest.raises(InputError, match="more than 8 bits, which browsers do not read"):
        detector.export(tmp_path / "a.html", kind="html")


def test_a_run_measures_the_levels_of_its_window(folder, tmp_path):
    config = fill(tiny(**{"data.window": (1, 99), "data.root": str(folder), "audit": 0.0}))
    results = experiment.run(config, tmp_path / "run")
    low, high = np.percentile(photographs(), (1, 99))
    detector = Detector.load(tmp_path / "run")
    assert (detector.levels.black, detector.levels.white) == pytest.approx((low, high))
    assert detector.predict(spoilt()).is_anomalous
    assert experiment.run(config, tmp_path / "run") == results


def test_new_normal_images_are_taught_with_the_levels_of_the_training(folder):
    detector = Detector.fit(folder, config=tiny(**{"data.window": (1, 99)}))
    bright = photographs(1, seed=5)[0] + 400
    taught = detector.update([bright], keep_threshold=True)
    assert taught.predict(bright).score < detector.predict(bright).score
    assert taught.levels == detector.levels


def test_features_are_not_shared_between_levels():
    fields = [{}, {"data.bits": 12}, {"data.bits": 10}, {"data.levels": (1.0, 9.0)}]
    assert len({feature_fingerprint(fill(tiny(**each)), 0) for each in fields}) == len(fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"data.bits": 8}, "config.data.bits must be from 9 to 16, not 8"),
        ({"data.window": (99, 1)}, r"config.data.window must be \(low, high\)"),
        ({"data.window": (1, 101)}, r"config.data.window must be \(low, high\)"),
        ({"data.window": (1,)}, r"config.data.window must be \(low, high\)"),
        ({"data.window": ("a", "b")}, r"config.data.window must be \(low, high\)"),
        ({"data.bits": 12, "data.window": (1, 99)}, "bits and config.data.window are both set"),
        ({"data.bits": 12, "data.levels": (0, 9)}, "bits and config.data.levels are both set"),
        ({"data.bits": 12, "data.name": "elpv"}, "config.data.bits has no effect on elpv"),
        ({"data.window": (1, 99), "one_model": True}, "set config.data.levels"),
    ],
)
def test_levels_that_do_not_fit_are_refused(fields, says):
    with pytest.raises(InputError, match=says):
        fill(tiny(**fields))


def test_a_data_set_with_other_levels_is_refused(folder):
    config = tiny(**{"data.name": "folder", "data.root": str(folder), "data.bits": 12})
    with pytest.raises(InputError, match="opened with other levels"):
        Detector.fit(open_dataset(config.data), config=tiny())
    detector = Detector.fit(open_dataset(config.data), config=tiny(**{"data.bits": 12}))
    assert detector.predict(spoilt()).is_anomalous
