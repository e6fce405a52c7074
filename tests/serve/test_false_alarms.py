"""False alarms over HTTP: stored once, under safe names, within limits, and not for other sites."""

import errno
import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from starlette.datastructures import Headers

from fastflow_jax.decision import Decision, Threshold
from fastflow_jax.errors import InputError
from fastflow_jax.serve.about import false_alarm_rates
from fastflow_jax.serve.false_alarms import FalseAlarms
from fastflow_jax.serve.origin import refusal

MARK = "/v1/false_alarms"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "marked" / "tiny"


@pytest.fixture(scope="module")
def site(client_of, file):
    """A client of an application that stores false alarms in the directory that is set last."""
    stores = {}
    with client_of({"tiny": file}, false_alarms=stores) as client:
        yield client, stores


@pytest.fixture
def marking(site, folder):
    """A client of an application that stores false alarms in `folder`."""
    client, stores = site
    stores["tiny"] = FalseAlarms(folder, max_images=3, max_bytes=1000)
    return client


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_image_is_stored_once_and_removed(marking, folder, png):
    content = png(255)
    response = marking.post(MARK, content=content)
    name = hashlib.sha256(content).hexdigest()[:32] + ".png"
    assert (response.status_code, response.json()) == (201, {"name": name, "images": 1})
    assert (folder / name).read_bytes() == content
    assert marking.post(f"{MARK}?model=tiny", content=content).status_code == 200
    assert names(folder) == [name]
    (model,) = marking.get("/v1/models").json()["models"]
    command = f"fastflow-jax update --workdir=RUN --input={folder} --keep_threshold"
    assert model["false_alarms"] == {"images": 1, "command": command}
    response = marking.delete(f"{MARK}/{name}")
    assert (response.status_code, response.json()) == (200, {"images": 0})
    assert names(folder) == []
    assert marking.delete(f"{MARK}/{name}").status_code == 404


def test_only_marked_images_can_be_removed(marking, folder, png):
    marking.post(MARK, content=png(255))
    secret, note = folder.parent / "secret.png", folder / "note.txt"
    for other in (secret, note):
        other.write_bytes(b"x")
    for name in ("note.txt", "../secret.png", "..%2Fsecret.png", "%2e%2e/secret.png", "x"):
        assert marking.delete(f"{MARK}/{name}").status_code in (404, 405)
    assert secret.exists()
    assert note.exists()


def test_only_single_images_are_stored(marking, folder, png):
    pages = io.BytesIO()
    Image.new("L", (4, 4)).save(
        pages, "TIFF", save_all=True, append_images=[Image.new("L", (4, 4))]
    )
    for content in (b"", b"not an image", png(9, (20, 20))[:50], pages.getvalue()):
        assert marking.post(MARK, content=content).status_code == 422
    assert names(folder) == []
    other = io.BytesIO()
    Image.new("L", (4, 4)).save(other, "JPEG")
    name = marking.post(f"{MARK}?name=../../x.sh", content=other.getvalue()).json()["name"]
    assert name.endswith(".jpeg")


def test_number_and_size_are_limited(marking, folder, png):
    stored = [marking.post(MARK, content=png(level)) for level in range(4)]
    assert [response.status_code for response in stored] == [201, 201, 201, 507]
    assert "has 3 images. Teach them with `fastflow-jax update`" in stored[3].json()["error"]
    assert marking.post(MARK, content=png(0)).status_code == 200  # stored before
    marking.delete(f"{MARK}/{stored[0].json()['name']}")
    large = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (30, 30), np.uint8)
    Image.fromarray(noise).save(large, "PNG")
    response = marking.post(MARK, content=large.getvalue())
    assert response.status_code == 507
    assert "bytes" in response.json()["error"]
    assert len(names(folder)) == 2


def test_a_full_disk_is_reported_and_nothing_stays(marking, folder, png, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    response = marking.post(MARK, content=png(1))
    assert response.status_code == 507
    assert response.json()["error"] == (
        f"{folder} cannot be written: No space left on device. Make room there."
    )
    assert names(folder) == []


def test_a_directory_that_was_removed_is_made_again(marking, folder, png):
    folder.rmdir()
    assert marking.get("/v1/models").json()["models"][0]["false_alarms"]["images"] == 0
    assert marking.post(MARK, content=png(1)).status_code == 201


def test_rests_of_a_killed_server_are_removed(folder):
    folder.mkdir(parents=True)
    (folder / "0123.tmp").write_bytes(b"half")
    assert len(FalseAlarms(folder)) == 0
    assert names(folder) == []


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/tiny cannot be a directory: a file of that name"):
        FalseAlarms(tmp_path / "file" / "tiny")


def test_nothing_is_stored_unless_a_directory_is_given(client, png):
    response = client.post(MARK, content=png(1))
    assert response.status_code == 404
    assert "--false_alarms=DIR" in response.json()["error"]
    assert client.get("/v1/models").json()["models"][0]["false_alarms"] is None


HOST = "testserver"
FOREIGN = (
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site", "origin": f"http://{HOST}"},
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": f"http://{HOST}:8001"},
    {"origin": "http://evil.example", "host": "evil.example"},  # DNS rebinding
)
OWN = (
    {},
    {"sec-fetch-site": "same-origin", "origin": "https://inspect.example"},
    {"sec-fetch-site": "none"},
    {"origin": "http://127.0.0.1:8000", "host": "127.0.0.1:8000"},
    {"origin": "http://[::1]:8000", "host": "[::1]:8000"},
    {"origin": "http://localhost:8000", "host": "localhost:8000"},
)


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_pages_of_other_sites_are_refused(marking, folder, png, headers):
    marked = marking.post(MARK, content=png(1)).json()["name"]
    assert marking.post(MARK, content=png(2), headers=headers).status_code == 403
    assert marking.delete(f"{MARK}/{marked}", headers=headers).status_code == 403
    assert marking.post("/v1/predict", content=png(2), headers=headers).status_code == 403
    assert names(folder) == [marked]
    answer = marking.get("/v1/models", headers=headers)  # which the browser keeps from that page
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("headers", OWN, ids=str)
def test_the_own_page_and_other_programs_are_accepted(marking, png, headers):
    assert marking.post(MARK, content=png(1), headers=headers).status_code == 201


def test_with_a_token_the_page_has_any_name():
    headers = Headers({"origin": "http://inspect.example", "host": "inspect.example"})
    assert refusal(headers, has_token=True) is None
    assert "set FASTFLOW_TOKEN" in refusal(headers, has_token=False)


def test_false_alarm_rates_are_those_of_the_threshold(client):
    found = client.get("/v1/models").json()["models"][0]["held_out"]
    assert found["images"] == 4
    assert found["thresholds"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert found["rates"] == pytest.approx([0.8, 0.6, 0.4, 0.2])  # (1 + scores above) / 5
    many = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    found = false_alarm_rates(Decision(Threshold(0.0), held_out=many))
    assert len(found["thresholds"]) == 200
    for threshold, rate in zip(found["thresholds"], found["rates"], strict=True):
        assert rate == pytest.approx((1 + (many > threshold).sum()) / 1001)
    assert false_alarm_rates(Decision()) is None
    json.dumps(found)
