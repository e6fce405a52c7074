"""Worker processes: each holds one detector and scores the batches that it is sent.

A detector runs in a process of its own, so that neither a crash of its engine nor the kill of a
process that needs too much memory loses a request: the batch is sent to a new process.
"""

import dataclasses
import logging
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from fastflow_jax.data.levels import Levels
from fastflow_jax.data.roi import CommonRegion
from fastflow_jax.data.tiling import Places, Tiling
from fastflow_jax.decision import Decision
from fastflow_jax.errors import InputError
from fastflow_jax.prediction import Predictor

_log = logging.getLogger(__name__)

_ATTEMPTS = 3  # processes that a batch is sent to before its requests are refused
_ANSWER_SECONDS = 300  # a process that needs longer to load or to score a batch is ended
_EXIT_SECONDS = 5


class Input(NamedTuple):
    """Model input of an image."""

    image: np.ndarray  # uint8 [H, W, 3]
    valid: np.ndarray | None  # bool [H, W], False in padded pixels, or None without padding


class WorkerLost(RuntimeError):
    """No worker process could score a batch."""


@dataclasses.dataclass(frozen=True, eq=False)
class Description:
    """Properties of a detector that the server needs; its workers hold the detector."""

    image_size: tuple[int, int]  # (height, width) of model inputs
    resize: str  # how images become inputs
    levels: Levels | None  # see `Predictor.levels`
    tiling: Tiling | None  # how they are cut
    places: Places | None  # see `Predictor`
    decision: Decision
    metadata: Mapping[str, Any]
    roi: CommonRegion | None = None  # region of interest of all images
    colour_range: tuple[float, float] | None = None  # see `Predictor.colour_range`


class Worker:
    """A worker process, which is replaced when it ends. For use by one thread."""

    def __init__(
        self,
        file: pathlib.Path,
        threads: int | None,
        batch: int,
        *,
        on_restart: Callable[[], object],
    ):
        """Starts the process and waits until the detector is loaded.

        Args:
          file: an exported detector, or a directory for `Detector.load`.
          threads: CPU threads of the engine; None for one per core.
          batch: largest number of images in a batch.
          on_restart: called when a process has ended without being asked to.

        Raises:
          InputError: the detector cannot be loaded.
        """
        self._file, self._threads, self._batch = file, threads, batch
        self._on_restart = on_restart
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._closed = False
        self.description = self._start()

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        process = self._process
        return process is not None and process.poll() is None

    def idle(self) -> None:
        """Starts a new process if the last one has ended."""
        if not self.is_alive and not self._closed:
            self._replace("ended")

    def run(self, payloads: Sequence[Input]) -> list[dict[str, np.ndarray]]:
        """Scores a batch; in a new process if the first one ends.

        Returns:
          For each input its "score" [] and "anomaly_map" [H, W], float32.

        Raises:
          WorkerLost: several processes ended with this batch.
          RuntimeError: the engine reports an error.
        """
        for _ in range(_ATTEMPTS):
            try:
                found = self._ask(_stacked(payloads))
            except (EOFError, OSError) as error:
                self._replace(str(error) or "ended")
                continue
            if isinstance(found, str):
                raise RuntimeError(found)
            return [{name: array[i] for name, array in found.items()} for i in range(len(payloads))]
        raise WorkerLost(f"{_ATTEMPTS} worker processes ended while they scored this image.")

    def kill(self) -> None:
        """Ends the process at once. Other threads may call it during `run`, which then fails."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Ends the process."""
        self._closed = True
        self._end()

    def _ask(self, request: Any) -> Any:
        if self._connection is None:
            raise EOFError("no process")
        if request is not None:
            self._connection.send(request)
        if not self._connection.poll(_ANSWER_SECONDS):
            raise TimeoutError(f"no answer in {_ANSWER_SECONDS} s")
        return self._connection.recv()

    def _replace(self, reason: str) -> None:
        """Starts a new process. A failure is logged, and noticed by the next `run`."""
        if self._closed:
            return
        _log.warning("A worker process of %s was lost (%s). Restarting.", self._file.name, reason)
        self._on_restart()
        try:
            self._start()
        except InputError as error:
            _log.error("A worker process did not start. %s", error)

    def _start(self) -> Description:
        self._end()
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            settings = theirs.fileno(), str(self._file), self._threads, self._batch
            code = f"from fastflow_jax.serve import worker; worker.serve(*{settings!r})"
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                pass_fds=(theirs.fileno(),),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                stdin=subprocess.DEVNULL,
            )
        try:
            description = self._ask(None)
        except (EOFError, OSError) as error:
            self._end()
            raise InputError(
                f"{self._file} cannot be loaded: its process has ended. Is there enough memory?"
            ) from error
        if isinstance(description, str):
            self._end()
            raise InputError(description)
        return description

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()  # the process ends when it notices
            self._connection = None
        if self._process is not None:
            try:
                self._process.wait(_EXIT_SECONDS if self._closed else 0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


def _stacked(inputs: Sequence[Input]) -> tuple[np.ndarray, np.ndarray | None]:
    """Images [B, H, W, 3], and padding masks [B, H, W] if one of the images has one."""
    images, masks = zip(*inputs, strict=True)
    if all(valid is None for valid in masks):
        return np.stack(images), None
    everywhere = np.ones(images[0].shape[:2], bool)
    return np.stack(images), np.stack([everywhere if valid is None else valid for valid in masks])


def serve(descriptor: int, file: str, threads: int | None, batch: int) -> None:
    """Runs a worker process: loads a detector, then scores batches until the server ends.

    Args:
      descriptor: of the connection to the server, on which it sends the `Description`, or the
        message of an error, and then an answer to each batch.
      file: see `Worker`.
      threads: see `Worker`.
      batch: see `Worker`.
    """
    # Signals to the whole process group are for the server, which first answers its requests.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with Connection(descriptor) as connection:
        try:
            predictor, metadata = _load(pathlib.Path(file), threads)
            for size in {1, batch}:  # compiles, or allocates memory
                predictor.run(*_blank(predictor, size))
        except InputError as error:
            connection.send(str(error))
            return
        except Exception as error:  # of the engine
            connection.send(f"{file} cannot be loaded: {error}. Export or train it again.")
            return
        how = predictor.image_size, predictor.resize, predictor.levels
        how += predictor.tiling, predictor.places
        how += predictor.decision, metadata, predictor.roi, predictor.colour_range
        connection.send(Description(*how))
        while True:
            try:
                request = connection.recv()
            except (EOFError, OSError):
                return
            connection.send(_answer(predictor, *request))


def _load(file: pathlib.Path, threads: int | None) -> tuple[Predictor, Mapping[str, Any]]:
    if file.is_dir():
        from fastflow_jax.detector import Detector

        return Detector.load(file), {}
    from fastflow_jax.exported import Exported

    exported = Exported(file, threads=threads)
    return exported, exported.metadata


def _blank(predictor: Predictor, n: int) -> tuple[np.ndarray, np.ndarray | None]:
    shape = (n, *predictor.image_size)
    valid = np.ones(shape, bool) if predictor.resize == "pad" else None
    return np.zeros((*shape, 3), np.uint8), valid


def _answer(
    predictor: Predictor, images: np.ndarray, valid: np.ndarray | None
) -> dict[str, np.ndarray] | str:
    try:
        found = predictor.run(images, valid)
    except Exception as error:  # of the engine; the process goes on
        return f"{type(error).__name__}: {error}"
    return {name: np.asarray(found[name]) for name in ("score", "anomaly_map")}
