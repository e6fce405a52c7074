"""Exported detectors: their predictions are those of the detector, without JAX."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fastflow_jax import Detector, InputError
from fastflow_jax.config import default
from fastflow_jax.detectors.base import recipe

onnx = pytest.importorskip("onnx", reason="ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="ONNX export needs the extra onnx")

from fastflow_jax.exported import Exported, to_metadata  # noqa: E402


def tiny(kind="fastflow", **fields):
    """A configuration that trains in seconds, on pixels."""
    c = default()
    c.update(recipe(kind))
    c.backbone, c.image_size, c.batch_size, c.data.holdout = "pixels", (16, 24), 8, 0.25
    if kind == "fastflow":
        c.flow.steps, c.flow.hidden_ratio, c.train.epochs, c.train.batch_size = 2, 2.0, 2, 8
    c.update_from_flattened_dict(fields)
    return c


def photographs(n=16, seed=0, size=(20, 30)):
    """Evenly grey, with a little noise, uint8 [n, H, W, 3]."""
    return np.random.default_rng(seed).integers(118, 138, (n, *size, 3), np.uint8)


def spoilt(size=(20, 30)):
    image = photographs(1, seed=9, size=size)[0]
    image[6:16, 12:24] = (250, 20, 20)
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory of PNG files; a detector is trained on `train/good`."""
    root = tmp_path_factory.mktemp("detector") / "images"
    (root / "train/good").mkdir(parents=True)
    for i, image in enumerate(photographs()):
        Image.fromarray(image).save(root / f"train/good/{i:02}.png")
    return root


@pytest.fixture(scope="module")
def detector(folder):
    return Detector.fit(folder, config=tiny(), workdir=folder.with_name("run"))


@pytest.fixture(scope="module")
def file(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "grey.onnx"
    parity = detector.export(path)
    assert (parity.held_out, parity.random, parity.flips) == (4, 4, 0)
    assert parity.score < 1e-4
    assert parity.anomaly_map < 1e-3
    return path


def assert_same(found, expected):
    assert found.name == expected.name
    np.testing.assert_allclose(found.score, expected.score, rtol=1e-4)
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, rtol=1e-3, atol=1e-3)
    assert found.p_value == pytest.approx(expected.p_value)
    assert found.is_anomalous is expected.is_anomalous
    assert (found.mask != expected.mask).mean() < 0.01
    assert found.log_likelihood is found.distance is None


@pytest.mark.parametrize("tile", [False, True])
def test_predictions_are_those_of_the_detector(detector, file, tile, tmp_path):
    exported = Exported(file)
    assert exported.image_size == (16, 24)
    images = [*photographs(3, seed=8), spoilt(), photographs(1, size=(40, 60))[0], spoilt()[..., 0]]
    path = tmp_path / "spoilt.png"
    Image.fromarray(spoilt()).save(path)
    results = exported.predict([*images, path], tile=tile)
    for found, expected in zip(results, detector.predict([*images, path], tile=tile), strict=True):
        assert_same(found, expected)
    assert results[3].is_anomalous
    assert results[3].mask.any()
    assert_same(exported.predict(str(path)), detector.predict(str(path)))


def test_files_have_the_same_decisions_at_another_rate(detector, file):
    exported, expected = (
        Exported(file).with_threshold(rate=0.25),
        detector.with_threshold(rate=0.25),
    )
    assert exported.image_threshold == expected.image_threshold
    assert_same(pickle.loads(pickle.dumps(exported)).predict(spoilt()), expected.predict(spoilt()))


def test_the_metadata_describe_the_detector(detector, file):
    about = Exported(file).metadata
    assert about["detector"] == "fastflow"
    assert about["backbone"] == "pixels"
    assert about["classes"] == ["normal", "anomalous"]
    assert about["input"] | {"height": 16, "width": 24, "layout": "NHWC"} == about["input"]
    assert about["image_threshold"]["rate"] == detector.image_threshold.rate
    assert about["licence"] == "none needed"
    assert about["parity"]["flips"] == 0
    other = detector.with_threshold(image=detector.image_threshold.value + 1)
    other.export(file.with_name("other.onnx"))
    assert Exported(file.with_name("other.onnx")).metadata["fingerprint"] != about["fingerprint"]


def test_a_model_that_resizes_takes_images_of_any_size(detector, tmp_path):
    import onnxruntime

    detector.export(tmp_path / "any.onnx", any_size=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "any.onnx"))
    image = np.asarray(Image.fromarray(spoilt()).resize((90, 70), Image.Resampling.BICUBIC))
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {"images": image[None]}), strict=True))
    expected = detector.predict(image)
    assert found["score"][0] == pytest.approx(expected.score, rel=0.05)
    assert found["anomaly_map"].shape == found["mask"].shape == (1, 70, 90)
    # A grey level is much for a detector of grey images.
    assert np.abs(found["anomaly_map"][0] - expected.anomaly_map).mean() < 0.1
    assert np.corrcoef(found["anomaly_map"].ravel(), expected.anomaly_map.ravel())[0, 1] > 0.99
    assert (found["mask"][0] != expected.mask).mean() < 0.05
    assert found["mask"].any()
    assert found["is_anomalous"][0]
    assert_same(Exported(tmp_path / "any.onnx").predict(image), expected)


def test_a_detector_without_thresholds_is_exported_without_decisions(tmp_path):
    fitted = Detector.fit(photographs(6), config=tiny("knn", **{"data.holdout": 0.0}))
    fitted.export(tmp_path / "scores.onnx")
    result = Exported(tmp_path / "scores.onnx").predict(spoilt())
    assert result.p_value is result.is_anomalous is result.mask is None
    assert result.score == pytest.approx(fitted.predict(spoilt()).score, rel=1e-4)


def test_stablehlo_is_read_by_jax_alone(detector, tmp_path):
    import jax

    detector.export(tmp_path / "grey.stablehlo", kind="stablehlo")
    content = (tmp_path / "grey.stablehlo").read_bytes()
    call = jax.export.deserialize(bytearray(content)).call
    images = photographs(3, size=(16, 24))
    expected = detector.as_function()(images)
    for name, array in jax.jit(call)(images).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-3, atol=1e-3)
    about = json.loads((tmp_path / "grey.stablehlo.json").read_text())
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    assert about["parity"]["flips"] == 0


def test_a_fresh_process_predicts_without_jax(detector, file, tmp_path):
    Image.fromarray(spoilt()).save(tmp_path / "spoilt.png")
    code = """
import sys
from fastflow_jax.exported import Exported
result = Exported(sys.argv[1], threads=1).predict(sys.argv[2])
used = {name.partition(".")[0] for name in sys.modules}
print(result.score, result.is_anomalous, sorted(used & {"jax", "scipy", "flax", "onnx", "sklearn"}))
"""
    command = [sys.executable, "-c", code, file, tmp_path / "spoilt.png"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    score, decision, used = process.stdout.split(maxsplit=2)
    assert float(score) == pytest.approx(detector.predict(spoilt()).score, rel=1e-4)
    assert (decision, used.strip()) == ("True", "[]")


@pytest.mark.parametrize(
    ("kind", "fields", "options", "message"),
    [
        ("spade", {}, {}, "The detector spade cannot be exported. Fit one of"),
        ("knn", {"data.resize": "pad"}, {}, "Images of this detector are padded"),
        ("knn", {"data.resize": "crop"}, {"any_size": True}, "resized by 'crop'"),
        (
            "knn",
            {},
            {"kind": "tflite"},
            "format 'tflite' is unknown. Choose from onnx, html, stablehlo",
        ),
        ("knn", {}, {"kind": "stablehlo", "any_size": True}, "need the format onnx"),
        ("knn", {}, {"opset": 3}, "opset 3 is not supported"),
    ],
)
def test_impossible_exports_are_refused(kind, fields, options, message, tmp_path):
    fitted = Detector.fit(photographs(6), config=tiny(kind, **fields))
    with pytest.raises(InputError, match=message):
        fitted.export(tmp_path / "detector.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_a_missing_directory_is_named(detector, tmp_path):
    with pytest.raises(InputError, match="nowhere is not a directory"):
        detector.export(tmp_path / "nowhere/detector.onnx")


def test_a_file_with_other_results_is_not_written(detector, tmp_path, monkeypatch):
    """The exported function is another one here."""
    function = detector.as_function()

    def wrong(self):
        return lambda images: function(images) | {"score": function(images)["score"] * 1.001}

    monkeypatch.setattr(Detector, "as_function", wrong)
    with pytest.raises(InputError, match="not written, because its results differ"):
        detector.export(tmp_path / "wrong.onnx")
    assert not list(tmp_path.iterdir())


def changed(file, path, **fields):
    """A copy of an exported file with other metadata."""
    model = onnx.load(file)
    known = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, known | to_metadata(fields))
    onnx.save(model, path)


def test_files_that_are_no_exported_detectors_are_refused(file, tmp_path):
    path = tmp_path / "other.onnx"
    with pytest.raises(InputError, match=r"other\.onnx was not found"):
        Exported(path)
    path.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"other\.onnx cannot be loaded"):
        Exported(path)
    model = onnx.load(file)
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(InputError, match="is not an exported detector"):
        Exported(path)
    changed(file, path, format=2)
    with pytest.raises(InputError, match="another version of this package"):
        Exported(path)
    for damage in ({"held_out": 3}, {"input": {"resize": "square"}}, {"image_threshold": [1]}):
        changed(file, path, **damage)
        with pytest.raises(InputError, match=r"metadata of .* are damaged"):
            Exported(path)
