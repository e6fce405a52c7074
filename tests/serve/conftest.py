"""Fixtures of the server: an application and a server process."""

import contextlib
import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def file(export, tmp_path_factory):
    """An exported detector."""
    return export(tmp_path_factory.mktemp("exported") / "tiny.onnx")


@pytest.fixture(scope="session")
def png():
    """Encodes an image of one grey level."""

    def encode(level, size=(12, 10)):
        content = io.BytesIO()
        Image.new("L", size, level).save(content, "PNG")
        return content.getvalue()

    return encode


@pytest.fixture(scope="session")
def client_of():
    """A context with a client of an application that serves files by name."""
    testclient = pytest.importorskip("starlette.testclient")
    pytest.importorskip("prometheus_client")
    from fastflow_jax.serve.app import create_app
    from fastflow_jax.serve.gate import Limits, Load
    from fastflow_jax.serve.metrics import Metrics
    from fastflow_jax.serve.models import Engine, Model

    @contextlib.contextmanager
    def context(files, limits=None, engine=None, load=None, false_alarms=None):
        metrics, models = Metrics(), {}
        engine = Engine(threads=1) if engine is None else engine
        try:
            for name, file in files.items():
                models[name] = Model(name, file, engine, metrics)
            load = Load() if load is None else load
            limits = Limits() if limits is None else limits
            stores = {} if false_alarms is None else false_alarms
            app = create_app(models, limits, load, metrics, stores)
            with testclient.TestClient(app) as client:
                yield client
        finally:
            for model in models.values():
                model.close()

    return context


@pytest.fixture(scope="session")
def client(client_of, file):
    """A client of an application with one model, `tiny`, in batches of up to four."""
    from fastflow_jax.serve.models import Engine

    with client_of({"tiny": file}, engine=Engine(threads=1, batch=4)) as client:
        yield client


@pytest.fixture(scope="session")
def sample():
    """Reads the value of a metric, by its name with labels."""

    def read(client, name):
        text = client.get("/metrics").text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)
        return None if found is None else float(found[1])

    return read


@pytest.fixture(scope="session")
def until():
    """Waits until a condition holds; fails after some seconds."""

    def wait(condition, seconds=20):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    return wait


@pytest.fixture(scope="session")
def workers_of():
    """Returns the ids of the child processes of a process."""
    if not pathlib.Path("/proc/self/stat").exists():
        pytest.skip("processes are found in /proc")

    def find(parent):
        found = []
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(") ")[2].split()
                if int(fields[1]) == parent and fields[0] != "Z":
                    found.append(int(folder.name))
        return found

    return find


class Server:
    """A server process, with its address."""

    def __init__(self, arguments):
        code = f"import sys; from fastflow_jax import serve; sys.exit(serve.run({arguments}))"
        log = "import logging; logging.basicConfig(level=logging.INFO); "
        self.process = subprocess.Popen(
            [sys.executable, "-c", log + code], stderr=subprocess.PIPE, text=True
        )
        self.port = None
        for line in self.process.stderr:
            if found := re.search(r"Serving .* at http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])
                break

    def end(self, number=signal.SIGTERM):
        """Sends a signal and returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture(scope="session")
def started_server():
    """A context with a server process, given the arguments of `serve.run` as text."""
    for package in ("onnx", "onnxruntime", "uvicorn", "starlette", "prometheus_client"):
        pytest.importorskip(package)

    @contextlib.contextmanager
    def context(arguments):
        server = Server(arguments)
        try:
            assert server.port is not None, server.process.stderr.read()
            yield server
        finally:
            with contextlib.suppress(OSError):
                os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
            server.process.stderr.close()

    return context
