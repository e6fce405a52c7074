"""Metrics of the server in the format of Prometheus."""

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Counters, gauges and histograms of one server; those of images have the label `model`."""

    def __init__(self):
        """Creates all metrics with value 0."""
        self._registry = CollectorRegistry()
        common = {"namespace": "fastflow", "registry": self._registry}
        model = {"labelnames": ["model"], **common}
        self.requests = Counter("requests", "Requests by status.", ["endpoint", "status"], **common)
        self.seconds = Histogram(
            "request_seconds", "Seconds per request.", ["endpoint"], buckets=_SECONDS, **common
        )
        self.accepted = Gauge("accepted_requests", "Requests that are being answered.", **common)
        self.batch_size = Histogram("batch_size", "Images per batch.", buckets=_SIZES, **model)
        self.images = Counter("images", "Images scored.", **model)
        self.anomalous = Counter("anomalous_images", "Images above the threshold.", **model)
        self.restarts = Counter("worker_restarts", "Worker processes that were lost.", **model)
        self.reloads = Counter("reloads", "Files loaded again.", ["model", "result"], **common)
        self._waiting = Gauge("queue_length", "Images that wait for a worker.", **model)

    def watch_queue(self, model: str, length: Callable[[], float]) -> None:
        """Reports a function as the queue length of a model."""
        self._waiting.labels(model).set_function(length)

    def text(self) -> bytes:
        """All metrics in the text format."""
        return generate_latest(self._registry)
