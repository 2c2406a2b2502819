"""Prometheus metrics, under TF Serving's names where it has them.

Those keep TF Serving's form, too: microseconds, and counters without `_total`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import prometheus_client
from prometheus_client.core import GaugeMetricFamily, Metric

from serving.server.errors import RequestError
from serving.server.versions import Version

_log = logging.getLogger(__name__)

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

# TF Serving's: a scale of 10, a growth of 1.8, up to some 20 minutes.
_LATENCY_BUCKETS = tuple(10 * 1.8**exponent for exponent in range(33))
_SIZE_BUCKETS = tuple(2**exponent for exponent in range(11))

# Between two lines in the log about HTTP requests that were refused for the same reason.
_REFUSAL_LOG_SECONDS = 60.0

States = Callable[[], Iterable[tuple[str, Version]]]


class Metrics:
    """What is counted and measured, on a registry of its own."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, str], int] = {}
        self._load_failures: dict[str, int] = {}
        self._refusals: dict[str, int] = {}
        self._logged: dict[str, tuple[float, int]] = {}  # Reason: when, and how many there were
        self._states: States = lambda: ()
        self._waiting_rows: Callable[[], int] = lambda: 0
        self._in_progress: Callable[[], int] = lambda: 0
        self._fallbacks: Callable[[], Sequence[str]] = tuple
        self._latency = prometheus_client.Histogram(
            ":tensorflow:serving:request_latency",
            "Wall time of requests, in microseconds.",
            ("model_name", "API", "entrypoint"),
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._runtime = prometheus_client.Histogram(
            ":tensorflow:serving:runtime_latency",
            "Wall time of runs of the model, in microseconds; with batching, waiting included.",
            ("model_name", "API", "runtime"),
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._queuing = prometheus_client.Histogram(
            ":tensorflow:serving:batching_session:queuing_latency",
            "Wall time that requests waited for their batch, in microseconds.",
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._batch_size = prometheus_client.Histogram(
            ":tensorflow:serving:batching:processed_batch_size",
            "Rows in a batch, before padding.",
            buckets=_SIZE_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(self)

    def watch(
        self,
        states: States,
        waiting_rows: Callable[[], int],
        in_progress: Callable[[], int],
        fallbacks: Callable[[], Sequence[str]],
    ) -> None:
        """Says where to read, whenever Prometheus asks, what is not counted here.

        Args:
          states: Every model's name with each of its versions.
          waiting_rows: Rows in batching queues.
          in_progress: Predictions that are being worked on.
          fallbacks: Models of which an older version is served than the newest.
        """
        self._states = states
        self._waiting_rows = waiting_rows
        self._in_progress = in_progress
        self._fallbacks = fallbacks

    def page(self) -> bytes:
        """The page that Prometheus reads."""
        return prometheus_client.generate_latest(self.registry)

    @contextlib.contextmanager
    def count(self, model: str, entrypoint: str) -> Iterator[None]:
        """Counts the block as a request to predict by its outcome, and measures it if it is OK.

        Args:
          model: Empty if there is no such model: a name that a client thinks up is no label.
          entrypoint: "GRPC" or "REST".
        """
        begin = time.perf_counter()
        status = "INTERNAL"
        try:
            yield
            status = "OK"
        except RequestError as error:
            status = error.code.name
            raise
        finally:
            with self._lock:
                self._requests[model, status] = self._requests.get((model, status), 0) + 1
        seconds = time.perf_counter() - begin
        self._latency.labels(model, "Predict", entrypoint).observe(seconds * 1e6)

    def count_load_failure(self, model: str) -> None:
        """Counts an attempt to load a version that failed."""
        with self._lock:
            self._load_failures[model] = self._load_failures.get(model, 0) + 1

    def count_refusal(self, reason: str, message: str) -> None:
        """Counts what HTTP refused before there was a request to predict; now and then logs it."""
        now = time.monotonic()
        with self._lock:
            count = self._refusals[reason] = self._refusals.get(reason, 0) + 1
            since, logged = self._logged.get(reason, (now - _REFUSAL_LOG_SECONDS, 0))
            if now - since < _REFUSAL_LOG_SECONDS:
                return
            self._logged[reason] = (now, count)
        _log.warning(
            "HTTP, %s: %s (%d times since the last such line)", reason, message, count - logged
        )

    @contextlib.contextmanager
    def time_run(self, model: str) -> Iterator[None]:
        """Measures the block as a run of a model."""
        begin = time.perf_counter()
        yield
        self._runtime.labels(model, "Predict", "TF1").observe((time.perf_counter() - begin) * 1e6)

    def observe_batch(self, waited: Sequence[float], rows: int) -> None:
        """Measures a batch: how long its requests waited, in seconds, and its rows."""
        for seconds in waited:
            self._queuing.observe(seconds * 1e6)
        self._batch_size.observe(rows)

    def collect(self) -> Iterator[Metric]:
        """What is not a Histogram, for the registry."""
        requests = Metric(
            ":tensorflow:serving:request_count", "The total number of requests.", "unknown"
        )
        failures = Metric(
            ":tensorflow:serving:embedded:load_failure_count", "Failed loads.", "unknown"
        )
        refusals = Metric(
            ":tensorflow:serving:embedded:http_refusal_count",
            "Connections and requests refused before there was a request to predict.",
            "unknown",
        )
        with self._lock:
            for reason, count in self._refusals.items():
                refusals.add_sample(refusals.name, {"reason": reason}, count)
            for (model, status), count in self._requests.items():
                labels = {"model_name": model, "status": status}
                requests.add_sample(requests.name, labels, count)
            for model, count in self._load_failures.items():
                failures.add_sample(failures.name, {"model_name": model}, count)
        yield requests
        yield failures
        yield refusals
        versions = GaugeMetricFamily(
            ":tensorflow:serving:embedded:model_version_state",
            "State of a version: 10 start, 20 loading, 30 available, 40 unloading, 50 end.",
            labels=("model_name", "version"),
        )
        for model, version in self._states():
            versions.add_metric((model, str(version.number)), int(version.state))
        yield versions
        fallbacks = GaugeMetricFamily(
            ":tensorflow:serving:embedded:fallback",
            "1 where an older version is served, because a newer one cannot be loaded.",
            labels=("model_name",),
        )
        for model in self._fallbacks():
            fallbacks.add_metric((model,), 1)
        yield fallbacks
        yield GaugeMetricFamily(
            ":tensorflow:serving:embedded:waiting_rows",
            "Rows in batching queues.",
            self._waiting_rows(),
        )
        yield GaugeMetricFamily(
            ":tensorflow:serving:embedded:requests_in_progress",
            "Predictions that are being worked on.",
            self._in_progress(),
        )
