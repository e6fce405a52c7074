"""A detector in LiteRT equals the detector in JAX. The format is experimental."""

import json
import pathlib
import sys

import numpy as np
import pytest

from fastflow_jax import Detector, InputError

DURABLE = pathlib.Path(__file__).parent.parent / "goldens" / "durable"


@pytest.fixture(scope="module")
def interpreter():
    """The module that runs files of LiteRT."""
    pytest.importorskip("litert_converter", reason="the extra litert is experimental")
    return pytest.importorskip("ai_edge_litert.interpreter", reason="it runs the file")


@pytest.fixture(scope="module")
def file(interpreter, grey, tmp_path_factory):
    """An exported file of the detector `grey`."""
    path = tmp_path_factory.mktemp("litert") / "grey.tflite"
    grey[0].export(path, kind="litert")
    return path


def test_a_file_equals_the_detector(interpreter, file, grey):
    detector = grey[0]
    score = interpreter.Interpreter(model_path=str(file)).get_signature_runner()
    images = np.random.default_rng(2).integers(118, 138, (3, 16, 16, 3), np.uint8)
    images[0, 3:9, 3:9] = (250, 20, 20)
    expected = detector.run(images, None)
    expected |= detector.decision(expected["score"], expected["anomaly_map"])
    for i, image in enumerate(images):
        found = score(images=image[None])
        assert set(found) == {"score", "anomaly_map", "p_value", "is_anomalous", "mask"}
        for name, tolerance in (("score", 1e-4), ("anomaly_map", 1e-3), ("p_value", 1e-6)):
            scale = np.abs(expected[name][i]).max()
            assert found[name].dtype == np.float32
            np.testing.assert_allclose(found[name][0], expected[name][i], atol=tolerance * scale)
        assert found["is_anomalous"].tolist() == [i == 0] == [expected["is_anomalous"][i]]
        distance = np.abs(expected["anomaly_map"][i] - detector.pixel_threshold.value)
        is_clear = distance > 1e-3 * np.abs(expected["anomaly_map"][i]).max()
        assert is_clear.mean() > 0.5
        np.testing.assert_array_equal(found["mask"][0][is_clear], expected["mask"][i][is_clear])


def test_a_description_is_next_to_the_file(file, grey):
    about = json.loads(file.with_name("grey.tflite.json").read_text())
    assert (about["detector"], about["batch"]) == ("fastflow", 1)
    assert about["image_threshold"]["value"] == grey[0].image_threshold.value
    assert about["parity"]["random"] > 0
    assert about["parity"]["flips"] == 0


def test_a_file_with_other_results_is_not_written(interpreter, grey, tmp_path, monkeypatch):
    """The exported function is another one here."""
    function = grey[0].as_function()

    def wrong(self):
        return lambda images: function(images) | {"score": function(images)["score"] * 1.001}

    monkeypatch.setattr(Detector, "as_function", wrong)
    with pytest.raises(InputError, match="not written, because its results differ"):
        grey[0].export(tmp_path / "wrong.tflite", kind="litert")
    assert not list(tmp_path.iterdir())


def test_operations_that_litert_lacks_are_named(interpreter, tmp_path):
    """It does not choose channels of features in 16 bits."""
    detector = Detector.load(DURABLE / "gaussian.zip")
    with pytest.raises(InputError, match=r"cannot be converted to LiteRT .*gather.* Choose"):
        detector.export(tmp_path / "gaussian.tflite", kind="litert")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["litert_converter.mlir.ir", "ai_edge_litert.interpreter"])
def test_the_extra_is_named_if_a_package_is_missing(missing, grey, tmp_path, monkeypatch):
    if missing.startswith("ai_edge"):
        pytest.importorskip("litert_converter", reason="the file is converted first")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=r"Run pip install 'fastflow-jax\[litert\]'"):
        grey[0].export(tmp_path / "grey.tflite", kind="litert")
    assert not list(tmp_path.iterdir())
