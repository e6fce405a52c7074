"""Images over HTTP: results, maps, forms, errors, metrics, token, limits."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("starlette")
pytest.importorskip("python_multipart")
pytest.importorskip("prometheus_client")

from fastflow_jax.exported import Exported
from fastflow_jax.serve.gate import Limits, Load


def noise(size, seed=0):
    """Content of a PNG of noise of (height, width)."""
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def picture(text):
    """The array of a PNG in base64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_an_image_is_scored_as_in_python(client, file):
    content = noise((20, 14))
    response = client.post("/v1/predict", content=content)
    expected = Exported(file).predict(content)
    assert response.status_code == 200
    found = response.json()
    version = found.pop("version")
    assert found == {
        "name": "image",
        "score": expected.score,
        "p_value": expected.p_value,
        "is_anomalous": expected.is_anomalous,
        "threshold": 0.5,
        "model": "tiny",
    }
    assert re.fullmatch("[0-9a-f]{12}", version)


@pytest.mark.parametrize(("level", "p_value", "is_anomalous"), [(0, 1.0, False), (255, 0.2, True)])
def test_decisions(client, png, level, p_value, is_anomalous):
    found = client.post("/v1/predict", content=png(level)).json()
    assert found["score"] == pytest.approx(level / 255)
    assert found["p_value"] == pytest.approx(p_value)  # (1 + held-out scores above) / 5
    assert found["is_anomalous"] is is_anomalous


def test_maps_and_masks_have_the_size_of_the_image(client, file):
    content = noise((20, 14), seed=1)
    expected = Exported(file).predict(content)
    found = client.post("/v1/predict?map=npy&mask=png", content=content).json()
    assert found["anomaly_map"]["format"] == "npy"
    exact = np.load(io.BytesIO(base64.b64decode(found["anomaly_map"]["data"])))
    np.testing.assert_array_equal(exact, expected.anomaly_map)
    np.testing.assert_array_equal(picture(found["mask"]), 255 * expected.mask.astype(np.uint8))
    found = client.post("/v1/predict?map=png16", content=content).json()["anomaly_map"]
    levels = picture(found["data"])
    assert levels.max() == 65535
    scaled = found["zero"] + (found["full"] - found["zero"]) * levels / 65535
    np.testing.assert_allclose(scaled, expected.anomaly_map, atol=1e-5)
    assert "mask" not in found


def test_a_form_has_a_result_for_each_file_and_page(client, png):
    pages = io.BytesIO()
    frames = [Image.new("L", (4, 4), level) for level in (0, 255)]
    frames[0].save(pages, "TIFF", save_all=True, append_images=frames[1:])
    files = [("files", ("a.png", png(51))), ("files", ("b.tiff", pages.getvalue()))]
    found = client.post("/v1/predict", files=files).json()["predictions"]
    names_and_scores = [(each["name"], round(each["score"], 3)) for each in found]
    assert names_and_scores == [("a.png", 0.2), ("b.tiff#1", 0.0), ("b.tiff#2", 1.0)]
    response = client.post("/v1/predict", content=pages.getvalue())
    assert response.status_code == 422
    assert "more images or pages than 1." in response.json()["error"]
    frames = [Image.new("L", (4, 4), level) for level in range(65)]
    pages = io.BytesIO()
    frames[0].save(pages, "TIFF", save_all=True, append_images=frames[1:])
    response = client.post("/v1/predict", files={"files": ("c.tiff", pages.getvalue())})
    assert response.status_code == 422
    assert "more images or pages than 64." in response.json()["error"]


def bomb():
    """A small PNG file of more pixels than Pillow decodes."""
    content = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(content, "PNG")
    return content.getvalue()


BAD = {
    "text": (b"not an image", "is not an image that Pillow can read"),
    "truncated": (noise((20, 20))[:300], "is broken"),
    "bomb": (bomb(), "is too large"),
    "heic": (b"\0\0\0\x18ftypcrx " + bytes(40), "is camera raw"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_image_is_refused_with_one_message(client, kind):
    content, message = BAD[kind]
    response = client.post("/v1/predict", content=content)
    assert response.status_code == 422
    assert [*response.json()] == ["error"]
    assert response.json()["error"].startswith(f"image {message}")
    response = client.post("/v1/predict", files=[("f", ("bad.png", content))])
    assert response.status_code == 422
    assert response.json()["error"].startswith(f"bad.png {message}")


def test_requests_that_are_malformed(client, png):
    def error(status, *arguments, **content):
        response = client.request(*arguments, **content)
        assert response.status_code == status
        return response.json()["error"]

    assert "has no image" in error(400, "POST", "/v1/predict")
    assert "has no image" in error(400, "POST", "/v1/predict", files={"a": ("a.png", b"")})
    assert "map=jpg" in error(400, "POST", "/v1/predict?map=jpg", content=png(0))
    assert "mask=npy" in error(400, "POST", "/v1/predict?mask=npy", content=png(0))
    assert "no model 'other'" in error(404, "POST", "/v1/predict?model=other", content=png(0))
    form = {"content-type": "multipart/form-data; boundary=x"}
    assert error(400, "POST", "/v1/predict", content=b"--y", headers=form)
    assert error(404, "GET", "/v1/other")
    assert error(405, "GET", "/v1/predict")


def test_models_are_described(client):
    (model,) = client.get("/v1/models").json()["models"]
    assert model["name"] == "tiny"
    assert model["ready"] is True
    assert model["image_size"] == [8, 8]
    assert model["threshold"] == 0.5
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


def test_metrics_count_requests_batches_and_images(client, png, sample):
    counted = {
        'fastflow_requests_total{endpoint="predict",status="200"}': 2,
        'fastflow_requests_total{endpoint="predict",status="422"}': 1,
        'fastflow_request_seconds_count{endpoint="predict"}': 3,
        'fastflow_images_total{model="tiny"}': 3,
        'fastflow_anomalous_images_total{model="tiny"}': 2,
        'fastflow_batch_size_sum{model="tiny"}': 3,
    }
    client.post("/v1/predict", content=b"x")
    before = {name: sample(client, name) or 0 for name in counted}
    client.post("/v1/predict", content=png(255))
    client.post("/v1/predict", content=b"x")
    client.post("/v1/predict", files=[("f", ("a", png(0))), ("f", ("b", png(255)))])
    after = {name: sample(client, name) for name in counted}
    assert {name: after[name] - before[name] for name in counted} == counted
    assert sample(client, 'fastflow_queue_length{model="tiny"}') == 0
    assert sample(client, "fastflow_accepted_requests") == 0


def test_several_models(client_of, export, file, png, tmp_path):
    other = export(tmp_path / "other.onnx", offset=2.0, image_threshold=None, held_out=None)
    with client_of({"tiny": file, "other": other}) as client:
        found = client.post("/v1/predict?model=other", content=png(0)).json()
        assert found["score"] == pytest.approx(2)
        assert found["model"] == "other"
        assert [found[name] for name in ("p_value", "is_anomalous", "threshold")] == [None] * 3
        assert client.post("/v1/predict?model=tiny", content=png(0)).json()["score"] == 0
        response = client.post("/v1/predict", content=png(0))
        assert response.status_code == 400
        assert "tiny, other" in response.json()["error"]


def test_a_token_is_needed_but_for_health(client_of, file, png):
    with client_of({"tiny": file}, Limits(token="sécret")) as client:
        for wrong in ("", "Bearer", "Bearer wrong", "Basic sécret", "sécret"):
            header = {"authorization": wrong.encode()}
            response = client.post("/v1/predict", content=png(0), headers=header)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.post("/v1/predict", content=png(0)).status_code == 401
        for path in ("/metrics", "/v1/models", "/v2/models/tiny"):
            assert client.get(path).status_code == 401
        for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
            assert client.get(path).status_code == 200
        right = {"authorization": "bearer sécret".encode()}
        assert client.post("/v1/predict", content=png(0), headers=right).status_code == 200


def test_limits(client_of, file, png):
    load = Load()
    with client_of({"tiny": file}, Limits(max_bytes=1000, queue=2), load=load) as client:
        assert client.post("/v1/predict", content=png(0)).status_code == 200

        def chunks():
            yield bytes(600)
            yield bytes(600)

        for content in (bytes(1001), chunks()):  # with and without the length in the header
            response = client.post("/v1/predict", content=content)
            assert response.status_code == 413
            assert response.headers["connection"] == "close"
            assert "1000 bytes" in response.json()["error"]
        load.accepted = 2
        response = client.post("/v1/predict", content=png(0))
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert client.get("/readyz").status_code == 200
        load.accepted, load.is_draining = 0, True
        assert client.post("/v1/predict", content=png(0)).status_code == 503
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200


def test_images_of_12_bits_have_the_levels_of_the_detector(client_of, export, tmp_path):
    levels = {"black": 0, "white": 4096, "bits": 12, "window": None}
    given = {"height": 8, "width": 8, "resize": "square", "levels": levels}
    file, content = export(tmp_path / "bits.onnx", input=given), io.BytesIO()
    Image.fromarray(np.full((10, 12), 2048, np.uint16)).save(content, "PNG")
    with client_of({"bits": file}) as client:
        answer = client.post("/v1/predict", content=content.getvalue())
    assert answer.json()["score"] == pytest.approx(128 / 255)


def test_maps_of_very_many_pixels_are_refused(client_of, file, png):
    """Small files would fill the memory with their maps."""
    files = [("files", (name, png(1))) for name in ("a.png", "b.png")]  # 120 pixels each
    with client_of({"tiny": file}, Limits(max_map_pixels=200)) as client:
        assert client.post("/v1/predict", files=files).status_code == 200
        assert client.post("/v1/predict?mask=png", files=files[:1]).status_code == 200
        response = client.post("/v1/predict?mask=png", files=files)
    assert response.status_code == 422
    assert "have more than 200 pixels. Send fewer images" in response.json()["error"]
