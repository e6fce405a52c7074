"""Dynamic batching: requests that arrive at about the same time are computed together."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol


class _Item(NamedTuple):
    payload: Any
    result: Future
    arrived: float  # in seconds, of `time.monotonic`


class Runner(Protocol):
    """Computes batches. Each runner is used by one thread."""

    def run(self, payloads: Sequence[Any]) -> Sequence[Any]:
        """Returns a result for each payload."""
        ...

    def idle(self) -> None:
        """Called about once a second while there is nothing to compute."""
        ...


class Batcher:
    """Threads that take payloads from one queue and compute them in batches.

    A batch has what is waiting, up to its size. If there is room, the thread waits for more until
    the first payload is `latency` seconds old.
    """

    def __init__(
        self,
        runners: Sequence[Runner],
        *,
        size: int,
        latency: float,
        on_batch: Callable[[int], object] = lambda size: None,
    ):
        """Starts a thread for each runner.

        Args:
          runners: each is used by a thread of its own.
          size: largest number of payloads in a batch, at least 1.
          latency: longest time in seconds that a payload waits for others.
          on_batch: called with the size of each batch.
        """
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._size, self._latency = size, latency
        self._on_batch = on_batch
        self._threads = [
            threading.Thread(target=self._work, args=(runner,), name=f"batcher-{i}", daemon=True)
            for i, runner in enumerate(runners)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Number of payloads in the queue."""
        return self._queue.qsize()

    def submit(self, payload: Any) -> Future:
        """Queues a payload; returns its future result."""
        result = Future()
        self._queue.put(_Item(payload, result, time.monotonic()))
        return result

    def close(self) -> None:
        """Waits until everything in the queue is computed, and ends the threads."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, runner: Runner) -> None:
        is_open = True
        while is_open:
            try:
                first = self._queue.get(timeout=1)
            except queue.Empty:
                runner.idle()
                continue
            if first is None:
                return
            batch, is_open = self._gather(first)
            self._on_batch(len(batch))
            try:
                results = runner.run([item.payload for item in batch])
            except Exception as error:
                for item in batch:
                    item.result.set_exception(error)
            else:
                for item, result in zip(batch, results, strict=True):
                    item.result.set_result(result)

    def _gather(self, first: _Item) -> tuple[list[_Item], bool]:
        """Returns the batch that begins with an item, and whether the queue is still open."""
        batch, until = [first], first.arrived + self._latency
        while len(batch) < self._size:
            try:
                item = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if item is None:
                return batch, False
            batch.append(item)
        return batch, True
