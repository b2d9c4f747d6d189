"""What a server counts, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.process_collector import ProcessCollector

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(
        self, inside: Callable[[], int], ready: Callable[[], int], streams: Callable[[], int]
    ) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"actzip_{name}", what, labels, registry=registry)

        def gauge(name: str, what: str, value: Callable[[], int]) -> None:
            Gauge(f"actzip_{name}", what, registry=registry).set_function(value)

        asked = "Predictions asked for, by status; 499: the client went."
        took = "Of accepted requests, from first byte to answer."
        self.requests = counter("requests", asked, "status")
        self.seconds = Histogram("actzip_request_seconds", took, buckets=_SECONDS, registry=registry)
        self.received = counter("received_bytes", "Of bodies.")
        self.sent = counter("sent_bytes", "Of answers.")
        self.restarts = counter("worker_restarts", "Workers that died.")
        gauge("requests_inside", "Waiting or running now.", inside)
        gauge("workers_ready", "Workers that can run a request.", ready)
        gauge("streams", "Streams whose last frame is remembered.", streams)

    def text(self) -> bytes:
        """All of them."""
        return bytes(generate_latest(self._registry))
