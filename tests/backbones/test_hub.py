"""Download from the timm hub, simulated by a local server."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import safetensors.numpy

pytest.importorskip("huggingface_hub", reason="the hub's client is optional")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FIND = """
import json, sys
from fastflow_jax.backbones import BACKBONES
from fastflow_jax.backbones.weights import find_weights, read_state
from fastflow_jax.errors import InputError
try:
    path, record = find_weights(BACKBONES[sys.argv[1]], sys.argv[2] if len(sys.argv) > 2 else None)
    print(json.dumps([record, sorted(read_state(path))]))
except InputError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def hub():
    """URL of a server of resnet18.tv_in1k and, only as .bin, resnet34.tv_in1k; and the former."""
    weights = safetensors.numpy.save({"conv1.weight": np.ones((2, 2), np.float32)})
    with open(f"{os.path.dirname(__file__)}/../goldens/backbone_zip.pth", "rb") as file:
        files = {
            "/timm/resnet18.tv_in1k/resolve/main/model.safetensors": weights,
            "/timm/resnet34.tv_in1k/resolve/main/pytorch_model.bin": file.read(),
        }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.wfile.write(self.answer())

        def answer(self) -> bytes:
            # The commit has the same files as "main".
            data = files.get(self.path.split("?")[0].replace(COMMIT, "main"))
            self.send_response(404 if data is None else 200)
            if data is None:
                repository = self.path.split("/resolve/")[0]
                known = any(path.startswith(repository + "/") for path in files)
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            else:
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            return data or b""

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", weights
        server.shutdown()


@pytest.fixture
def find(hub, tmp_path):
    """Finds weights in another process, since the client reads its variables on import."""

    def run(*arguments, **variables):
        environment = os.environ | {
            "HF_ENDPOINT": hub[0],
            "HF_HOME": str(tmp_path),
            "JAX_PLATFORMS": "cpu",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-c", FIND, *arguments]
        done = subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_downloads_once_and_then_works_offline(find, hub):
    record, names = find("resnet18")
    assert record == {
        "source": "hub",
        "tag": "resnet18.tv_in1k",
        "revision": COMMIT,
        "file": "model.safetensors",
        "sha256": hashlib.sha256(hub[1]).hexdigest(),
    }
    assert names == ["conv1.weight"]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:1"}
    assert find("resnet18", "timm/resnet18.tv_in1k", **nowhere) == [record, names]
    message = find("resnet18", "a1_in1k", HF_HUB_OFFLINE="1")
    assert message.startswith("The weights timm/resnet18.a1_in1k cannot be downloaded from the hub")


def test_a_file_that_differs_from_the_hub_s_is_refused(find, hub, tmp_path):
    find("resnet18")
    (file,) = tmp_path.rglob("blobs/*")
    file.write_bytes(hub[1] + b" ")
    message = find("resnet18")
    assert "model.safetensors is not the published file: its sha256 is " in message
    assert message.endswith(f"not {file.name}. Delete it and download it again.")


def test_falls_back_to_pytorch_s_file(find):
    record, names = find("resnet34", "tv_in1k")
    assert (record["file"], "0.weight" in names) == ("pytorch_model.bin", True)


def test_unknown_tag_is_refused_with_the_remedy(find):
    message = find("resnet18", "resnet18.made_up")
    assert "timm/resnet18.made_up cannot be downloaded" in message
    assert "pass a weight file of resnet18" in message
