"""Served detectors: worker processes, batches, and reloading when a file changes."""

import contextlib
import dataclasses
import itertools
import logging
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastflow_jax.data.arrays import Given
from fastflow_jax.data.inputs import Outputs, cut, stacked
from fastflow_jax.data.pipeline import n_threads
from fastflow_jax.errors import InputError
from fastflow_jax.files import sha256_of_detector
from fastflow_jax.prediction import Prediction, Predictor
from fastflow_jax.serve.batching import Batcher
from fastflow_jax.serve.metrics import Metrics
from fastflow_jax.serve.worker import Input, Worker

_log = logging.getLogger(__name__)

MAX_IMAGES = 64  # in a request


@dataclasses.dataclass(frozen=True)
class Engine:
    """How detectors are computed."""

    workers: int = 1  # processes of each detector
    threads: int | None = 1  # CPU threads of each process; None for one per core
    batch: int = 1  # largest number of images that are scored together
    latency_ms: float = 5.0  # longest time that an image waits for others


class Loaded(Predictor):
    """One version of a detector, with its worker processes."""

    def __init__(self, name: str, file: pathlib.Path, engine: Engine, metrics: Metrics):
        """Starts the worker processes.

        Args:
          name: label in metrics.
          file: an exported detector, or a directory for `Detector.load`.
          engine: how it is computed.
          metrics: counters to update.

        Raises:
          InputError: the detector cannot be loaded.
        """
        self.name, self._metrics = name, metrics
        self._copy = None if file.is_dir() else tempfile.TemporaryDirectory(prefix="fastflow_jax_")
        self._workers: list[Worker] = []
        restarts = metrics.restarts.labels(name)
        # Workers that are restarted read the copy, because the file may have changed.
        own = _copied(file, self._copy)
        self.version = sha256_of_detector(own)[:12]
        try:
            for _ in range(engine.workers):
                self._workers.append(
                    Worker(own, engine.threads, engine.batch, on_restart=restarts.inc)
                )
        except InputError as error:
            self._end()
            raise InputError(str(error).replace(str(own), str(file))) from error
        description = self._workers[0].description
        self.image_size, self.resize = description.image_size, description.resize
        self.tiling, self.places = description.tiling, description.places
        self.levels, self.roi = description.levels, description.roi
        self.decision, self.metadata = description.decision, description.metadata
        self._colour_range = description.colour_range
        self.training_images, self.batch_size = None, engine.batch
        self._batcher = Batcher(
            self._workers,
            size=engine.batch,
            latency=engine.latency_ms / 1000,
            on_batch=metrics.batch_size.labels(name).observe,
        )
        # Decoded images are large: one at a time and core.
        self._decoding = threading.BoundedSemaphore(n_threads())

    @property
    def is_ready(self) -> bool:
        """Whether a worker process runs."""
        return any(worker.is_alive for worker in self._workers)

    @property
    def waiting(self) -> int:
        """Number of images in the queue."""
        return self._batcher.waiting

    @property
    def threshold(self) -> float | None:
        """Threshold of image scores; None if the detector has none."""
        threshold = self.decision.image_threshold
        return None if threshold is None else threshold.value

    @property
    def colour_range(self) -> tuple[float, float] | None:
        """See `Predictor.colour_range`."""
        return self._colour_range

    def format_of(self, content: bytes) -> str | None:
        """Decodes an image file, as `score` does, and returns the name of its format in Pillow.

        Raises:
          InputError: it is not an image, or has several pages.
        """
        with self._decoding:
            _, _, header = next(Given("image", content=content).read(self.levels))
        if header.pages > 1:
            raise _too_many(1)
        return header.format

    def run(self, images: np.ndarray, valid: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Scores model inputs, see `Predictor.run`. They share batches with other requests.

        Raises:
          WorkerLost: no worker process could score a batch.
        """
        masks = [None] * len(images) if valid is None else valid
        waiting = [self._batcher.submit(Input(*pair)) for pair in zip(images, masks, strict=True)]
        rows = [future.result() for future in waiting]
        found = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if not np.isfinite(found["score"]).all():
            raise RuntimeError(f"{self.name} scores {found['score']}. Its file is damaged.")
        self._metrics.images.labels(self.name).inc(len(rows))
        decided = self.decision(found["score"], found["anomaly_map"])
        if "is_anomalous" in decided:
            self._metrics.anomalous.labels(self.name).inc(int(decided["is_anomalous"].sum()))
        return found

    def score(self, files: Sequence[tuple[str, bytes]], limit: int) -> Iterator[Prediction]:
        """Yields the prediction of each image, or page, of files.

        Args:
          files: names and contents.
          limit: largest number of images.

        Raises:
          InputError: a file is not an image, or there are too many images.
        """
        inputs = []
        for name, content in files:
            with self._decoding:
                for page, image, _ in Given(name, content=content).read(self.levels):
                    if len(inputs) == limit:
                        raise _too_many(limit)
                    region = None
                    if self.roi is not None:  # the workers know it as well
                        region = self.roi(page, (image.shape[0], image.shape[1]))
                    how = self.image_size, self.resize, self.tiling, self.places
                    cut_image = dataclasses.replace(cut(image, page, *how), region=region)
                    inputs.append((Outputs(cut_image), cut_image.parts))
        waiting = ((outputs, part) for outputs, parts in inputs for part in parts)
        # Tiles of large images are cut as they are scored.
        while batch := list(itertools.islice(waiting, MAX_IMAGES)):
            found = self.run(*stacked([part for _, part in batch]))
            for i, (outputs, part) in enumerate(batch):
                with self._decoding:
                    outputs.add(part, found["score"][i], found["anomaly_map"][i])
                    if not outputs.is_complete:
                        continue
                    prediction = self.prediction(outputs)
                yield prediction

    def close(self, *, at_once: bool = False) -> None:
        """Ends the worker processes, after what is queued is scored unless `at_once` is set."""
        if at_once:
            for worker in self._workers:
                worker.kill()
        self._batcher.close()
        self._end()

    def _end(self) -> None:
        for worker in self._workers:
            worker.close()
        if self._copy is not None:
            self._copy.cleanup()


class Model:
    """A detector by name: its current version, which is replaced when the file changes."""

    def __init__(self, name: str, file: pathlib.Path, engine: Engine, metrics: Metrics):
        """Loads the detector.

        Args:
          name: name in requests.
          file: an exported detector, or a directory for `Detector.load`.
          engine: how it is computed.
          metrics: counters to update.

        Raises:
          InputError: the detector cannot be loaded.
        """
        self.name, self.file = name, file
        self._engine, self._metrics = engine, metrics
        self._seen = self._tried = _signature(file)
        self._lock = threading.Lock()  # of the fields below
        self._current = Loaded(name, file, engine, metrics)
        self._users = {self._current: 0}  # of the current version, and of earlier ones in use
        metrics.watch_queue(name, lambda: self.current.waiting)

    @property
    def current(self) -> Loaded:
        """The current version, to describe it; to score images see `use`."""
        return self._current

    @contextlib.contextmanager
    def use(self) -> Iterator[Loaded]:
        """Yields the current version, which stays open until the context ends."""
        with self._lock:
            loaded = self._current
            self._users[loaded] += 1
        try:
            yield loaded
        finally:
            with self._lock:
                self._users[loaded] -= 1
            self._close_unused()

    def reload_if_changed(self) -> None:
        """Loads the file again if it has changed and is no longer being written.

        It must look the same in two calls. If it cannot be loaded, the earlier version stays.
        """
        before, self._seen = self._seen, _signature(self.file)
        if self._seen is None or self._seen != before or self._seen == self._tried:
            return
        self._tried = self._seen
        try:
            loaded = Loaded(self.name, self.file, self._engine, self._metrics)
        except InputError as error:
            _log.error("%s has changed, but %s The earlier version is used.", self.file, error)
            self._metrics.reloads.labels(self.name, "failed").inc()
            return
        with self._lock:
            self._current = loaded
            self._users[loaded] = 0
        self._metrics.reloads.labels(self.name, "loaded").inc()
        _log.info("%s is now version %s of %s.", self.name, loaded.version, self.file)
        self._close_unused()

    def close(self, *, at_once: bool = False) -> None:
        """Ends the worker processes, see `Loaded.close`."""
        for loaded in self._users:
            loaded.close(at_once=at_once)

    def _close_unused(self) -> None:
        with self._lock:
            unused = [
                loaded for loaded, n in self._users.items() if not n and loaded is not self._current
            ]
            for loaded in unused:
                del self._users[loaded]
        for loaded in unused:
            loaded.close()


def _too_many(limit: int) -> InputError:
    return InputError(
        f"The request has more images or pages than {limit}. Send at most {MAX_IMAGES}, in a form."
    )


def watch(models: Mapping[str, Model], seconds: float, stop: threading.Event) -> None:
    """Reloads changed files until `stop` is set."""
    while not stop.wait(seconds):
        for model in models.values():
            model.reload_if_changed()


def _copied(file: pathlib.Path, folder: Any) -> pathlib.Path:
    if folder is None:
        return file
    try:
        return pathlib.Path(shutil.copy(file, folder.name))
    except OSError as error:
        raise InputError(
            f"{file} cannot be served: {error.strerror}. Pass an exported detector."
        ) from error


def _main_file(file: pathlib.Path) -> pathlib.Path:
    return file / "detector.json" if file.is_dir() else file


def _signature(file: pathlib.Path) -> tuple[int, ...] | None:
    """Changes when the file changes; None if there is no file."""
    try:
        status = _main_file(file).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
