"""Puts the parts of a server together, and takes them apart in order."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from serving.server.admission import Admission
from serving.server.batching import Batcher
from serving.server.config import Batching, ConfigError, Files, Model, read_models
from serving.server.grpc_server import GrpcServer
from serving.server.manager import Manager
from serving.server.metrics import Metrics
from serving.server.predictor import Call, Limits, Predictor, run
from serving.server.rest import RestServer, RestSettings
from serving.server.servable import Arrays, LoadError, Servable
from serving.server.versions import Version

_log = logging.getLogger(__name__)

_M_ARENA_MAX = -8  # malloc.h
_ARENAS = 4


class Server:
    """A server whose ports are taken.

    It answers from `start` on, and is healthy when its models are loaded.
    """

    def __init__(self, options: argparse.Namespace, files: Files):
        """Takes the ports.

        Args:
          options: See `options.parse`.
          files: That they name.

        Raises:
          OSError: A port cannot be listened on.
        """
        self._options = options
        self._batching = files.batching
        _bound_arenas()
        tf.get_logger().setLevel("ERROR")
        self._metrics = Metrics()
        self._manager = self._make_manager(files.models)
        run_call: Callable[[Call], Arrays] = run
        waiting_rows: Callable[[], int] = int
        if files.batching is not None:
            run_call = batcher = Batcher(files.batching, self._metrics.observe_batch)
            waiting_rows = batcher.count_waiting
        limits = Limits(options.max_message_bytes, options.max_image_pixels)
        self._predictor = Predictor(self._manager, limits, self._metrics, run_call)
        admission = Admission(min(options.max_concurrent_requests, options.grpc_max_threads))
        self._metrics.watch(
            self._manager.states,
            waiting_rows,
            lambda: admission.in_progress,
            self._manager.fallbacks,
        )
        self._grpc = GrpcServer(
            self._predictor,
            admission,
            self._metrics,
            threads=options.grpc_max_threads,
            max_message_bytes=options.max_message_bytes,
            arguments=_channel_arguments(options.grpc_channel_arguments),
        )
        for address in self._addresses():
            self._grpc.bind(address, files.ssl)
        self._rest = self._make_rest(admission, files.prometheus_path)
        self._stopped = threading.Event()

    def _make_manager(self, models: list[Model]) -> Manager:
        options = self._options
        return Manager(
            models,
            self._load,
            poll_seconds=options.file_system_poll_wait_seconds,
            max_retries=options.max_num_load_retries,
            retry_seconds=max(options.load_retry_interval_micros, 0) / 1e6,
            labels_for_unavailable=options.allow_version_labels_for_unavailable_models,
            on_change=lambda: self._grpc.show_health(self._manager.is_ready),
            on_failure=self._metrics.count_load_failure,
            falls_back=not options.no_fallback,
        )

    def _make_rest(self, admission: Admission, prometheus_path: str | None) -> RestServer | None:
        options = self._options
        if not options.rest_api_port:
            return None
        settings = RestSettings(
            threads=options.rest_api_num_threads,
            timeout=options.rest_api_timeout_in_ms / 1e3,
            max_body_bytes=options.max_message_bytes,
            max_connections=options.rest_api_max_connections,
            prometheus_path=prometheus_path,
            allow_cors=options.rest_api_enable_cors_support,
        )
        address = (options.host, options.rest_api_port)
        return RestServer(self._predictor, admission, self._metrics, settings, address)

    def _addresses(self) -> list[str]:
        host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host
        addresses = [f"{host}:{self._options.port}"]
        if self._options.grpc_socket_path:
            addresses.append(f"unix:{self._options.grpc_socket_path}")
        return addresses

    def _load(self, name: str, version: Version) -> Servable:
        """Makes a servable of a folder, warmed up."""
        options = self._options
        tags = options.saved_model_tags.split(",")
        session_config = _session_config(options, self._batching)
        servable = Servable(name, version.number, version.path, tags, session_config)
        if options.enable_model_warmup:
            iterations = max(options.num_request_iterations_for_warmup, 1)
            try:
                count = servable.warm_up(version.path, self._predictor.predict_on, iterations)
            except LoadError:
                servable.close()
                raise
            _log.info("model %s version %d: %d warm-up requests", name, version.number, count)
        return servable

    def start(self) -> None:
        """Begins to answer and to load."""
        self._grpc.start()
        for address in self._addresses():
            _log.info("gRPC on %s", address)
        if self._rest is not None:
            self._rest.start()
            _log.info("HTTP on %s:%d", self._options.host, self._options.rest_api_port)
        self._manager.start()
        if self._options.model_config_file and self._options.model_config_file_poll_wait_seconds:
            threading.Thread(target=self._watch_config, name="config", daemon=True).start()

    def _watch_config(self) -> None:
        file: Path = self._options.model_config_file
        complaint = ""
        while not self._stopped.wait(self._options.model_config_file_poll_wait_seconds):
            try:
                self._manager.configure(read_models(file))
                complaint = ""
            except ConfigError as error:
                if str(error) != complaint:
                    _log.error("%s What was configured before stays.", error)
                complaint = str(error)

    def drain(self, pause: float = 0.0) -> None:
        """Refuses new requests and finishes accepted ones; then the process can end.

        Args:
          pause: Seconds before that in which it says that it is not ready, but answers.
        """
        self._stopped.set()
        self._manager.stop()
        self._grpc.show_health(False)
        if self._rest is not None:
            self._rest.show_drain()
        if pause:
            _log.info("not ready any more; requests are refused in %g s", pause)
            time.sleep(pause)
        _log.info("draining: new requests are refused, accepted ones finished")
        seconds = self._options.drain_seconds
        drains = [threading.Thread(target=self._grpc.drain, args=[seconds])]
        if self._rest is not None:
            drains.append(threading.Thread(target=self._rest.drain, args=[seconds]))
        for thread in drains:
            thread.start()
        for thread in drains:
            thread.join()
        _log.info("drained")

    def close(self) -> None:
        """Gives back the ports after `drain`, in a process that goes on."""
        self._grpc.close()


def _bound_arenas() -> None:
    """Keeps glibc from giving each of many threads a heap of its own, which only grow."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)


def _session_config(options: argparse.Namespace, batching: Batching | None) -> Any:
    both = options.tensorflow_session_parallelism
    intra_op = options.tensorflow_intra_op_parallelism or both
    if not intra_op and batching is not None:
        # Batches that run side by side share the cores. Each with threads for all of them, they
        # would wait for one another at every operation: half the throughput for a small model.
        intra_op = max(1, len(os.sched_getaffinity(0)) // batching.threads)
    config = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=intra_op,
        inter_op_parallelism_threads=options.tensorflow_inter_op_parallelism or both,
    )
    config.gpu_options.per_process_gpu_memory_fraction = options.per_process_gpu_memory_fraction
    return config


def _channel_arguments(pairs: list[tuple[str, str]]) -> list[tuple[str, Any]]:
    """Numbers as numbers, as gRPC tells its arguments apart."""
    return [(key, int(value) if value.lstrip("-").isdecimal() else value) for key, value in pairs]
