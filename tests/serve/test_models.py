"""Served models: worker processes that are lost, and files that change."""

import os
import signal
import threading

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from fastflow_jax.errors import InputError
from fastflow_jax.serve.metrics import Metrics
from fastflow_jax.serve.models import Engine, Model


@pytest.fixture
def own_workers(workers_of):
    """Ids of the worker processes that this test has started."""
    before = set(workers_of(os.getpid()))
    return lambda: sorted(set(workers_of(os.getpid())) - before)


def test_no_request_is_lost_with_a_worker(client_of, file, png, own_workers, sample, until):
    restarts = 'fastflow_worker_restarts_total{model="tiny"}'
    with client_of({"tiny": file}) as client:
        (first,) = own_workers()
        os.kill(first, signal.SIGSTOP)
        found = []
        posting = threading.Thread(
            target=lambda: found.append(client.post("/v1/predict", content=png(255)))
        )
        posting.start()
        until(lambda: sample(client, 'fastflow_batch_size_count{model="tiny"}') == 1)
        os.kill(first, signal.SIGKILL)  # while it has the image
        posting.join(20)
        assert found[0].status_code == 200
        assert found[0].json()["score"] == pytest.approx(1)
        assert sample(client, restarts) == 1
        (second,) = own_workers()
        os.kill(second, signal.SIGKILL)  # while it is idle
        until(lambda: sample(client, restarts) == 2 and client.get("/readyz").status_code == 200)
        assert client.post("/v1/predict", content=png(255)).status_code == 200
    assert not own_workers()


def test_requests_are_refused_if_workers_end_again_and_again(
    client_of, file, png, own_workers, sample, until
):
    with client_of({"tiny": file}) as client:
        found = []
        posting = threading.Thread(
            target=lambda: found.append(client.post("/v1/predict", content=png(255)))
        )
        os.kill(own_workers()[0], signal.SIGSTOP)
        posting.start()
        seen = 0
        while not found and seen < 100:
            for worker in own_workers():
                os.kill(worker, signal.SIGKILL)
                seen += 1
            posting.join(0.05)
        assert found[0].status_code == 503
        assert found[0].headers["retry-after"] == "1"
        until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/v1/predict", content=png(0)).status_code == 200


def test_a_changed_file_is_loaded(
    client_of, export, file, png, tmp_path, sample, until, caplog, own_workers
):
    copy = tmp_path / "tiny.onnx"
    copy.write_bytes(file.read_bytes())
    reloads = 'fastflow_reloads_total{model="tiny",result="%s"}'
    with client_of({"tiny": copy}) as client:
        first = client.post("/v1/predict", content=png(0)).json()
        assert first["score"] == 0
        copy.write_bytes(b"damaged")
        until(lambda: sample(client, reloads % "failed") == 1)
        assert client.post("/v1/predict", content=png(0)).json() == first
        (message,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
        assert message.startswith(f"{copy} has changed, but {copy} ")
        os.kill(own_workers()[0], signal.SIGKILL)  # the new one does not read the damaged file
        assert client.post("/v1/predict", content=png(0)).json() == first
        copy.unlink()
        assert client.post("/v1/predict", content=png(0)).json() == first
        export(copy, offset=3.0)
        until(lambda: sample(client, reloads % "loaded") == 1)
        second = client.post("/v1/predict", content=png(0)).json()
        assert second["score"] == 3
        assert second["version"] != first["version"]
        assert client.get("/v1/models").json()["models"][0]["version"] == second["version"]


def test_a_version_in_use_stays_open(export, tmp_path, own_workers):
    file = export(tmp_path / "tiny.onnx")
    model = Model("tiny", file, Engine(threads=1), Metrics())
    with model.use() as old:
        export(file, offset=5.0)
        model.reload_if_changed()
        assert model.current is old  # it may still be being written
        model.reload_if_changed()
        assert model.current is not old
        assert len(own_workers()) == 2
        image = np.zeros((1, *old.image_size, 3), np.uint8)
        assert old.run(image)["score"] == 0
        with model.use() as new:
            assert new.run(image)["score"] == 5
    assert len(own_workers()) == 1
    model.close()
    assert not own_workers()


@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_files_that_are_no_detector(tmp_path, content):
    file = tmp_path / "bad.onnx"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"^\S*bad\.onnx cannot be loaded"):
        Model("bad", file, Engine(), Metrics())
