"""Target: HTTP requests, sent as bytes to a server on the loopback interface."""

import functools
import json
import os
import pathlib
import re
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from random import Random

import uvicorn

from fastflow_jax.serve.app import create_app
from fastflow_jax.serve.gate import Limits, Load
from fastflow_jax.serve.metrics import Metrics
from fastflow_jax.serve.models import Engine, Model
from hostile import mutation
from hostile.detectors import exported
from hostile.image_files import png
from hostile.target import Target

_SECONDS = 10  # within which the server must answer and close the connection
_MAX_BYTES = 2**20
_BOUNDARY = "boundary1"


@functools.cache
def _port() -> int:
    """Starts a server in a thread of this process; it ends with the process."""
    before = os.getcwd()
    folder = tempfile.mkdtemp(prefix="server_", dir=pathlib.Path(before).parent)
    file = pathlib.Path(folder, "tiny.onnx")
    file.write_bytes(exported()[0])
    tempfile.tempdir = folder  # the directory of a case is removed
    try:
        metrics = Metrics()
        models = {"tiny": Model("tiny", file, Engine(threads=1, batch=4), metrics)}
    finally:
        tempfile.tempdir = None
    app = create_app(models, Limits(max_bytes=_MAX_BYTES), Load(), metrics, {})
    # As in `serve.server`.
    config = uvicorn.Config(app, http="h11", ws="none", log_config=None, access_log=False)
    server, listening = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    end = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < end, "the server does not start"
        time.sleep(0.01)
    return listening.getsockname()[1]


def _request(path: str, body: bytes = b"", *headers: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    lines += [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([*lines, "", ""]).encode() + body


def _infer(binary: bool) -> bytes:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 8, 8, 3]}
    values = bytes(range(192))
    content = {"id": "1", "outputs": [{"name": "score"}, {"name": "mask"}]}
    if not binary:
        content["inputs"] = [tensor | {"data": list(values)}]
        return _request("/v2/models/tiny/infer", json.dumps(content).encode())
    content["inputs"] = [tensor | {"parameters": {"binary_data_size": 192}}]
    content["parameters"] = {"binary_data_output": True}
    header = json.dumps(content).encode()
    length = f"Inference-Header-Content-Length: {len(header)}"
    return _request("/v2/models/tiny/infer", header + values, length)


def _seeds() -> list[bytes]:
    image = png()[4]
    part = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="f"; filename="a.png"\r\n\r\n'
    form = part.encode() + image + f"\r\n--{_BOUNDARY}--\r\n".encode()
    kind = f"Content-Type: multipart/form-data; boundary={_BOUNDARY}"
    chunked = _request("/v1/predict", b"", "Transfer-Encoding: chunked")
    chunked += f"{len(image):x}\r\n".encode() + image + b"\r\n0\r\n\r\n"
    paths = ("/v1/models", "/metrics", "/readyz", "/v2", "/v2/models/tiny/versions/1")
    return [
        _request("/v1/predict?model=tiny&map=npy&mask=png", image),
        _request("/v1/predict", form, kind),
        chunked,
        _infer(False),
        _infer(True),
        *(_request(path, method="GET") for path in paths),
    ]


def _change(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    """Changes the head or the body of a request; mostly, the stated length is corrected."""
    head, end, body = data.partition(b"\r\n\r\n")
    start = body[: body.rfind(b"}") + 1]
    match rng.randrange(5):
        case 0:
            return mutation.of_bytes(data, rng, others)
        case 1:
            head = mutation.of_text(head, rng)
        case 2 if start.startswith(b"{"):
            start = mutation.of_json(start, rng)
            body = start + body[body.rfind(b"}") + 1 :]
            length = b"inference-header-content-length: %d" % len(start)
            head = re.sub(rb"(?i)inference-header-content-length: \d+", length, head)
        case _:
            body = mutation.of_bytes(body, rng)
    if rng.random() < 0.8:
        head = re.sub(rb"(?i)\r\ncontent-length: \d+", b"\r\nContent-Length: %d" % len(body), head)
    return head + end + body


def _read(data: bytes) -> None:
    """Sends a request; the server must answer without failing, and close the connection."""
    with socket.create_connection(("127.0.0.1", _port()), timeout=_SECONDS) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except OSError:  # the server has closed the connection
            pass
        answer = b""
        try:
            while part := connection.recv(2**16):
                answer += part
        except ConnectionResetError:  # after a body that was not read
            pass
    if not answer:  # the request was cut short
        return
    status = int(re.match(rb"HTTP/1\.1 (\d\d\d) ", answer)[1])  # type: ignore[index]
    assert status < 500, f"status {status}: {answer[-300:]!r}"
    content = answer.partition(b"\r\n\r\n")[2]
    if status >= 400 and b"application/json" in answer:
        assert [*json.JSONDecoder().raw_decode(content.decode())[0]] == ["error"]


TARGETS = (
    Target(
        "requests",
        _seeds,
        _change,
        _read,
        ("fastflow_jax.serve.app", "fastflow_jax.serve.v2", "fastflow_jax.serve.gate"),
        # The server talks to its worker process by pickles, and to this thread.
        allowed=("socket.connect", "socket.getaddrinfo", "pickle.find_class"),
    ),
)
