"""False alarms that are marked over HTTP are learned by the command that the server states."""

import http.client
import io
import json
import shlex

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("starlette")

from fastflow_jax import Detector
from fastflow_jax.config import default
from fastflow_jax.detectors.base import recipe


def content(light):
    """A PNG of even grey with a little noise."""
    pixels = np.random.default_rng(light).integers(118 + light, 138 + light, (20, 20, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_marked_images_are_learned(started_server, started, export, tmp_path):
    config = default()
    config.update(recipe("knn"))
    config.backbone, config.image_size, config.data.holdout = "pixels", (16,), 0.5
    normal = np.random.default_rng(0).integers(118, 138, (24, 20, 20, 3), np.uint8)
    run, marked = tmp_path / "grey run", tmp_path / "marked"
    detector = Detector.fit(normal, config=config, workdir=run)
    brighter = content(40)
    assert detector.predict(brighter).is_anomalous
    served = export(run / "served.onnx")
    arguments = f"{{'grey': {str(served)!r}}}, port=0, false_alarms={str(marked)!r}"
    with started_server(arguments) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("POST", "/v1/false_alarms", brighter)
        assert connection.getresponse().status == 201
        connection.close()
        connection.request("GET", "/v1/models")
        (model,) = json.loads(connection.getresponse().read())["models"]
        connection.close()
    program, *words = shlex.split(model["false_alarms"]["command"])
    assert program == "fastflow-jax"
    assert started(words) == 0
    taught = Detector.load(run)
    assert not taught.predict(brighter).is_anomalous
    assert taught.image_threshold == detector.image_threshold  # --keep_threshold
