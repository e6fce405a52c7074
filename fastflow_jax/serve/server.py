"""The server process: socket, models, signals."""

import contextlib
import logging
import os
import pathlib
import re
import signal
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import uvicorn

from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded
from fastflow_jax.serve.app import create_app
from fastflow_jax.serve.false_alarms import FalseAlarms
from fastflow_jax.serve.gate import Limits, Load
from fastflow_jax.serve.metrics import Metrics
from fastflow_jax.serve.models import Engine, Model

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESPONSE_SECONDS = 30  # after the shutdown began, for clients to read their last response
_LOOPBACK = ("127.", "::1")


def serve(
    models: Mapping[str, Any],
    address: tuple[str, int],
    limits: Limits,
    engine: Engine,
    false_alarms: str | os.PathLike | None,
) -> int:
    """Serves detectors until a signal; for arguments and errors see `serve.run`."""
    _check(models, limits, engine)
    metrics, load = Metrics(), Load()
    with _listen(*address) as listening, _loaded(models, engine, metrics) as loaded:
        app = create_app(loaded, limits, load, metrics, _stores(loaded, false_alarms))
        host, port = listening.getsockname()[:2]
        if not host.startswith(_LOOPBACK) and limits.token is None:
            _log.warning("No token is set: anyone who reaches %s can send requests.", host)
        _log.info("Serving %s at http://%s:%s. Ctrl-C stops.", ", ".join(models), host, port)
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=_RESPONSE_SECONDS,
        )
        server = _Server(config, load)
        server.run(sockets=[listening])
        if server.force_exit:
            for model in loaded.values():
                model.close(at_once=True)
    return 0


class _Server(uvicorn.Server):
    """Listens until the accepted requests are answered, and refuses new ones meanwhile.

    Load balancers then find a server that is not ready, instead of refused connections. A second
    SIGINT ends the server at once.
    """

    def __init__(self, config: uvicorn.Config, load: Load):
        super().__init__(config)
        self._load = load

    async def on_tick(self, counter: int) -> bool:
        """Returns whether the server must stop to listen."""
        should_exit = await super().on_tick(counter)
        return should_exit and (self.force_exit or not self._load.accepted)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begins the shutdown."""
        self._load.is_draining = True
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals; unlike uvicorn's, does not raise them again after the shutdown."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _loaded(
    models: Mapping[str, Any], engine: Engine, metrics: Metrics
) -> Iterator[dict[str, Model]]:
    found: dict[str, Model] = {}
    try:
        for name, file in models.items():
            found[name] = Model(name, _existing(expanded(file)), engine, metrics)
        yield found
    finally:
        for model in found.values():
            model.close()


def _stores(
    models: Mapping[str, Model], folder: str | os.PathLike | None
) -> dict[str, FalseAlarms]:
    """Where false alarms of each model are stored; empty without a directory."""
    if folder is None:
        return {}
    stores = {}
    for name, model in models.items():
        run = model.file.absolute() if model.file.is_dir() else model.file.absolute().parent
        is_run = (run / "detector.json").exists()
        stores[name] = FalseAlarms(expanded(folder) / name, run if is_run else None)
    return stores


def _existing(file: pathlib.Path) -> pathlib.Path:
    if not file.exists():
        raise InputError(f"{file} was not found. Pass an exported detector, such as model.onnx.")
    return file


def _listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens.

    Raises:
      InputError: the address is in use, unknown or not allowed.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"port must be 0 to 65535, not {port}.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"Cannot listen on port {port} of {host!r}: {error}. Stop the program that uses it, or "
            "pass another port or host."
        ) from error


def _check(models: Mapping[str, Any], limits: Limits, engine: Engine) -> None:
    if not models:
        raise InputError("There are no models to serve. Pass at least one.")
    for name in models:
        if not _NAME.fullmatch(name):
            raise InputError(
                f"The model name {name!r} is invalid. Use letters, digits, dots, dashes and "
                "underscores."
            )
    if limits.token == "":
        raise InputError("The token is empty. Set one, or unset FASTFLOW_TOKEN.")
    counts = {"max_bytes": limits.max_bytes, "queue": limits.queue, "batch": engine.batch}
    counts |= {
        "workers": engine.workers,
        "threads": 1 if engine.threads is None else engine.threads,
    }
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} must be at least 1, not {count}.")
    if not 0 <= engine.latency_ms <= 60_000:
        raise InputError(f"latency_ms must be from 0 to 60000, not {engine.latency_ms}.")
