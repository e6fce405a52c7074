"""Server for exported detectors: scores of images over HTTP, and a web page.

Images are read and resized in threads of the server, and scored in worker processes, one or more
for each detector. Needs `pip install 'fastflow-jax[serve]'`, and JAX only for detectors that are
not exported.
"""

import importlib
import os
from collections.abc import Mapping

from fastflow_jax.errors import InputError

_NEEDED = ("onnxruntime", "starlette", "uvicorn", "python_multipart", "prometheus_client")


def run(
    models: Mapping[str, str | os.PathLike],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    max_bytes: int = 32 * 2**20,
    queue: int = 64,
    batch: int = 1,
    latency_ms: float = 5.0,
    threads: int | None = 1,
    workers: int = 1,
    false_alarms: str | os.PathLike | None = None,
) -> int:
    """Serves detectors until SIGTERM or SIGINT, and then answers the requests it has accepted.

    Args:
      models: files by name: exported detectors (`.onnx`), or directories for `Detector.load`.
      host: address to listen on. Anyone who reaches it can send requests; by default only
        processes of this machine.
      port: 0 for any free one.
      token: that requests must send as `Authorization: Bearer TOKEN`, except those for health. By
        default the environment variable FASTFLOW_TOKEN; no check if it is not set.
      max_bytes: largest body of a request. Larger ones are refused with status 413.
      queue: number of requests with images that are answered at the same time. Further ones are
        refused with status 503.
      batch: largest number of images that are scored together.
      latency_ms: longest time in ms that an image waits for others of its batch.
      threads: CPU threads of each worker process; None for one per core.
      workers: worker processes of each detector.
      false_alarms: directory for images that users mark as false alarms, in a sub-directory for
        each model; None to store none.

    Returns:
      Exit status 0.

    Raises:
      InputError: a package is missing, a detector cannot be loaded, the port is in use, or an
        argument is invalid.
    """
    for package in _NEEDED:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(
                f"Serving needs {package}. Run pip install 'fastflow-jax[serve]'."
            ) from error
    from fastflow_jax.serve import server
    from fastflow_jax.serve.gate import Limits
    from fastflow_jax.serve.models import Engine

    token = os.environ.get("FASTFLOW_TOKEN") if token is None else token
    return server.serve(
        models,
        (host, port),
        Limits(max_bytes, queue, token),
        Engine(workers, threads, batch, latency_ms),
        false_alarms,
    )
