"""Nothing is fetched: imports, training and prediction work without sockets."""

import pathlib
import subprocess
import sys

import pytest

GOLDENS = pathlib.Path(__file__).parent / "goldens"
BLOCK = """
import sys

def refuse(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        raise PermissionError(f"{event} {arguments}")

sys.addaudithook(refuse)
"""
SCORE = """
import pkgutil
import numpy as np
import fastflow_jax
from fastflow_jax import Detector
from fastflow_jax.config import default

modules = [module.name for module in pkgutil.walk_packages(fastflow_jax.__path__, "fastflow_jax.")]
for name in modules:
    try:
        name.endswith("__main__") or __import__(name)
    except ModuleNotFoundError as error:  # of an extra
        assert not error.name.startswith("fastflow_jax"), error
images = np.random.default_rng(0).integers(0, 256, (12, 20, 30, 3), np.uint8)
print(len(Detector.load(sys.argv[1]).predict(list(images))))
config = default()
config.detector, config.backbone, config.image_size = "gaussian", "pixels", (16,)
print(len(Detector.fit(images, config=config).predict(list(images))))
"""


def run(code):
    command = [sys.executable, "-c", BLOCK + code, str(GOLDENS / "durable/fastflow")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_imports_training_and_prediction_use_no_network():
    done = run(SCORE)
    assert done.stdout.split() == ["12", "12"], done.stderr


@pytest.mark.parametrize("call", ["connect(('127.0.0.1', 9))", "bind(('127.0.0.1', 0))"])
def test_a_connection_would_be_noticed(call):
    done = run(f"import socket\nsocket.socket().{call}")
    assert "PermissionError: socket." in done.stderr
