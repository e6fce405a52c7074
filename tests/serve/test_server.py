"""The server as a process: many clients, large requests, shutdown, errors at the start."""

import contextlib
import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("uvicorn")
pytest.importorskip("python_multipart")
pytest.importorskip("prometheus_client")

from fastflow_jax import serve
from fastflow_jax.errors import InputError
from fastflow_jax.exported import INPUT, OUTPUTS

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(started_server, file):
    """A server of one model that accepts 64 requests of 1 MB."""
    with started_server(f"{{'tiny': {str(file)!r}}}, port=0, max_bytes=10**6, batch=4") as server:
        yield server


def ask(port, method, path, body=None):
    """Status and content of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def has_accepted(port):
    """Whether a request with an image is being answered."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", "/metrics")
        return b"fastflow_accepted_requests 1.0" in connection.getresponse().read()
    finally:
        connection.close()


def test_64_clients_at_once_get_their_own_results(server, png):
    levels, found = range(64), {}
    together = threading.Barrier(64)

    def score(level):
        together.wait()
        found[level] = [ask(server.port, "POST", "/v1/predict", png(level)) for _ in range(3)]

    threads = [threading.Thread(target=score, args=(level,)) for level in levels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for level in levels:
        assert [status for status, _ in found[level]] == [200] * 3
        assert [each["score"] for _, each in found[level]] == [pytest.approx(level / 255)] * 3


def test_a_request_of_10_gb_is_not_read(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {10**10}\r\n\r\n"
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b""))  # until the server closes
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"1000000 bytes" in answer
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\n")
        connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        sent, chunk = 0, b"10000\r\n" + bytes(0x10000) + b"\r\n"
        with contextlib.suppress(ConnectionError):  # the server has closed the connection
            while sent < 10**9:
                connection.sendall(chunk)
                sent += len(chunk)
        assert sent < 10**8
    assert ask(server.port, "GET", "/readyz")[0] == 200


def test_sigterm_finishes_what_was_accepted(started_server, file, png, workers_of, until):
    with started_server(f"{{'tiny': {str(file)!r}}}, port=0") as server:
        (worker,) = workers_of(server.process.pid)
        os.kill(worker, signal.SIGSTOP)
        found = []
        posting = threading.Thread(
            target=lambda: found.append(ask(server.port, "POST", "/v1/predict", png(255)))
        )
        posting.start()
        until(lambda: has_accepted(server.port))
        server.process.send_signal(signal.SIGTERM)
        os.kill(worker, signal.SIGTERM)  # as a service manager does
        until(lambda: ask(server.port, "GET", "/readyz")[0] == 503)
        time.sleep(0.5)  # it goes on to listen
        status, answer = ask(server.port, "POST", "/v1/predict", png(0))
        assert status == 503
        assert "shutting down" in answer["error"]
        assert ask(server.port, "GET", "/healthz")[0] == 200
        assert not found
        os.kill(worker, signal.SIGCONT)
        posting.join(20)
        assert found[0][0] == 200
        assert found[0][1]["score"] == pytest.approx(1)
        assert server.process.wait(20) == 0
        assert "was lost" not in server.process.stderr.read()
        until(lambda: not os.path.exists(f"/proc/{worker}"))


def test_a_second_ctrl_c_ends_at_once(started_server, file, png, workers_of, until):
    with started_server(f"{{'tiny': {str(file)!r}}}, port=0") as server:
        (worker,) = workers_of(server.process.pid)
        os.kill(worker, signal.SIGSTOP)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("POST", "/v1/predict", png(255))
        until(lambda: has_accepted(server.port))
        server.process.send_signal(signal.SIGINT)
        until(lambda: ask(server.port, "GET", "/readyz")[0] == 503)
        assert server.end(signal.SIGINT) == 0
        connection.close()


def test_an_idle_server_ends_with_its_worker_when_it_is_killed(
    started_server, file, workers_of, until
):
    with started_server(f"{{'tiny': {str(file)!r}}}, port=0") as server:
        (worker,) = workers_of(server.process.pid)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        until(lambda: not os.path.exists(f"/proc/{worker}"))


def test_the_server_loads_without_jax():
    code = "import sys, fastflow_jax.exported, fastflow_jax.serve.server, fastflow_jax.serve.worker"
    code += "; print([name for name in ('jax', 'ml_collections', 'scipy') if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == "[]", process.stderr


def test_the_container_has_the_packages_of_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = extras["optional-dependencies"]["serve"]
    needed += [each for each in extras["dependencies"] if each.startswith(("numpy>", "pillow>"))]
    installed = re.findall(r"'([a-z-]+>=[0-9.]+)'", (ROOT / "Dockerfile").read_text())
    assert sorted(installed) == sorted(needed)


def test_the_model_of_triton_has_the_tensors_of_exported_detectors():
    text = (ROOT / "examples/triton/screws/config.pbtxt").read_text()
    assert re.findall(r'name: "(\w+)"', text) == ["screws", INPUT, *OUTPUTS]


def test_problems_at_the_start_have_one_message(file, tmp_path, monkeypatch):
    models = {"tiny": file}
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"Cannot listen on port {port} .*in use"):
            serve.run(models, port=port)
    for wrong, message in (
        ({"host": "300.0.0.1"}, "Cannot listen"),
        ({"port": 65536}, "port must be 0 to 65535"),
        ({"queue": 0}, "queue must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"latency_ms": -1.0}, "latency_ms must be"),
        ({"token": ""}, "The token is empty"),
    ):
        with pytest.raises(InputError, match=message):
            serve.run(models, **{"port": 0, **wrong})
    with pytest.raises(InputError, match="no models"):
        serve.run({}, port=0)
    with pytest.raises(InputError, match=r"'a/b' is invalid"):
        serve.run({"a/b": file}, port=0)
    with pytest.raises(InputError, match=r"missing\.onnx was not found"):
        serve.run({"tiny": tmp_path / "missing.onnx"}, port=0)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match=r"pip install 'fastflow-jax\[serve\]'"):
        serve.run(models, port=0)
