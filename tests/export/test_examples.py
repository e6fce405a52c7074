"""The programs of examples/ score images as the exported detector does."""

import os
import pathlib
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from fastflow_jax.exported import Exported

EXAMPLES = pathlib.Path(__file__).parent.parent.parent / "examples"
ROOT = os.environ.get("ONNXRUNTIME_ROOT")  # include/ and lib/ of ONNX Runtime


@pytest.fixture(scope="module")
def spoilt(grey, tmp_path_factory):
    """A spoilt image as a PPM file."""
    path = tmp_path_factory.mktemp("image") / "spoilt.ppm"
    Image.fromarray(grey[1]).save(path)
    return path


def fields(line):
    name, *values = line.split("\t")
    return name, values


def test_python_scores_without_jax(any_size, spoilt):
    code = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(sorted({name.partition(".")[0] for name in sys.modules} & {"jax", "flax", "scipy"}))
"""
    command = [sys.executable, "-c", code, EXAMPLES / "python/score.py", any_size, spoilt]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line, used = done.stdout.splitlines()
    expected = Exported(any_size).predict(spoilt)
    name, (score, p_value, decision) = fields(line)
    assert name == expected.name
    assert float(score) == pytest.approx(expected.score, rel=1e-4)
    assert float(p_value) == pytest.approx(expected.p_value)
    assert (decision, used) == ("anomalous", "[]")


@pytest.fixture(scope="module")
def score(tmp_path_factory):
    """The compiled program of examples/cpp."""
    if not shutil.which("cmake"):
        pytest.skip("CMake was not found")
    if not ROOT:
        pytest.skip("the variable ONNXRUNTIME_ROOT does not name a release of ONNX Runtime")
    build = tmp_path_factory.mktemp("cpp")
    configure = ["cmake", "-S", EXAMPLES / "cpp", "-B", build, f"-DONNXRUNTIME_ROOT={ROOT}"]
    for command in (configure, ["cmake", "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stderr
    return build / "score"


def test_cpp_scores(score, any_size, spoilt, tmp_path):
    command = [score, any_size, spoilt, tmp_path / "map.pgm"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(line.split() for line in done.stdout.splitlines()[:2])
    expected = Exported(any_size).run(np.asarray(Image.open(spoilt))[None])
    assert float(found["score"]) == pytest.approx(expected["score"][0], rel=1e-4)
    assert float(found["p_value"]) == pytest.approx(expected["p_value"][0], rel=1e-4)
    assert done.stdout.splitlines()[2] == "anomalous"
    with Image.open(tmp_path / "map.pgm") as image:
        levels = np.asarray(image)
    wanted = expected["anomaly_map"][0]
    wanted = 255 * (wanted - wanted.min()) / np.ptp(wanted)
    np.testing.assert_allclose(levels, wanted, atol=0.6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"P5\n3 3\n255\n" + bytes(9), "is not a binary PPM file"),
        (b"P6\n3 3\n255\n" + bytes(9), "is truncated"),
    ],
)
def test_cpp_refuses_other_files(score, any_size, tmp_path, content, message):
    (tmp_path / "image.ppm").write_bytes(content)
    command = [score, any_size, tmp_path / "image.ppm", tmp_path / "map.pgm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "map.pgm").exists()


def test_the_service_of_kserve_is_valid_yaml():
    yaml = pytest.importorskip("yaml", reason="pyyaml reads the file")
    service = yaml.safe_load((EXAMPLES / "kserve/inferenceservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    model = service["spec"]["predictor"]["model"]
    assert (model["modelFormat"], model["protocolVersion"]) == ({"name": "triton"}, "v2")
    assert (EXAMPLES / "triton" / service["metadata"]["name"] / "config.pbtxt").exists()


def test_requests_of_kserve_are_answered_by_our_server(grey, any_size, spoilt, capsys):
    pytest.importorskip("starlette", reason="the server needs the extra serve")
    pytest.importorskip("uvicorn", reason="the server needs the extra serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from fastflow_jax import serve; serve.run({{'grey': {str(any_size)!r}}}, port={port})"
    server = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/readyz")
        main = runpy.run_path(str(EXAMPLES / "kserve/request.py"))["main"]
        main(f"http://127.0.0.1:{port}", "grey", "16", "16", str(spoilt), str(spoilt))
    finally:
        server.terminate()
        server.wait(20)
    lines = [fields(line) for line in capsys.readouterr().out.splitlines()]
    expected = Exported(any_size).predict(spoilt)
    assert [name for name, _ in lines] == 2 * [str(spoilt)]
    for _, (found, p_value, decision) in lines:
        assert float(found) == pytest.approx(expected.score, rel=1e-4)
        assert float(p_value) == pytest.approx(expected.p_value)
        assert decision == "True"


def wait_until_ready(url, seconds=60):
    for _ in range(10 * seconds):
        try:
            return urllib.request.urlopen(url, timeout=5)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError("the server was not ready in time")
